"""A comparison of SAEs: its settings, its training runs and its results, wherever they run.

ROOT/caches/NAME.TOKENS/          a cache of activations, which comparisons share
ROOT/rows/, ROOT/hub/             downloads from the hub
ROOT/runs/NAME/                   a comparison: config.json, results.json, figures, and
ROOT/runs/NAME/KIND_seedN/        a training run with its evaluation
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from matryoshka.cache_config import CacheConfig
from matryoshka.cache_format import MANIFEST, read_record
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import inherited, parser_for, require_positive, setting, table
from matryoshka.errors import UserError
from matryoshka.evaluation_inputs import ModelSettings, load_model_of
from matryoshka.files import make_folder, write_json
from matryoshka.frontier import is_frontier, lines_of
from matryoshka.members import members_of
from matryoshka.saved_runs import METRICS, training_curves
from matryoshka.training_config import RECIPES, TrainingConfig, check_training
from matryoshka.volume_caches import copy_of, short_hash

NAME = r"[A-Za-z0-9][\w.-]{0,63}"


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """The settings of a comparison that are neither a cache's nor a training's."""

    validation_tokens: int = setting(500_000, "activations of the validation split to evaluate on")
    cache_batch_size: int = setting(64, "rows in a forward pass of the language model")
    seeds: int = setting(1, "how many seeds, from --seed on; each trains every SAE of --saes")
    name: str | None = setting(None, "the comparison's name; default: made from its settings")


# A checkpoint is written to a Volume and committed, which takes longer than a thousand steps.
CHECKPOINT_SECONDS = 60.0
# Settings without a flag of their own, because the comparison sets them: --tokens is the cache's,
# --batch-size the training's, and the paths follow from the comparison's name.
NOT_OF_CACHE = ("split", "batch_size")
NOT_OF_TRAINING = ("tokens", "cache", "validation_cache", "out", "resume", "device")
# Settings that do not change the resulting SAE, and may differ when a run is resumed.
NOT_SHAPING = ("seed", "checkpoint_every", "checkpoint_seconds", *NOT_OF_TRAINING)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The SAEs that are compared: each of `training.saes` with each seed, on one cache."""

    training: TrainingConfig
    cache: CacheConfig  # of the train split
    config: ComparisonConfig

    @property
    def validation(self) -> CacheConfig:
        """The settings of the cache that SAEs are evaluated on."""
        tokens = self.config.validation_tokens
        return dataclasses.replace(self.cache, split="validation", tokens=tokens)

    @functools.cached_property
    def shape(self) -> dict[str, Any]:
        """The settings that change the resulting SAE, with values as JSON returns them."""
        of_cache = json.loads(json.dumps(dataclasses.asdict(self.cache)))
        training = {k: v for k, v in self.training.as_json().items() if k not in NOT_SHAPING}
        cache = {k: v for k, v in of_cache.items() if k not in NOT_OF_CACHE}
        return cache | training | {"validation_tokens": self.config.validation_tokens}

    @property
    def name(self) -> str:
        """The folder in runs/: --name, or a readable name made from the settings in `shape`."""
        t = self.training
        l0 = "_".join(f"{target:g}" for target in t.targets)
        return self.config.name or (
            f"{self.cache.tokens}tokens-{t.n_latents}x{t.n_prefixes}-l0_{l0[:30]}-"
            f"{t.n_steps}steps-{short_hash(self.shape)}"
        )

    @property
    def kinds(self) -> list[tuple[str, tuple[str, ...]]]:
        """The jobs that run in parallel: each a name and its --saes. A container trains all target
        L0s of one kind in one pass, or all SAEs of a --members file."""
        if self.training.members is not None:
            return [("members", self.training.saes)]
        return [(sae, (sae,)) for sae in self.training.saes]

    @property
    def seeds(self) -> range:
        return range(self.training.seed, self.training.seed + self.config.seeds)

    def check(self) -> None:
        """Raises `UserError` if a setting is impossible, before anything is started."""
        require_positive(self.config, "validation_tokens", "seeds", "cache_batch_size")
        self.cache.check()
        check_training(self.training)
        members_of(self.training)
        batch_size, tokens = self.training.batch_size, self.cache.tokens
        if batch_size > tokens:
            raise UserError(f"--batch-size {batch_size} is more than --tokens {tokens}")
        if self.cache.layer < 0:
            raise UserError(f"--layer is {self.cache.layer}: it must not be negative")
        if not re.fullmatch(NAME, self.name, re.ASCII):
            raise UserError(
                f"--name must be at most 64 letters, digits, '.', '-' and '_', got {self.name}"
            )


# ------------------------------------------------------------------------------ the command line


def flags_of(training: type[TrainingConfig]) -> type:
    """One dataclass with every setting that has a flag: the training's, the cache's, and the
    comparison's own. They are collected from those classes, not listed again."""
    fields: dict[str, Any] = {}
    classes = ((ComparisonConfig, ()), (CacheConfig, NOT_OF_CACHE), (training, NOT_OF_TRAINING))
    for cls, left_out in classes:
        for field in dataclasses.fields(cls):
            if field.name not in left_out:
                changes = {}
                if field.name == "checkpoint_seconds":
                    changes = {"default": CHECKPOINT_SECONDS}
                copy = inherited(cls, field.name, **changes)
                fields[field.name] = (field.name, field.type, copy)
    made = dataclasses.make_dataclass("Flags", fields.values(), frozen=True, kw_only=True)
    return made


C = TypeVar("C")


def parse(
    words: Sequence[str], training: type[TrainingConfig], prog: str | None = None
) -> Comparison:
    """The comparison that a command line describes, after `check`.

    training: the class whose fields are the training's settings and defaults. Raises `UserError` if
    a flag is unknown or a setting is impossible.
    """
    parser = parser_for(flags_of(training), "Flags of the comparison:")
    parser.prog = prog or parser.prog
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parser.set_defaults(**RECIPES[parser.parse_args(words).recipe])
            values = vars(parser.parse_args(words))
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        raise UserError(stderr.getvalue().removeprefix("error: ").strip()) from None

    def made(cls: type[C], left_out: Sequence[str] = (), **given: Any) -> C:
        names = [f.name for f in dataclasses.fields(cls) if f.name not in left_out]  # type: ignore[arg-type]
        return cls(**{name: values[name] for name in names if name in values} | given)

    cache = made(CacheConfig, NOT_OF_CACHE, split="train", batch_size=values["cache_batch_size"])
    trained = made(training, NOT_OF_TRAINING, resume=True)
    comparison = Comparison(trained, cache, made(ComparisonConfig))
    comparison.check()
    return comparison


# ------------------------------------------------------------------------------------- its parts


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One training run: how its SAEs are trained, and the settings of `evaluate.py`."""

    config: TrainingConfig
    evaluation: dict[str, Any]

    @property
    def thing(self) -> str:
        """What only one job may work on at a time: its folder."""
        return self.config.out

    def __str__(self) -> str:
        return f"training {Path(self.config.out).name.replace('_seed', ', seed ')}"


def how_to_evaluate(comparison: Comparison, validation: Path, root: Path) -> dict[str, Any]:
    """The settings of `evaluate.py` for SAEs of this comparison.

    Loads the language model and raises `UserError` if it is not the cache's, because otherwise the
    evaluation would find that only after all training.
    """
    of_model = ("tokenizer", "trust_remote_code")  # the cache records the model and its revision
    settings = {name: getattr(comparison.cache, name) for name in of_model}
    load_model_of(ActivationCache(validation), ModelSettings(**settings), torch.device("cpu"))
    rows = copy_of(comparison.validation, root)
    return {"cache": str(validation), "dataset": str(rows) if rows.exists() else None, **settings}


def train_jobs(
    comparison: Comparison, run: Path, cache: Path, evaluation: dict[str, Any]
) -> list[TrainJob]:
    """A job for each kind and seed of the comparison, in the folder `run`/KIND_seedN."""
    tokens = comparison.cache.tokens
    is_larger = tokens < read_record(cache / MANIFEST).n_tokens
    return [
        TrainJob(
            dataclasses.replace(
                comparison.training,
                cache=str(cache),
                tokens=tokens if is_larger else 0,
                saes=saes,
                seed=seed,
                out=str(run / f"{kind}_seed{seed}"),
            ),
            evaluation,
        )
        for seed in comparison.seeds
        for kind, saes in comparison.kinds
    ]


def require_same_shape(run: Path, shape: Mapping[str, Any]) -> None:
    """Raises `UserError` if the folder `run` is of a comparison with another `shape`."""
    file = run / "config.json"
    if not file.exists():
        return
    try:
        before_all = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): choose another --name") from None
    for key, before in before_all.items():
        if key not in shape or shape[key] != before:
            now = shape.get(key, "a version that has no such setting")
            raise UserError(
                f"--name {run.name} was a comparison with --{key.replace('_', '-')} {before}, "
                f"not {now}: choose another --name"
            )


def claim(run: Path, shape: Mapping[str, Any]) -> None:
    """Writes `shape` to the folder `run`. Raises `UserError` if it is of another comparison."""
    require_same_shape(run, shape)
    make_folder(run, "--volume")
    write_json(run / "config.json", shape)


# ----------------------------------------------------------------------------------- its results


def by_sae(done: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each SAE's scores, one entry for each seed. done: what the training jobs returned."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in done:
        for scores in result["evaluation"]["runs"]:
            found.setdefault(scores["sae"], []).append(scores)
    return found


def draw(run: Path, comparison: Comparison, done: Sequence[Mapping[str, Any]]) -> None:
    """Draws the training curves of all seeds; FVU by prefix and densities of the first seed; and
    the frontier of all seeds, if there are several target L0s."""
    from matryoshka import frontier_plot, plots  # only here: matplotlib takes a second

    curves: dict[str, dict[str, list[list[float]]]] = {}  # a metric's curve for each seed
    for result in done:
        dropped = result["training"].get("dropped", {})
        steps, of_run = training_curves(Path(result["out"]) / METRICS, dropped)
        for sae, by_metric in of_run.items():
            for what, values in by_metric.items():
                curves.setdefault(sae, {}).setdefault(what, []).append(values)
    plots.training_curves(
        run / "training_curves.png", steps, curves, comparison.training.targets[0]
    )
    first = {sae: scores[0] for sae, scores in by_sae(done).items()}
    by_prefix = {sae: scores["fvu_by_prefix"] for sae, scores in first.items()}
    plots.fvu_by_prefix(run / "fvu_by_prefix.png", by_prefix)
    densities = {sae: [scores["density_histogram"]] for sae, scores in first.items()}
    plots.density_histograms(run / "density_histograms.png", densities)
    every = [scores for of_seeds in by_sae(done).values() for scores in of_seeds]
    if is_frontier(every):
        frontier_plot.draw(run / "frontier.png", lines_of(every))


def report(comparison: Comparison, results: Mapping[str, Any]) -> str:
    """The write-up's table: a row for each SAE, with means over seeds."""
    rows = []
    for sae, of_seeds in by_sae(results["runs"]).items():
        fvu, l0, dead = (np.mean([e[k] for e in of_seeds]) for k in ("fvu", "l0", "dead_share"))
        rows.append([sae, f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}"])
    n = comparison.config.seeds
    title = f"{Path(comparison.cache.dataset).name}, {n} seed{'s' * (n > 1)}, held-out tokens"
    dropped = [
        f"\ndropped, seed {result['seed']}: {why}"
        for result in results["runs"]
        for why in result["training"].get("dropped", {}).values()
    ]
    return table([title, "FVU", "L0", "dead"], rows) + "".join(dropped)
