"""SAEs on a synthetic model whose features are known, scored by how many of them they find.

    python -m studies.synth --size mini --data cache/synth/mini --out results/synth/mini.json

Trains the kinds of SAE below from the samples that studies/synth_data.py drew, on several seeds, as
many latents as SynthSAEBench has for its size, at an L0 equal to the number of features that fire;
scores each on samples held out. studies/synth_peers.py does the same with SAELens's own. Trainings
that are done are found, and not done again.

Recipes were chosen on seed 100, which the table does not show; docs/synth.md has what was tried.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
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
from studies.synth_data import SIZES, SizeName, Truth, read_truth

# By the name of an SAE, its own settings; "widths" are the size's own where they are WIDTHS.
WIDTHS = "the size's"
SAES: dict[str, dict[str, Any]] = {
    "vanilla_relu": {"kind": "vanilla", "activation": "relu"},
    "matryoshka_relu": {"activation": "relu"},
    "vanilla_batchtopk": {"kind": "vanilla", "activation": "batchtopk"},
    "sampled_batchtopk": {"activation": "batchtopk"},
    "matryoshka_batchtopk": {"activation": "batchtopk", "widths": WIDTHS},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, on what, and where it is written."""

    size: SizeName = setting("mini", "the synthetic model: a key of SIZES in synth_data.py")
    data: str = setting("cache/synth/mini", "folder that studies.synth_data wrote")
    saes: tuple[str, ...] = setting(tuple(SAES), "which SAEs, by name")
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of the start and of the order of batches")
    lr: float = setting(0.0, "learning rate; 0: the size's own, the first of its lrs")
    n_steps: int = setting(0, "steps; 0: the size's own number")
    runs: str = setting("runs/synth/mini", "folder for the SAEs")
    out: str = setting("runs/synth/mini/results.json", "file to write")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


def run(config: Config, on_checkpoint: Callable[[], object] | None = None) -> dict[str, Any]:
    """Trains what is not trained yet, and scores all of it. Raises `UserError`.

    on_checkpoint: called after each checkpoint of a training.
    """
    for name in config.saes:
        if name not in SAES:
            raise UserError(f"--saes {name} is none of {', '.join(SAES)}")
    device, data = pick_device(config.device), Path(config.data)
    truth, held_out = read_truth(data), ActivationCache(data / "held_out")
    if truth.about["size"] != config.size:
        raise UserError(f"{data} is of size {truth.about['size']}, not {config.size}")
    make_folder(Path(config.out).parent)
    make_folder(Path(config.runs))
    runs: list[dict[str, Any]] = []
    for seed in config.seeds:
        trained = train.run(training(config, truth, seed), on_checkpoint)
        for one in trained["runs"]:
            sae = SAE.load(Path(config.runs) / f"seed{seed}" / f"{one['sae']}.safetensors")
            figures = score(sae.to(device).requires_grad_(False), held_out, truth)
            about = {"sae": one["sae"], "lr": lr_of(config), "seed": seed}
            runs.append({"source": "synth", **about, **figures, "seconds": trained["seconds"]})
        results = {"sources": [source(config, truth, device)], "runs": runs}
        write_json(Path(config.out), results)
    return results


def training(config: Config, truth: Truth, seed: int) -> TrainingConfig:
    """The settings of all SAEs of a seed; writes the file that says what each of them is."""
    size, members = SIZES[config.size], Path(config.runs) / "members.json"
    tables = []
    for name in config.saes:
        own = dict(SAES[name])
        if own.get("widths") == WIDTHS:
            own["widths"] = list(size.widths)
        tables.append({"name": name, **own})
    members.write_text(json.dumps({"sae": tables}, indent=2))
    return TrainingConfig(
        cache=str(Path(config.data) / "train"),
        members=str(members),
        n_latents=size.n_latents,
        target_l0s=(round(truth.l0, 2),),
        n_steps=config.n_steps or size.n_steps,
        batch_size=size.batch_size,
        lr=lr_of(config),
        checkpoint_seconds=60.0,
        seed=seed,
        out=str(Path(config.runs) / f"seed{seed}"),
        resume=True,
        device=config.device,
    )


def lr_of(config: Config) -> float:
    """The learning rate of all SAEs."""
    return config.lr or SIZES[config.size].lrs[0]


@torch.inference_mode()
def score(sae: Any, cache: ActivationCache, truth: Truth) -> dict[str, float]:
    """The scores on all samples of `cache` of any SAE with `encode`, `decode` and `W_dec`."""
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


def source(config: Config, truth: Truth, device: torch.device) -> dict[str, Any]:
    """What the kept file says of how it was made."""
    size = SIZES[config.size]
    return {
        "source": "synth",
        "command": f"python -m studies.synth --size {config.size}",
        "config": without_paths(json.loads(json.dumps(dataclasses.asdict(config)))),
        "saes": {name: SAES[name] for name in config.saes},
        "size": size._asdict(),
        "true_l0": truth.l0,
        "data": truth.about,
        "environment": environment(device),
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
    """The table of several results files: mean and spread over seeds, an SAE a row, at the learning
    rate that it was trained at on all seeds."""
    runs = [run for one in results for run in one["runs"]]
    rows = []
    for name in dict.fromkeys(run["sae"] for run in runs):
        of_name = [run for run in runs if run["sae"] == name]
        lrs = [run["lr"] for run in of_name]
        best = max(set(lrs), key=lrs.count)
        rows.append([name, f"{best:g}", *_cells([run for run in of_name if run["lr"] == best])])
    n_seeds = len({run["seed"] for run in runs})
    true_l0 = results[0]["sources"][0]["true_l0"]
    first = f"{n_seeds} seeds, true L0 {true_l0:.2f}"
    return table([first, "lr", *SHOWN, "variance explained", "L0", "dead"], rows)


SHOWN = {"F1": "f1", "precision": "precision", "recall": "recall", "MCC": "mcc"}
SHOWN |= {"uniqueness": "uniqueness", "shrinkage": "shrinkage"}


def _cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The figures of one SAE over its seeds."""
    scores = [_spread([run[key] for run in runs]) for key in SHOWN.values()]
    explained = _spread([1 - run["fvu"] for run in runs])
    l0, dead = (float(np.mean([run[key] for run in runs])) for key in ("l0", "dead"))
    return [*scores, explained, f"{l0:.2f}", f"{dead:.1f}"]


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        print(table(HEADERS, rows_of(results["runs"])))


if __name__ == "__main__":
    main()
