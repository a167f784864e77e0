"""Trains SAEs on a synthetic model whose features are known, and scores how many they find.

    python -m studies.synth --size mini --data cache/synth/mini --out results/synth/mini.json

The kinds of SAE below are trained on the samples that studies/synth_data.py drew, with several
seeds, at an L0 equal to the number of features that fire. Each is scored on held-out samples: as
trained, and with its decoder refitted (matryoshka/refit.py). studies/synth_peers.py does the same
with SAELens's SAEs. The results are written after each training; a training that is in them is not
repeated.

The settings were chosen on a seed that the table does not show; docs/synth.md has what was tried.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.files import make_folder, without_paths, write_json
from matryoshka.metrics import squared_norms
from matryoshka.reconstruction import BATCH_SIZE, Moments
from matryoshka.training_config import TrainingConfig
from matryoshka.truth_scores import TruthScores
from sae import SAE
from studies.keep import results_in
from studies.kept_results import spread
from studies.synth_data import SIZES, SizeName, Truth, read_truth

LRS: dict[str, float] = {"mini": 3e-3, "16k": 3e-4}  # the learning rate for each size
# Target L0s, where they are those of the published table and not the number of features that fire.
TARGET_L0S = {"16k": 25.0}
# The settings of each SAE, by its name. Where "widths" is WIDTHS, they are those of the size.
WIDTHS = "the size's"
BATCHTOPK: dict[str, Any] = {"activation": "batchtopk", "auxiliary": "level", "dead_after": 50_000}
MATRYOSHKA = {**BATCHTOPK, "widths": WIDTHS}
SAES: dict[str, dict[str, Any]] = {
    "matryoshka_batchtopk": MATRYOSHKA,
    "unhedged_batchtopk": {**MATRYOSHKA, "unhedged": 0.5},
    "vanilla_batchtopk": {**BATCHTOPK, "kind": "vanilla"},
    "sampled_batchtopk": BATCHTOPK,
    "matryoshka_relu": {"activation": "relu"},
    "vanilla_relu": {"kind": "vanilla", "activation": "relu"},
}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The settings of studies/synth.py that studies/synth_peers.py has, too."""

    size: SizeName = setting("mini", "the synthetic model: a key of SIZES in synth_data.py")
    data: str = setting("cache/synth/mini", "folder that studies.synth_data wrote")
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of the initialization and of the batches")
    n_steps: int = setting(0, "training steps; 0: the number of the size")
    device: str = setting("auto", "torch device; auto: the GPU if there is one")


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """What is trained, on what, and where the results go."""

    saes: tuple[str, ...] = setting(tuple(SAES), "which SAEs, by name")
    lr: float = setting(0.0, "learning rate; 0: that of the size")
    runs: str = setting("runs/synth/mini", "folder for the SAEs")
    out: str = setting("runs/synth/mini/results.json", "file to write")


def run(config: Config, on_checkpoint: Callable[[], object] | None = None) -> dict[str, Any]:
    """Trains and scores the SAEs that `config.out` does not hold; returns what it then holds.

    on_checkpoint: called after each checkpoint of a training. Raises `UserError`.
    """
    require_names(config.saes, SAES)
    data = Path(config.data)
    truth, held_out = read_truth(data), ActivationCache(data / "held_out")
    if truth.about["size"] != config.size:
        raise UserError(f"{data} has samples of size {truth.about['size']}, not {config.size}")
    results = results_so_far(Path(config.out), source(config, truth))
    done = {(one["sae"], one["seed"]) for one in results["runs"]}
    for seed, name in itertools.product(config.seeds, config.saes):
        if (name, seed) not in done:
            results["runs"] += one_run(config, name, seed, (held_out, truth), on_checkpoint)
            write_json(Path(config.out), results)
    return results


def require_names(names: Sequence[str], known: Iterable[str]) -> None:
    """Raises `UserError` where one of --saes is unknown."""
    for name in names:
        if name not in known:
            raise UserError(f"--saes {name} is none of {', '.join(known)}")


def results_so_far(out: Path, source: dict[str, Any]) -> dict[str, Any]:
    """What the file `out` holds, or results without runs if there is no such file.

    Raises `UserError` if it has runs of other settings.
    """
    make_folder(out.parent)
    if not out.exists():
        return {"sources": [source], "runs": []}
    results = results_in(out)
    for name in ("config", "size", "true_l0"):
        if results["sources"][0][name] != source[name]:
            raise UserError(f"{out} has runs of another {name}: give another --out")
    return results


def source(config: Config, truth: Truth) -> dict[str, Any]:
    """What the results file says about how it was made."""
    about = {
        "source": "synth",
        "command": f"python -m studies.synth --size {config.size}",
        "config": settings_of(config),
        "size": SIZES[config.size]._asdict(),
        "true_l0": truth.l0,
        "data": truth.about,
        "environment": environment(pick_device(config.device)),
    }
    return dict(json.loads(json.dumps(about)))


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that all runs of a results file share, in the form in which it has them."""
    settings = dataclasses.asdict(config)
    others = {name: settings[name] for name in settings if name not in ("out", "saes", "seeds")}
    return dict(without_paths(json.loads(json.dumps(others))))


def one_run(
    config: Config,
    name: str,
    seed: int,
    data: tuple[ActivationCache, Truth],
    on_checkpoint: Callable[[], object] | None,
) -> list[dict[str, Any]]:
    """Trains one SAE unless it is trained already; scores it as trained and refitted."""
    held_out, truth = data
    trained = train.run(training(config, truth, name, seed), on_checkpoint)
    folder, device = Path(trained["config"]["out"]), pick_device(config.device)
    about = {"source": "synth", "lr": lr_of(config), "seed": seed, "settings": SAES[name]}
    about |= {"steps": trained["config"]["n_steps"], "seconds": trained["seconds"]}
    runs = []
    for how, at in {"": folder, ", refit": folder / "refit"}.items():
        sae = SAE.load(at / f"{name}.safetensors").to(device).requires_grad_(False)
        runs.append({"sae": name + how, **about, **score(sae, held_out, truth)})
    return runs


def training(config: Config, truth: Truth, name: str, seed: int) -> TrainingConfig:
    """The settings of one training. Writes the members file of its SAE, which they name."""
    size, folder = SIZES[config.size], Path(config.runs) / f"{name}_seed{seed}"
    own = dict(SAES[name])
    if own.get("widths") == WIDTHS:
        own["widths"] = list(size.widths)
    make_folder(folder.parent)
    members = folder.with_suffix(".json")
    write_json(members, {"sae": [{"name": name, **own}]})
    return TrainingConfig(
        cache=str(Path(config.data) / "train"),
        members=str(members),
        n_latents=size.n_latents,
        target_l0s=(target_l0(config.size, truth),),
        n_steps=config.n_steps or size.n_steps,
        batch_size=size.batch_size,
        lr=lr_of(config),
        seed=seed,
        out=str(folder),
        refit=True,
        resume=True,
        checkpoint_seconds=60.0,
        device=config.device,
    )


def target_l0(size: str, truth: Truth) -> float:
    """The L0 that every SAE of this size is trained for."""
    return TARGET_L0S.get(size) or round(truth.l0, 2)


def lr_of(config: Config) -> float:
    """The learning rate of all SAEs."""
    return config.lr or LRS[config.size]


@torch.inference_mode()
def score(sae: Any, cache: ActivationCache, truth: Truth) -> dict[str, float]:
    """The scores of an SAE on all samples of `cache`; it needs `encode`, `decode` and `W_dec`."""
    device = sae.W_dec.device
    scores, moments = TruthScores(sae.W_dec, truth.directions.to(device)), Moments()
    error, fired = 0.0, torch.zeros(len(sae.W_dec), dtype=torch.int64, device=device)
    for batch in cache.sequential(BATCH_SIZE, device):
        acts = sae.encode(batch.acts)  # [n, n_latents]
        x_hat = sae.decode(acts)  # [n, d_model]
        is_active = truth.fired(moments.n, moments.n + len(acts)).to(device)  # [n, n_features]
        scores.add(acts, is_active, batch.acts, x_hat)
        moments.add(batch.acts)
        error += float(squared_norms(batch.acts - x_hat).sum())
        fired += (acts > 0).sum(0)
    return {
        **scores.summary(),
        "fvu": error / moments.variance,
        "l0": int(fired.sum()) / moments.n,
        "dead": int((fired == 0).sum()),
    }


def rows_of(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row of the printed table for each run."""
    return [
        [
            run["sae"],
            f"{run['lr']:g}",
            str(run["seed"]),
            *(f"{run[name]:.3f}" for name in ("f1", "mcc", "uniqueness")),
            f"{1 - run['fvu']:.3f}",
            f"{run['l0']:.2f}",
            str(run["dead"]),
        ]
        for run in runs
    ]


HEADERS = ["SAE", "lr", "seed", "F1", "MCC", "unique", "explained", "L0", "dead"]


def summary(*results: dict[str, Any]) -> str:
    """The table of several results: for each SAE, the mean and standard deviation over seeds.

    An SAE's row is that of the learning rate with the most seeds; among several, with the best F1.
    """
    runs = [run for one in results for run in one["runs"]]
    rows = []
    for name in dict.fromkeys(run["sae"] for run in runs):
        of_name = [run for run in runs if run["sae"] == name]
        by_lr = {run["lr"]: [r for r in of_name if r["lr"] == run["lr"]] for run in of_name}
        lr = max(by_lr, key=lambda lr: (len(by_lr[lr]), max(run["f1"] for run in by_lr[lr])))
        rows.append([name, f"{lr:g}", *_cells(by_lr[lr])])
    n_seeds = len({run["seed"] for run in runs})
    true_l0 = results[0]["sources"][0]["true_l0"]
    first = f"{n_seeds} seeds, true L0 {true_l0:.2f}"
    return table([first, "lr", *SHOWN, "variance explained", "L0", "dead"], rows)


SHOWN = {"F1": "f1", "precision": "precision", "recall": "recall", "MCC": "mcc"}
SHOWN |= {"uniqueness": "uniqueness", "shrinkage": "shrinkage"}


def _cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The figures of one SAE over its seeds."""
    scores = [spread([run[key] for run in runs], 3) for key in SHOWN.values()]
    explained = spread([1 - run["fvu"] for run in runs], 3)
    l0, dead = (float(np.mean([run[key] for run in runs])) for key in ("l0", "dead"))
    return [*scores, explained, f"{l0:.2f}", f"{dead:.1f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        print(table(HEADERS, rows_of(results["runs"])))


if __name__ == "__main__":
    main()
