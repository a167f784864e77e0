"""What must hold on any device, on the GPU where there is one, else on the CPU.

A GPU has kernels, streams and allocators of its own: the same code is run there from end to end and
compared with the CPU, or with float64. On a CPU other tests cover all of this; a few cases are run
there so that these tests stay right.
"""

import dataclasses

import pytest
import torch
from core_cases import states_equal
from torch import Tensor
from training_cases import write_cache

import evaluate
import train
from matryoshka.array_files import cache_arrays
from matryoshka.cache_reader import ActivationCache
from matryoshka.environment import multiplies_bfloat16
from matryoshka.kernels import Objective, Params, write_gradient
from matryoshka.pair_sums import Firings
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE, seeded_generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D_MODEL, N_LATENTS, BATCH, K = 32, 320, 64, 12.0
BASE = {"n_steps": 300, "target_l0": K, "lr": 1e-3, "gradient": "dense"}
OF_KIND = {
    "relu": {"activation": "relu", "n_prefixes": 10},
    "relu, log": {"activation": "relu", "n_prefixes": 10, "sparsity": "log"},
    "expected": {"activation": "relu", "prefixes": "expected"},
    "topk": {"activation": "topk", "widths": (32.0, 96.0, 320.0)},
    "batchtopk": {"activation": "batchtopk", "widths": (32.0, 96.0, 320.0), "auxiliary": "all"},
    "jumprelu": {"activation": "jumprelu", "widths": (32.0, 320.0), "bandwidth": 0.1},
    "unhedged": {"activation": "batchtopk", "widths": (32.0, 320.0), "unhedged": 0.5},
}

if DEVICE.type == "cpu":
    OF_KIND = {kind: OF_KIND[kind] for kind in ("relu, log", "batchtopk")}


def trainer(kind: str, device: torch.device, **more: object) -> Trainer:
    settings = BASE | OF_KIND[kind] | more
    activation = str(settings.pop("activation"))
    k = K if "topk" in activation else None
    saes = [SAE(D_MODEL, N_LATENTS, seed, activation, k).to(device) for seed in (0, 1)]
    return Trainer(saes, TrainerConfig(**settings), [0, 1])  # type: ignore[arg-type]


def batches(n: int) -> Tensor:
    return torch.randn(n, BATCH, D_MODEL, generator=seeded_generator(0))


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_gradient_is_that_of_autograd_in_float64(kind: str) -> None:
    """After some steps, so that no latent lies on the edge of firing at the same place by symmetry;
    the prefixes are the next step's."""
    ours = trainer(kind, DEVICE)
    *warm_up, x = batches(12).to(DEVICE)
    for batch in warm_up:
        ours.step(batch)
    with torch.inference_mode():
        objective = ours._objective(x.expand(2, -1, -1), ours._prefixes_of(12))
        flat = ours._state["params"]
        found = torch.zeros_like(flat)
        write_gradient(Params.of(found, D_MODEL, N_LATENTS), ours._params, objective, "dense")
        exact = flat.double().cpu()
        expected = torch.zeros_like(exact)
        write_gradient(
            Params.of(expected, D_MODEL, N_LATENTS),
            Params.of(exact, D_MODEL, N_LATENTS),
            in_float64(objective),
            "autograd",
        )
    assert error(found, expected) < 1e-5


def in_float64(objective: Objective) -> Objective:
    x, reach, price = (
        tensor.double().cpu() for tensor in (objective.x, objective.reach, objective.price)
    )
    return dataclasses.replace(objective, x=x, reach=reach, price=price, ends=None)


@pytest.mark.parametrize("kind", OF_KIND)
def test_training_goes_where_it_goes_on_a_cpu(kind: str) -> None:
    on_cpu, on_device = trainer(kind, torch.device("cpu")), trainer(kind, DEVICE)
    for x in batches(40):
        expected, found = on_cpu.step(x), on_device.step(x.to(DEVICE))
    assert error(found["l0"], expected["l0"]) < 0.01
    assert error(on_device.state_dict()["params"], on_cpu.state_dict()["params"]) < 0.01


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_checkpoint_goes_on_bit_for_bit(kind: str) -> None:
    whole, first, second = (trainer(kind, DEVICE) for _ in range(3))
    xs = batches(30).to(DEVICE)
    for x in xs:
        whole.step(x)
    for x in xs[:15]:
        first.step(x)
    second.load_state_dict(first.state_dict())
    for x in xs[15:]:
        second.step(x)
    assert states_equal(whole.state_dict(), second.state_dict())


@pytest.mark.parametrize("kind", sorted(set(OF_KIND) - {"unhedged"}))
def test_bfloat16_is_float32_to_its_rounding(kind: str) -> None:
    if not multiplies_bfloat16(DEVICE):
        pytest.skip("no instructions for bfloat16")
    rounded, plain = trainer(kind, DEVICE, matmul_dtype="bfloat16"), trainer(kind, DEVICE)
    for x in batches(40).to(DEVICE):
        found, expected = rounded.step(x), plain.step(x)
    assert error(found["l0"], expected["l0"]) < 0.05
    assert error(rounded.state_dict()["params"], plain.state_dict()["params"]) < 0.1


def test_batches_are_the_same_on_any_device(tmp_path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "cache", 5000))
    for max_resident in (None, 0):  # held there, and streamed
        ours = cache.batches(512, 3, device=DEVICE, max_resident=max_resident)
        theirs = cache.batches(512, 3, device="cpu")
        for _ in range(25):
            assert torch.equal(next(ours).cpu(), next(theirs))


def test_what_fires_is_found_alike_on_any_device() -> None:
    acts = torch.randn(200, 30, generator=seeded_generator(0)).relu()
    ours, theirs = Firings(acts.to(DEVICE)), Firings(acts)
    for name in ("token", "latent", "value"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()


@pytest.mark.slow
def test_the_scripts_from_end_to_end(tmp_path) -> None:
    """Trained, refitted and evaluated; the figures are those of the CPU."""
    cache = str(tmp_path / "cache")
    cache_arrays(cache, [torch.randn(4096, D_MODEL, generator=seeded_generator(1)).relu()])
    figures = []
    for device in ("cpu", str(DEVICE)):
        out = str(tmp_path / f"run{len(figures)}")
        train.run(
            train.Config(
                cache=cache,
                validation_cache=cache,
                n_latents=N_LATENTS,
                activation="batchtopk",
                widths=(32.0, 320.0),
                auxiliary="all",
                dead_after=2000,
                target_l0s=(8.0,),
                n_steps=25,
                batch_size=256,
                refit=True,
                device=device,
                out=out,
            )
        )
        results = evaluate.run(evaluate.Config(run=out, cache=cache, device=device))
        refitted = evaluate.run(evaluate.Config(run=f"{out}/refit", cache=cache, device=device))
        figures.append([*results["runs"], *refitted["runs"]])
    for theirs, ours in zip(*figures, strict=True):
        assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=0.01)
        assert ours["l0"] == pytest.approx(theirs["l0"], rel=0.02)
