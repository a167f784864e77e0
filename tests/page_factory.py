"""A small run and a cache to browse: two SAEs whose latents are made up, and text that bites."""

import json
from pathlib import Path

import torch
from run_factory import random_sae, write_cache
from tiny_factory import write_dataset, write_model

from matryoshka.cache_reader import ActivationCache
from sae import SAE

D_MODEL, N_LATENTS, LAYER = 16, 70, 1
PARENT, CHILD, DEAD = 0, 40, 69  # latents of the Matryoshka SAE
# Texts of the most frequent token ids, 1 and on; others are called by their number.
HOSTILE = [
    "<script>alert(1)</script>",
    " \"quoted\" 'too'",
    " 🦊",
    " שלום",
    " مرحبا",
    "</script><img src=x onerror=alert(2)>",
    "\n",
    " &amp;",
    " half \ud83d",
    "\u2028",
]


def matryoshka() -> SAE:
    """CHILD fires where PARENT does, and only where that is strong; DEAD never fires."""
    sae = random_sae(N_LATENTS, D_MODEL, seed=1)
    sae.W_enc[:, CHILD] = sae.W_enc[:, PARENT]
    sae.b_enc[CHILD], sae.b_enc[PARENT] = -1.5, 0.0
    sae.b_enc[DEAD] = -1e6
    sae.about = {"n_prefixes": 4, "layer": LAYER, "model": "made up"}
    return sae


def write_world(folder: Path) -> Path:
    """Writes model.pt, the cache "validation", "run" with two SAEs and tokens.json to `folder`."""
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    write_dataset(folder, 60, split="validation", seq=40, seed=1)
    write_cache(folder, "validation")
    (folder / "run").mkdir()
    matryoshka().save(folder / "run" / "matryoshka.safetensors")
    vanilla = random_sae(50, D_MODEL, seed=2)
    vanilla.about = {"n_prefixes": 1}
    vanilla.save(folder / "run" / "vanilla.safetensors")
    texts = {str(i): f" word{i}" for i in range(10_000)} | {
        str(i + 1): text for i, text in enumerate(HOSTILE)
    }
    (folder / "tokens.json").write_text(json.dumps(texts))
    (folder / "strangers.json").write_text('{"stranger": {"0": "a name"}}')
    (folder / "far.json").write_text('{"matryoshka": {"4000": "a name"}}')
    return folder


def flags(world: Path, out: Path, **more: object) -> list[str]:
    """The command line that browses it."""
    settings = {
        "run": world / "run",
        "cache": world / "validation",
        "tokens": world / "tokens.json",
        "out": out,
        "device": "cpu",
        **more,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def script_arguments(path: Path) -> list[object]:
    """What a data file's call has in its parentheses."""
    text = path.read_text(encoding="utf-8")
    begin = text.index("(") + 1
    arguments: list[object] = json.loads(f"[{text[begin : text.rindex(')')]}]")
    return arguments


def activations(world: Path, sae: SAE) -> torch.Tensor:
    """What every latent adds on every token of the cache: [n, n_latents]."""
    cache = ActivationCache(world / "validation")
    acts = sae.encode(cache.acts(0, cache.n_tokens).float())
    return acts * sae.W_dec.norm(dim=1) / sae.scale
