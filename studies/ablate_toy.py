"""Measures what each fix of the original code does: trains the toy with one defect put back.

    python -m studies.ablate_toy --seeds 40

The defects that change what is trained, by name:

    moments     when latents are reordered, Adam's moments are not reordered with them (1)
    order       nor is the running mean square by which the latents are ordered (2)
    normalizer  the running mean norm of the inputs starts at 0 (3)
    all         all three, as in the original

Every variant trains the same seeds on the same batches. The defects concern the Matryoshka SAE; the
third concerns the vanilla SAE as well.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train_toy
from matryoshka.command_line import (
    inherited,
    main_guard,
    narrow_table,
    parse,
    require_positive,
    setting,
    table,
)
from matryoshka.controls import Schedule
from matryoshka.environment import environment, fix_kernels
from matryoshka.errors import UserError
from matryoshka.files import make_folder, one_writer, write_json
from matryoshka.kernels import Params
from matryoshka.toy_report import share
from matryoshka.trainer import Trainer

RESULTS = "ablation.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The seeds and variants, and where results go; other settings are train_toy.py's defaults."""

    seeds: int = setting(40, "how many seeds")
    seed: int = setting(0, "the first seed")
    n_steps: int = inherited(train_toy.Config, "n_steps")
    workers: int = setting(0, "processes that share the seeds; 0: one for each core")
    variants: str = setting("none,moments,order,normalizer,all", "variants, separated by commas")
    out: str = setting("runs/ablate_toy", "folder for ablation.json and a folder for each variant")
    overwrite: bool = setting(False, "replace runs with other settings in --out")


class MomentsStay(Trainer):
    """Defect 1: when a latent moves to another place, it gets the Adam moments of that place."""

    def step(self, x: Tensor) -> dict[str, Tensor]:
        old_order = self.order()
        metrics = super().step(x)
        new_order, state = self.order(), self.state_dict()
        for name in ("adam_mean", "adam_square"):
            parts = Params.of(state[name], self.d_model, self.n_latents)
            for moments, axis in ((parts.W_enc, 1), (parts.b_enc, 2), (parts.W_dec, 1)):
                shape = [len(moments), 1, 1]
                shape[axis] = -1
                in_place = moments.take_along_dim(old_order.view(shape), dim=axis)
                moments.scatter_(axis, new_order.view(shape).expand_as(moments), in_place)
        self.load_state_dict(state)
        return metrics


class OrderStays(Trainer):
    """Defect 2: the running mean square belongs to places, and does not move with the latents."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._at = torch.arange(self.n_latents).repeat(len(self.seeds), 1)  # [n_saes, n_latents]
        self._by_place = torch.zeros(self._at.shape)

    def order(self) -> Tensor:
        return self._at

    def step(self, x: Tensor) -> dict[str, Tensor]:
        metrics = super().step(x)
        mean_square = metrics["mean_square"].gather(1, self._at)
        self._by_place.lerp_(mean_square, 1 - self.config.order_decay)
        moves = self._by_place.sort(dim=1, descending=True, stable=True).indices
        self._at = self._at.gather(1, moves)
        return metrics


class NormalizerFromZero(Trainer):
    """Defect 3: the running mean norm starts at 0, so the first inputs are scaled 100 times off."""

    def _schedule(self, step: int) -> Schedule:
        return super()._schedule(step)._replace(batch_share=1 - self.config.norm_decay)


class Original(MomentsStay, OrderStays, NormalizerFromZero):
    """All three defects."""


VARIANTS: dict[str, type[Trainer]] = {
    "none": Trainer,
    "moments": MomentsStay,
    "order": OrderStays,
    "normalizer": NormalizerFromZero,
    "all": Original,
}


def run(config: Config) -> dict[str, Any]:
    """Trains every variant; writes ablation.json to `config.out` and returns what it holds."""
    require_positive(config, "seeds", "n_steps")
    names = config.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}: it is none of {', '.join(VARIANTS)}")
    out = Path(config.out)
    make_folder(out)
    with one_writer(out):
        train_toy.require_same_run(out / RESULTS, config)
        results = {
            "config": dataclasses.asdict(config),
            "environment": environment(torch.device("cpu")),
            "variants": {name: summarise(train_variant(config, name)["runs"]) for name in names},
        }
        write_json(out / RESULTS, results)
    return results


def train_variant(config: Config, name: str) -> dict[str, Any]:
    """Trains the seeds with the defect `name`; returns what `train_toy.run` does."""
    toy = train_toy.Config(
        seeds=config.seeds,
        seed=config.seed,
        n_steps=config.n_steps,
        workers=config.workers,
        out=str(Path(config.out) / name),
        overwrite=config.overwrite,
    )
    return train_toy.run(toy, VARIANTS[name])


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each SAE: how many seeds have how many clean features, and the median FVU and L0."""
    summary = {}
    for sae in dict.fromkeys(run["sae"] for run in runs):
        of_sae = [run for run in runs if run["sae"] == sae]
        clean, counts = np.unique([run["clean_features"] for run in of_sae], return_counts=True)
        summary[sae] = {
            "clean_features": dict(zip(map(str, clean), counts.tolist(), strict=True)),
            "fvu": float(np.median([run["fvu"] for run in of_sae])),
            "l0": float(np.median([run["l0"] for run in of_sae])),
        }
    return summary


HEADERS = ["defect put back", "20/20", "the others", "median FVU", "median L0", "vanilla at 11/20"]


def summary(results: dict[str, Any]) -> str:
    """A table with a row for each variant: how many seeds recover all features, FVU and L0."""
    return table(HEADERS, rows_of(results))


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """The rows of `summary`."""
    seeds, rows = results["config"]["seeds"], []
    for name, by_sae in results["variants"].items():
        matryoshka, vanilla = by_sae["matryoshka"], by_sae["vanilla"]
        counts = matryoshka["clean_features"].items()
        rows.append(
            [
                name,
                share(matryoshka["clean_features"].get("20", 0), seeds),
                ", ".join(f"{n} x {clean}" for clean, n in counts if clean != "20") or "-",
                f"{matryoshka['fvu']:.4f}",
                f"{matryoshka['l0']:.3f}",
                share(vanilla["clean_features"].get("11", 0), seeds),
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__ or "", argv)
        fix_kernels()
        print(narrow_table(HEADERS, rows_of(run(config))))


if __name__ == "__main__":
    main()
