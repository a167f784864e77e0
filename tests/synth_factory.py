"""Samples of a tiny synthetic model, as studies/synth_data.py writes them, without SAELens."""

from pathlib import Path

import torch
from torch import Tensor

from matryoshka.array_files import cache_arrays
from studies.synth_data import Size, Truth, write_truth

SIZE = Size(
    n_features=100,
    d_model=16,
    n_trees=1,
    n_latents=12,
    widths=(2, 12),
    n_samples=400,
    n_held_out=300,
    n_steps=20,
    batch_size=64,
    lrs=(1e-2, 3e-3),
)


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, which features are active on n samples, and the samples."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(SIZE.n_features, SIZE.d_model, generator=generator)
    active = torch.rand(n, SIZE.n_features, generator=generator.manual_seed(seed)) < 0.03
    active[1] = False  # one sample has none
    return directions, active, active.float() @ directions


def write_samples(folder: Path) -> None:
    """All that the study reads, of the size `mini` where that is SIZE."""
    cache_arrays(folder / "train", [drawn(SIZE.n_samples, 1)[2]], dtype="float32")
    directions, active, x = drawn(SIZE.n_held_out, 2)
    cache_arrays(folder / "held_out", [x], dtype="float32")
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    about = {"size": "mini", "n_samples": SIZE.n_samples, "n_held_out": SIZE.n_held_out}
    write_truth(folder, Truth(directions, active.nonzero()[:, 1].int(), starts, about))
