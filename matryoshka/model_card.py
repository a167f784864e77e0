"""The page of an SAE on the Hugging Face hub, made of what its file and its run know."""

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
TOLD = {  # of `about`, in this order
    "model": "language model",
    "layer": "layer",
    "site": "site",
    "dataset": "dataset",
    "split": "split",
    "n_tokens": "activations trained on",
    "n_prefixes": "prefixes a step",
    "prefixes": "their lengths",
    "widths": "widths",
    "target_l0": "L0 asked for",
    "l0": "L0 at the end of training",
    "dead_share": "share of latents that were dead then",
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


def model_card(sae: SAE, repo: str, licence: str, scores: Mapping[str, Any] | None) -> str:
    """README.md of a repository. scores: the SAE's line of evaluation.json, where there is one."""
    return "\n\n".join(
        [
            header(licence),
            f"# {title(sae)}",
            f"A sparse autoencoder of {sae.n_latents:,} latents for activations of {sae.d_model} "
            f"dimensions. {what_it_is(sae)}",
            "## How it was trained",
            settings_table(sae),
            "## Scores on held-out activations",
            scores_table(scores),
            "## Loading it",
            loading(repo, sae.n_latents),
            "## Citation",
            f"```bibtex\n{CITATION}\n```\n",
        ]
    )


def header(licence: str) -> str:
    """What the hub reads: SAELens lists repositories by their library_name."""
    tags = "\n".join(f"- {tag}" for tag in ("sparse-autoencoder", "interpretability"))
    return f"---\nlibrary_name: saelens\nlicense: {licence}\ntags:\n{tags}\n---"


def title(sae: SAE) -> str:
    """Of what model and layer, where that is known."""
    about = sae.about
    kind = str(about.get("name") or "sparse autoencoder")
    if about.get("model") is None:
        return kind
    return f"{kind}, layer {about.get('layer')} of {about['model']}"


def what_it_is(sae: SAE) -> str:
    """The activation function, and what the order of latents means."""
    k = "" if sae.k is None else f" with k = {sae.k:g}"
    text = f"Its activation function is {sae.activation}{k}."
    if not has_prefixes(sae):
        return text
    return (
        f"{text} It is a Matryoshka SAE: latents are in order, and the first m of them reconstruct "
        "by themselves."
    )


def settings_table(sae: SAE) -> str:
    """What the SAE's file says of its training."""
    told = {label: sae.about.get(name) for name, label in TOLD.items()}
    rows = [(label, text_of(value)) for label, value in told.items() if value not in (None, [], ())]
    return table(["", "value"], rows) if rows else "Its file does not say."


def text_of(value: Any) -> str:
    """A setting as a reader wants it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def scores_table(scores: Mapping[str, Any] | None) -> str:
    """Its line of evaluation.json."""
    if scores is None:
        return "Not evaluated."
    rows = [
        (label, f"{scores[name]:.4g}")
        for name, label in SCORES.items()
        if isinstance(scores.get(name), int | float)
    ]
    return table(["", "value"], rows)


def loading(repo: str, n_latents: int) -> str:
    """How it is loaded, here and in SAELens."""
    return f"""With the project that trained it, whose latents keep their prefixes:

```python
from sae import SAE

sae = SAE.from_pretrained("{repo}")
x_hat = sae(x)  # x: [..., d_model], in the units of the data
x_hat = sae.decode(sae.encode(x), prefix={n_latents // 4})  # of the first latents alone
```

With SAELens, which has no prefixes:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "saelens")
```"""
