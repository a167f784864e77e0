"""What several tests of the core begin with: a small trainer, batches, a whole-batch comparison."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE, seeded_generator

D_MODEL, N_LATENTS, BATCH = 5, 7, 11


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=seeded_generator(seed, 99), dtype=dtype)


def make_trainer(
    seeds: tuple[int, ...] = (0, 1),
    n_prefixes: tuple[int, ...] = (4, 1),
    n_latents: int = N_LATENTS,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Trainer:
    """SAEs of the seeds, stepped together."""
    settings = {"n_steps": 200, "target_l0": 2.0, "lr": 0.01} | config
    configs = [TrainerConfig(**settings, n_prefixes=k) for k in n_prefixes]
    return Trainer([SAE(D_MODEL, n_latents, s).to(dtype) for s in seeds], configs, seeds)


def batches(n: int, seed: int = 0) -> list[Tensor]:
    """Inputs [BATCH, D_MODEL]."""
    return [3 * rand(BATCH, D_MODEL, seed=1000 * seed + i) for i in range(n)]


def states_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
