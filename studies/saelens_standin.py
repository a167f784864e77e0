"""Trains SAELens's SAEs with SAELens's trainer, on the same batches as this project's SAEs.

    pip install sae-lens==6.54.12
    python -m studies.saelens_standin --cache cache/train --validation-cache cache/validation \\
        --out results/standin/saelens.json

BatchTopK and MatryoshkaBatchTopK SAEs are trained at a few learning rates, for as many steps as the
project's SAEs. SAELens saves each as the JumpReLU SAE that its users load. SAELens reads that file
back, and its `encode` and `decode` are scored on the validation cache, with sums in float64. The
results are written after each training; a training that is in them is not repeated.

Settings are SAELens's defaults with three exceptions. The learning rate rises and falls as the
project's does (it rises for 100 steps, and falls to a tenth in the last fifth of the steps). The
widths and k are the comparison's. The input is scaled to a mean norm of sqrt(d_model) (SAELens's
expected_average_only_in), which is estimated on the first batches. After 150 steps at 1e-3 this
gave an FVU of 0.1136 (Matryoshka) and 0.1011 (BatchTopK); SAELens's default, `--normalize none`,
gave 0.1144 and 0.1026.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device, require_positive, setting, table
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.files import make_folder, without_paths, write_json
from matryoshka.metrics import squared_norms
from matryoshka.reconstruction import BATCH_SIZE, Moments
from studies.keep import results_in

KINDS = ("matryoshka_batchtopk", "batchtopk")
WARMUP_STEPS, DECAY_SHARE, LR_END = 100, 0.2, 0.1  # as in matryoshka.trainer_config
NOT_SHAPING = ("lrs", "kinds", "device", "out")  # settings in which runs of one file may differ
NORM_BATCHES = 100  # batches from which the input's scale is estimated


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, on what, and where the results go."""

    cache: str = setting("cache/train", "activations to train on")
    validation_cache: str = setting("cache/validation", "activations to score on")
    lrs: tuple[float, ...] = setting((1e-3, 3e-4, 3e-3), "learning rates, one after another")
    kinds: tuple[str, ...] = setting(KINDS, "kinds of SAE, one after another")
    n_latents: int = setting(1024, "latents of each SAE")
    k: float = setting(20.0, "latents that fire on a sample, on average")
    widths: tuple[int, ...] = setting((32, 96, 256, 512, 1024), "prefixes of the Matryoshka SAE")
    n_steps: int = setting(6000, "steps of each training")
    batch_size: int = setting(1024, "activations in a step")
    normalize: Literal["expected_average_only_in", "none"] = setting(
        "expected_average_only_in", "SAELens's normalize_activations"
    )
    seed: int = setting(0, "seed of the batches and of SAELens's random numbers")
    device: str = setting("auto", "torch device; auto: the GPU if there is one")
    saes: str = setting("runs/saelens", "folder for the SAEs, as SAELens saves them")
    out: str = setting("runs/saelens/results.json", "file to write")


def run(config: Config) -> dict[str, Any]:
    """Does the trainings that `config.out` does not hold; returns what it then holds.

    Raises `UserError`.
    """
    require_positive(config, "n_latents", "k", "n_steps", "batch_size")
    for kind in config.kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds {kind}: expected {' or '.join(KINDS)}")
    cache, held_out = ActivationCache(config.cache), ActivationCache(config.validation_cache)
    results, source = results_so_far(config, cache, held_out)
    done = {(run["sae"], run["lr"]) for run in results["runs"]}
    make_folder(Path(config.out).parent)
    for lr, kind in itertools.product(config.lrs, config.kinds):
        if (kind, lr) not in done:
            made = one_run(config, kind, lr, cache, held_out)
            results["runs"].append({"source": source, **made})
            write_json(Path(config.out), results)
    return results


def results_so_far(
    config: Config, cache: ActivationCache, held_out: ActivationCache
) -> tuple[dict[str, Any], str]:
    """What `config.out` holds, and the name of the source in it that new runs belong to.

    A source has one environment. A file that was begun on one machine, or at one commit, may be
    finished on another: then a source is added. Raises `UserError` if the file has other settings.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SHAPING}
    about = {
        "config": without_paths(json.loads(json.dumps(settings))),
        "environment": environment(pick_device(config.device))
        | {"sae_lens": importlib.metadata.version("sae-lens")},
        "cache": {"make": without_paths(cache.recipe), "n_tokens": cache.n_tokens},
        "validation_cache": {"n_tokens": held_out.n_tokens},
    }
    out = Path(config.out)
    results = results_in(out) if out.exists() else {"sources": [], "runs": []}
    for source in results["sources"]:
        if source["config"] != about["config"]:
            raise UserError(f"{config.out} has runs of other settings: give another --out")
        if source["environment"] == about["environment"]:
            return results, source["source"]
    name = "saelens" + f"_{len(results['sources'])}" * bool(results["sources"])
    results["sources"].append({"source": name, **about})
    return results, name


def one_run(
    config: Config, kind: str, lr: float, cache: ActivationCache, held_out: ActivationCache
) -> dict[str, Any]:
    """Trains one SAE, saves it, and scores the saved file."""
    import sae_lens

    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        trained = train(config, kind, lr, cache)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    folder = Path(config.saes) / f"{kind}_lr{lr:g}_seed{config.seed}"
    trained.save_inference_model(folder)
    return {
        "sae": kind,
        "lr": lr,
        "seed": config.seed,
        **score(sae_lens.SAE.load_from_disk(folder), held_out),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
    }


def train(
    config: Config,
    kind: str,
    lr: float,
    cache: ActivationCache,
    trainer: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Any:
    """Trains an SAE of SAELens with its SAETrainer, and folds the input's scale into it.

    trainer, more: further settings of the trainer and of the SAE, with SAELens's names.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(pick_device(config.device))
    torch.manual_seed(config.seed)  # SAELens initializes its weights from the global generator
    sae = untrained(config, kind, cache.d_model, device=device, **more)
    steps = SAETrainerConfig(
        total_training_samples=config.n_steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=lr,
        lr_warm_up_steps=min(WARMUP_STEPS, config.n_steps // 20),
        lr_decay_steps=int(DECAY_SHARE * config.n_steps),
        lr_end=LR_END * lr,
        n_batches_for_norm_estimate=NORM_BATCHES,
        device=device,
        **trainer,
    )
    return SAETrainer(steps, sae, batches(config, cache, device)).fit()


def untrained(config: Config, kind: str, d_model: int, **more: Any) -> Any:
    """A newly initialized training SAE of SAELens."""
    import sae_lens

    common = {
        "d_in": d_model,
        "d_sae": config.n_latents,
        "k": config.k,
        "normalize_activations": config.normalize,
        **more,
    }
    if kind == "batchtopk":
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common))
    return sae_lens.MatryoshkaBatchTopKTrainingSAE(
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **common, matryoshka_widths=list(config.widths)
        )
    )


def batches(config: Config, cache: ActivationCache, device: str) -> Iterator[Tensor]:
    """The project's batches in order; before them the first ones, if SAELens estimates a scale."""
    size, seed = config.batch_size, config.seed
    if config.normalize != "none":
        yield from itertools.islice(cache.batches(size, seed, device=device), NORM_BATCHES)
    yield from cache.batches(size, seed, device=device)


@torch.inference_mode()
def score(sae: Any, cache: ActivationCache) -> dict[str, float]:
    """FVU, L0 and the share of latents that never fire; `sae` needs `encode` and `decode`."""
    moments, error, fired = Moments(), 0.0, torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for batch in cache.sequential(BATCH_SIZE):
        acts = sae.encode(batch.acts)  # [n, n_latents]
        moments.add(batch.acts)
        error += float(squared_norms(batch.acts - sae.decode(acts)).sum())
        fired += (acts > 0).sum(0)
    return {
        "fvu": error / moments.variance,
        "l0": int(fired.sum()) / moments.n,
        "dead_share": float((fired == 0).double().mean()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        headers = ["SAELens", "lr", "FVU", "L0", "dead", "seconds"]
        rows = [
            [
                run["sae"],
                f"{run['lr']:g}",
                f"{run['fvu']:.4f}",
                f"{run['l0']:.2f}",
                f"{run['dead_share']:.1%}",
                f"{run['seconds']:.0f}",
            ]
            for run in results["runs"]
        ]
        print(table(headers, rows))


if __name__ == "__main__":
    main()
