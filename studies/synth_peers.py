"""Trains SAELens's SAEs with SAELens's trainer, on the same samples as studies/synth.py.

    pip install sae-lens==6.54.12
    python -m studies.synth_peers --size mini --data cache/synth/mini \\
        --out results/synth/mini_saelens.json

BatchTopK and MatryoshkaBatchTopK SAEs are trained at each learning rate with the first seed, and at
the one with the best F1 with the other seeds. The batches, the numbers of latents and of steps, k,
the widths and the learning rate's schedule are those of studies/synth.py. So is the number of
samples after which a latent counts as dead: with SAELens's default, 1,000 steps, no latent of
`mini` would be revived. Other settings are SAELens's defaults, except that the Matryoshka SAE has
an auxiliary loss for each level (`use_matryoshka_aux_loss`), as in the published benchmark. SAELens
reads back what it saved, and its `encode` and `decode` are scored. The results are written after
each training; a training that is in them is not repeated.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.environment import environment
from matryoshka.files import write_json
from studies import saelens_standin
from studies.synth import (
    BATCHTOPK,
    HEADERS,
    StudyConfig,
    require_names,
    results_so_far,
    rows_of,
    score,
    settings_of,
    target_l0,
)
from studies.synth_data import SIZES, SizeName, Truth, read_truth

# By the name of an SAE: its kind in studies/saelens_standin.py, and further settings of SAELens's.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "saelens_matryoshka": ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
    "saelens_batchtopk": ("batchtopk", {}),
}


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """What is trained, on what, and where the results go."""

    saes: tuple[str, ...] = setting(tuple(PEERS), "which SAEs, by name")
    runs: str = setting("runs/synth/mini_saelens", "folder for the SAEs, as SAELens saves them")
    out: str = setting("runs/synth/mini_saelens/results.json", "file to write")


def run(config: Config, on_done: Callable[[], object] | None = None) -> dict[str, Any]:
    """Does the trainings that `config.out` does not hold; returns what it then holds.

    on_done: called after each training, when its scores are written. Raises `UserError`.
    """
    require_names(config.saes, PEERS)
    data = Path(config.data)
    truth = read_truth(data)
    train, held_out = (ActivationCache(data / split) for split in ("train", "held_out"))
    results = results_so_far(Path(config.out), source(config, truth))
    for name in config.saes:
        for seed, lr in still_to_do(config, name, results["runs"]):
            results["runs"].append(one_run(config, name, seed, lr, (train, held_out, truth)))
            write_json(Path(config.out), results)
            if on_done:
                on_done()
    return results


def still_to_do(
    config: Config, name: str, runs: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, float]]:
    """Yields the (seed, learning rate) pairs that are not in `runs`.

    First come all rates with the first seed, then the rate that has the best F1 with the other
    seeds. The caller adds each run to `runs` before it asks for the next pair.
    """
    first, *others = config.seeds
    lrs = SIZES[config.size].lrs

    def of_seed(seed: int) -> dict[float, float]:
        return {r["lr"]: r["f1"] for r in runs if r["sae"] == name and r["seed"] == seed}

    yield from ((first, lr) for lr in lrs if lr not in of_seed(first))
    best = max(lrs, key=lambda lr: of_seed(first)[lr])
    yield from ((seed, best) for seed in others if best not in of_seed(seed))


def one_run(
    config: Config,
    name: str,
    seed: int,
    lr: float,
    data: tuple[ActivationCache, ActivationCache, Truth],
) -> dict[str, Any]:
    """Trains one SAE, saves it, and scores the saved file.

    data: the samples to train on, the held-out samples, and the truth about these.
    """
    import sae_lens

    train, held_out, truth = data
    kind, more = PEERS[name]
    size = SIZES[config.size]
    settings = saelens_standin.Config(
        n_latents=size.n_latents,
        k=target_l0(config.size, truth),
        widths=size.widths,
        n_steps=config.n_steps or size.n_steps,
        batch_size=size.batch_size,
        normalize="none",
        seed=seed,
        device=config.device,
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        trained = saelens_standin.train(
            settings, kind, lr, train, trainer_settings(config.size), **more
        )
    seconds = round(time.perf_counter() - began, 2)
    folder = Path(config.runs) / f"{name}_lr{lr:g}_seed{seed}"
    trained.save_inference_model(folder)
    figures = score(
        sae_lens.SAE.load_from_disk(folder, device=str(pick_device(config.device))), held_out, truth
    )
    about = {"source": "synth_saelens", "sae": name, "lr": lr, "seed": seed, "settings": more}
    return {**about, **figures, "seconds": seconds}


def trainer_settings(size: SizeName) -> dict[str, Any]:
    """Settings of SAELens's trainer other than its defaults: the steps until a latent is dead.

    They have as many samples as `dead_after` in studies/synth.py.
    """
    return {"dead_feature_window": BATCHTOPK["dead_after"] // SIZES[size].batch_size}


def source(config: Config, truth: Truth) -> dict[str, Any]:
    """What the results file says about how it was made."""
    about = {
        "source": "synth_saelens",
        "command": f"python -m studies.synth_peers --size {config.size}",
        "config": settings_of(config),
        "size": SIZES[config.size]._asdict(),
        "trainer": trainer_settings(config.size),
        "true_l0": truth.l0,
        "environment": environment(pick_device(config.device))
        | {"sae_lens": importlib.metadata.version("sae-lens")},
    }
    return dict(json.loads(json.dumps(about)))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        print(table(HEADERS, rows_of(results["runs"])))


if __name__ == "__main__":
    main()
