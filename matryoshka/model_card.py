"""Makes the model card of an SAE on the Hugging Face hub, from its file and its run."""

from collections.abc import Mapping
from typing import Any

from matryoshka.command_line import table
from matryoshka.plain_weights import has_prefixes
from sae import SAE

CITATION = """@inproceedings{bussmann2025matryoshka,
  title = {Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author = {Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  eprint = {2503.17547},
  archivePrefix = {arXiv},
}"""
TOLD = {  # the entries of `about` that are shown, in this order, with their labels
    "model": "language model",
    "layer": "layer",
    "site": "site",
    "dataset": "dataset",
    "split": "split",
    "n_tokens": "activations trained on",
    "n_prefixes": "prefixes a step",
    "prefixes": "lengths of prefixes",
    "widths": "widths",
    "target_l0": "L0 asked for",
    "l0": "L0 at the end of training",
    "dead_share": "share of dead latents at the end of training",
    "sparsity": "sparsity penalty",
    "lr": "learning rate",
    "n_steps": "steps",
    "batch_size": "batch size",
    "seed": "seed",
    "torch": "torch",
}
SCORES = {
    "fvu": "FVU (fraction of variance unexplained)",
    "l0": "L0 (latents that fire on a token)",
    "dead_share": "share of latents that never fired",
    "loss_recovered": "loss recovered",
    "absorption": "absorption of concepts",
    "mean_highest_cosine": "mean highest cosine between latents",
}


MEASURED_ON = {  # by `held_out`
    True: "On held-out activations.",
    False: "On activations that it was TRAINED on.",
    None: "It is not known whether it was trained on these activations.",
}


def model_card(sae: SAE, repo: str, licence: str, scores: Mapping[str, Any] | None) -> str:
    """The text of a repository's README.md. scores: what `hub.copy_results` returns."""
    return "\n\n".join(
        [
            header(licence),
            f"# {title(sae)}",
            f"A sparse autoencoder of {sae.n_latents:,} latents for activations of {sae.d_model} "
            f"dimensions. {what_it_is(sae)}",
            "## How it was trained",
            settings_table(sae),
            "## Scores",
            scores_table(scores),
            "## Loading it",
            loading(repo, sae.n_latents),
            "## Citation",
            f"```bibtex\n{CITATION}\n```\n",
        ]
    )


def header(licence: str) -> str:
    """The header that the hub reads; SAELens finds repositories by their library_name."""
    tags = "\n".join(f"- {tag}" for tag in ("sparse-autoencoder", "interpretability"))
    return f"---\nlibrary_name: saelens\nlicense: {licence}\ntags:\n{tags}\n---"


def title(sae: SAE) -> str:
    """The SAE's name, with its layer and language model if they are known."""
    about = sae.about
    kind = str(about.get("name") or "sparse autoencoder")
    if about.get("model") is None:
        return kind
    return f"{kind}, layer {about.get('layer')} of {about['model']}"


def what_it_is(sae: SAE) -> str:
    """Sentences about the activation function and the order of latents."""
    k = "" if sae.k is None else f" with k = {sae.k:g}"
    text = f"Its activation function is {sae.activation}{k}."
    if not has_prefixes(sae):
        return text
    return (
        f"{text} It is a Matryoshka SAE: latents are in order, and the first m of them reconstruct "
        "by themselves."
    )


def settings_table(sae: SAE) -> str:
    """A table of what the SAE's file says about its training."""
    told = {label: sae.about.get(name) for name, label in TOLD.items()}
    rows = [(label, text_of(value)) for label, value in told.items() if value not in (None, [], ())]
    return table(["", "value"], rows) if rows else "Its file does not say."


def text_of(value: Any) -> str:
    """Formats a setting for readers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def scores_table(scores: Mapping[str, Any] | None) -> str:
    """A table of the SAE's scores, and whether it was trained on the activations."""
    if scores is None:
        return "Not evaluated."
    rows = [
        (label, f"{scores[name]:.4g}")
        for name, label in SCORES.items()
        if isinstance(scores.get(name), int | float)
    ]
    return f"{MEASURED_ON[scores.get('held_out')]}\n\n{table(['', 'value'], rows)}"


def loading(repo: str, n_latents: int) -> str:
    """Code that loads the SAE with this project and with SAELens."""
    return f"""With the project that trained it, which can decode prefixes:

```python
from sae import SAE

sae = SAE.from_pretrained("{repo}")
x_hat = sae(x)  # x: [..., d_model], in the units of the data
x_hat = sae.decode(sae.encode(x), prefix={n_latents // 4})  # from the first latents only
```

With SAELens, which has no prefixes:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "saelens")
```"""
