"""A comparison of seconds, for the tests of `modal_tinystories.py`."""

from pathlib import Path
from typing import Any

from tiny_factory import write_dataset, write_model

from matryoshka.modal_launch import Launch, launch_of

N_ROWS, TOKENS, VALIDATION = 90, 4_000, 800


def write_data(folder: Path) -> Path:
    """model.pt, train.jsonl and validation.jsonl: two layers, 32 dimensions, 90 and 30 rows."""
    write_model(folder / "model.pt")
    write_dataset(folder, N_ROWS, seed=1)
    return write_dataset(folder, 30, split="validation", seed=2)


def launch_for(data: Path, at: Path, **settings: Any) -> Launch:
    """64 latents, 40 steps, four caching workers; on the folder `at`/volume."""
    settings = {
        "model": data / "model.pt",
        "dataset": data,
        "tokens": TOKENS,
        "validation_tokens": VALIDATION,
        "layer": 1,
        "dtype": "float32",
        "rows_per_shard": 8,
        "n_latents": 64,
        "n_prefixes": 4,
        "target_l0": 5.0,
        "n_steps": 40,
        "batch_size": 64,
        "checkpoint_every": 15,
        "checkpoint_seconds": 0,
        "cache_workers": 4,
        "volume": at / "volume",
        "name": "tiny",
        "out": at / "out",
        **settings,
    }
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return launch_of(words)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
