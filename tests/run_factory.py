"""A small training run for tests: model, token ids, caches, and what train.py writes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tiny_factory import END, write_dataset, write_model

import cache_activations
import train
from matryoshka.cache_reader import ActivationCache
from sae import SAE

SEQ, D_MODEL, LAYER = 24, 16, 1
CONCEPTS = {"frequent": list(range(20, 60)), "end": [END], "absent": [9000]}


def write_cache(folder: Path, split: str, **changed: object) -> Path:
    """Caches `folder`/`split`.jsonl of `folder`/model.pt to `folder`/`split`, which it returns."""
    settings: dict[str, object] = {
        "model": str(folder / "model.pt"),
        "dataset": str(folder),
        "split": split,
        "layer": LAYER,
        "rows_per_shard": 40,
        "out": str(folder / split),
        "device": "cpu",
    }
    config = cache_activations.Config(**{**settings, **changed})
    cache_activations.run(config)
    return Path(config.out)


def write_run(folder: Path) -> Path:
    """Writes model.pt, caches "train" and "validation", concepts.json and a trained "run" to
    `folder`, which it returns."""
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    for split, n_rows, seed in (("train", 150, 0), ("validation", 61, 1)):
        write_dataset(folder, n_rows, split=split, seq=SEQ, seed=seed)
        write_cache(folder, split)
    content = {"concepts": {name: {"words": [], "ids": ids} for name, ids in CONCEPTS.items()}}
    (folder / "concepts.json").write_text(json.dumps(content))
    train.run(
        train.Config(
            cache=str(folder / "train"),
            n_latents=40,
            n_prefixes=4,
            target_l0=5.0,
            n_steps=60,
            batch_size=256,
            out=str(folder / "run"),
            device="cpu",
        )
    )
    return folder


def rewrite_acts(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Replaces the activations of a cache, [n, d_model], by what `change` makes of them."""
    cache = ActivationCache(folder)
    raw = b"".join((folder / f"{shard.name}.acts").read_bytes() for shard in cache.shards)
    acts = torch.frombuffer(bytearray(raw), dtype=cache.dtype).view(-1, cache.d_model)
    acts = change(acts).to(cache.dtype).contiguous()
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        raw = acts[: shard["n_tokens"]].view(torch.uint8).numpy().tobytes()
        acts = acts[shard["n_tokens"] :]
        (folder / f"{shard['name']}.acts").write_bytes(raw)
        shard["acts_sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def damage_shard(folder: Path, i: int) -> str:
    """Flips a bit of a cache's i-th file of activations, and returns the shard's name."""
    path = sorted(folder.glob("*.acts"))[i]
    raw = bytearray(path.read_bytes())
    raw[77] ^= 1
    path.write_bytes(raw)
    return path.stem


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fvu_by_loop(x: list[list[float]], x_hat: list[list[float]]) -> float:
    n, d = len(x), len(x[0])
    mean = [math.fsum(row[k] for row in x) / n for k in range(d)]
    residual = math.fsum(
        (a - b) ** 2 for p, q in zip(x, x_hat, strict=True) for a, b in zip(p, q, strict=True)
    )
    return residual / math.fsum((row[k] - mean[k]) ** 2 for row in x for k in range(d))


def random_sae(n_latents: int = 13, d_model: int = D_MODEL, seed: int = 0) -> SAE:
    """An SAE with nothing at zero: biases, scale and decoder norms included."""
    sae = SAE(d_model, n_latents, seed)
    with torch.no_grad():
        sae.W_dec.copy_(randn(n_latents, d_model, seed=seed + 1))
        sae.b_enc.copy_(randn(n_latents, seed=seed + 2) - 0.5)
        sae.b_dec.copy_(randn(d_model, seed=seed + 3))
        sae.mean_norm.fill_(5.0)
    return sae.requires_grad_(False)


def members_of(concepts: Iterable[list[int]], tok_ids: torch.Tensor) -> torch.Tensor:
    """bool [n_concepts, n]: which of the tokens are in each concept."""
    return torch.stack([torch.isin(tok_ids, torch.tensor(ids)) for ids in concepts])
