"""Tiny models of many architectures with random weights, made by `transformers`' config classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

D_VOCAB, SEQ = 96, 32  # ids; positions

SHAPE = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
USUAL = SHAPE | {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": SEQ},
}
GROUPED = USUAL | {"num_key_value_heads": 1, "head_dim": 8}
SLIDING = GROUPED | {"sliding_window": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", SHAPE | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": SEQ}),
    "gpt_neox": ("GPTNeoX", USUAL),
    "gpt_neox_sequential": ("GPTNeoX", USUAL | {"use_parallel_residual": False}),
    "gpt_neo": (
        "GPTNeo",
        SHAPE
        | {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "intermediate_size": 24}
        | {"attention_types": [[["global", "local"], 2]], "window_size": 4}
        | {"max_position_embeddings": SEQ},
    ),
    "opt": ("OPT", USUAL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt_post_norm": (
        "OPT",
        USUAL | {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "llama": ("Llama", USUAL),
    "qwen2": ("Qwen2", USUAL | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": ("Gemma3Text", SLIDING | {"num_hidden_layers": 6}),
    "phi": ("Phi", USUAL),
    "bloom": ("Bloom", SHAPE | {"hidden_size": 16, "n_layer": 3, "n_head": 2}),
    "bert": ("Bert", USUAL),
    "roberta": ("Roberta", USUAL | {"max_position_embeddings": SEQ + 2}),
}
HEADLESS = ("bert", "roberta")


def make_model(name: str) -> Any:
    """The model of that name, with weights large enough that nothing is nearly linear."""
    import transformers

    prefix, settings = CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    kind = transformers.AutoModel if name in HEADLESS else transformers.AutoModelForCausalLM
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the constructors draw from the global generator
        model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_model(name: str, folder: Path) -> Path:
    """Saves the model of that name in a folder of that name, and returns it."""
    make_model(name).save_pretrained(folder / name)
    return folder / name


WORDS = ["once", "upon", "a", "time", "there", "was", "little", "girl", "named", "lily", "who"]


def make_documents(n: int = 60, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 41))) for _ in range(n)]


def save_tokenizer(folder: Path, kind: str = "gpt2") -> Path:
    """Saves a tokenizer trained on `make_documents`, of at most D_VOCAB ids; returns the folder.

    kind: "gpt2" puts nothing around a text, "llama" [BOS] before it, "bert" [CLS] before it and
    [SEP] after it, "bare" has no special tokens at all.
    """
    import tokenizers
    import transformers

    special = {
        "gpt2": {"eos_token": "<|end|>", "bos_token": "<|end|>"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
        "bare": {},
    }[kind]
    tokens = list(dict.fromkeys(special.values()))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=D_VOCAB, special_tokens=tokens)
    tokenizer.train_from_iterator(make_documents(), trainer)
    around = {"llama": "<s> $A", "bert": "[CLS] $A [SEP]"}.get(kind)
    if around:
        ids = [(token, tokenizer.token_to_id(token)) for token in around.split() if token != "$A"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=around, special_tokens=ids
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return folder


def write_documents(file: Path, texts: list[str], column: str = "text") -> Path:
    """Writes the texts as .jsonl, and returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts))
    return file
