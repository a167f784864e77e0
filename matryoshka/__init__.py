"""What the scripts share: the trainer and its kernels, language models, caches, metrics, pages."""
