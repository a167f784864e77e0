"""A tutorial that is tested: train two SAEs, look at prefixes, swap the activation, evaluate."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae as sae_module
from matryoshka import metrics
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE, Gate, matryoshka_loss, sample_prefixes, seeded_generator

N_FEATURES, D_MODEL, N_STEPS = 12, 8, 600


def activations(n: int, seed: int) -> Tensor:
    """What an SAE is for: sums of a few directions out of many, [n, D_MODEL]."""
    directions = torch.randn(N_FEATURES, D_MODEL, generator=seeded_generator(0))
    generator = seeded_generator(seed)
    active = torch.rand(n, N_FEATURES, generator=generator) < 1.5 / N_FEATURES
    return (active * (0.5 + torch.rand(n, N_FEATURES, generator=generator))) @ directions


def train(
    n_prefixes: tuple[int, ...] = (5, 1), activation: str = "relu", **config: str
) -> list[SAE]:
    """SAEs that see the same batches: five prefixes make a Matryoshka SAE, one a vanilla SAE."""
    configs = [
        TrainerConfig(n_steps=N_STEPS, target_l0=2.0, lr=1e-2, n_prefixes=n, **config)  # type: ignore[arg-type]
        for n in n_prefixes
    ]
    saes = [SAE(D_MODEL, n_latents=24, activation=activation) for _ in configs]
    trainer = Trainer(saes, configs, seeds=[0] * len(saes))
    for step in range(N_STEPS):
        trainer.step(activations(256, seed=step))
    return trainer.saes  # latents in order, general ones first


@torch.no_grad()
def test_train_and_evaluate() -> None:
    matryoshka, vanilla = train()
    x = activations(4_000, seed=-1)  # not trained on
    for sae in (matryoshka, vanilla):
        acts = sae.encode(x)
        assert metrics.fvu(x, sae.decode(acts)) < 0.3
        assert metrics.l0(acts) < 8  # of 24


@torch.no_grad()
def test_look_at_prefixes() -> None:
    """Each latent adds something, and Matryoshka's first ones more than vanilla's."""
    matryoshka, vanilla = train()
    x = activations(4_000, seed=-1)
    errors = {}
    for name, sae in (("matryoshka", matryoshka), ("vanilla", vanilla)):
        acts = sae.encode(x)
        errors[name] = [float(metrics.fvu(x, sae.decode(acts, prefix=m))) for m in (3, 6, 12, 24)]
    assert errors["matryoshka"] == sorted(errors["matryoshka"], reverse=True)
    assert errors["matryoshka"][0] < errors["vanilla"][0]


def test_the_loss_is_a_function_that_autograd_can_differentiate() -> None:
    sae, x = SAE(D_MODEL, 24), activations(64, seed=1)
    lengths = sample_prefixes(sae.n_latents, 5, seeded_generator(0))  # e.g. 1, 3, 8, 15, 24
    acts = sae.encode(x)
    loss = matryoshka_loss(x, acts, sae.W_dec, sae.b_dec, lengths, sparsity_weight=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.isfinite().all()


def test_swap_the_activation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One function and one entry of the table; the file says which it was."""

    def hard_threshold(preacts: Tensor, gate: Gate) -> Tensor:
        return preacts * (preacts > 0.1)

    monkeypatch.setitem(sae_module.ACTIVATIONS, "hard_threshold", hard_threshold)
    fast, slow = (
        train((5,), "hard_threshold", gradient=gradient)[0] for gradient in ("auto", "autograd")
    )
    x = activations(4_000, seed=-1)
    assert metrics.fvu(x, fast(x)) < 0.3
    for ours, autograds in zip(fast.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, autograds, rtol=0.05, atol=0.05)
    fast.save(tmp_path / "mine.safetensors")
    assert SAE.load(tmp_path / "mine.safetensors").activation == "hard_threshold"
