"""Scores the SAEs of a training run on activations that they were not trained on.

    python cache_activations.py --split validation --out cache/validation
    python evaluate.py --run runs/tinystories --cache cache/validation

Every NAME.safetensors in the run's folder is scored: how it reconstructs, what the language model
loses by its reconstructions, how alike its latents are, and how far concepts are absorbed.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.absorption import ConceptCounts, absorption, halves, mean_absorption
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import (
    main_guard,
    parse,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
)
from matryoshka.concepts import TINY_MODEL_CONCEPTS, load_concepts, membership
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.evaluation_tables import concept_table, summary
from matryoshka.files import make_folder, write_json
from matryoshka.loss_recovered import ROWS_AT_ONCE, cached_rows, splice_losses
from matryoshka.metrics import highest_cosines
from matryoshka.reconstruction import (
    BATCH_SIZE,
    Statistics,
    norm_spread,
    norms_of,
    outliers_among,
    reconstruct,
)
from matryoshka.saved_runs import (
    METRICS,
    check_cache,
    is_held_out,
    load_saes,
    training_curves,
    training_results,
)
from matryoshka.tiny_model import TinyModel
from sae import SAE

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
EVALUATION = "evaluation.json"
FIGURES = ("fvu_by_prefix.png", "density_histograms.png", "training_curves.png")
OF_TEXT = ("model", "weights_hash", "layer", "dataset", "split", "keep_begin")  # of a recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """What is scored, and on what."""

    run: str = setting("runs/tinystories", "folder of a training run, with its SAEs")
    cache: str = setting("cache/validation", "cache of a split that was not trained on")
    model: str | None = setting(None, "the language model; default: the one the cache was made of")
    dataset: str | None = setting(None, "its token ids; default: those the cache was made of")
    n_tokens: int = setting(100_000, "tokens that the cross-entropy is measured on, at most")
    concepts: str | None = setting(None, "sets of token ids; default: matryoshka/concepts.json")
    min_precision: float = setting(
        0.8, "of a latent that may fire in place of a concept's detector, see choose_detectors"
    )
    seed: int = setting(0, "which rows choose a concept's latents, and which are scored")
    out: str | None = setting(None, "folder for evaluation.json and the figures; default: --run")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.run)

    @property
    def out_folder(self) -> Path:
        return Path(self.out or self.run)


class Inputs(NamedTuple):
    """What is read, checked."""

    saes: dict[str, SAE]
    trained: dict[str, Any]  # results.json, or {}
    curves: tuple[Any, Any] | None  # of metrics.jsonl, where it is the run's
    cache: ActivationCache
    model: TinyModel
    concepts: dict[str, list[int]]
    dataset: str


def read_inputs(config: Config, device: torch.device) -> Inputs:
    """Everything that can be wrong with the input is found here, before anything is computed.

    Raises `UserError`.
    """
    require_positive(config, "n_tokens")
    require_not_negative(config, "seed")
    if not 0 <= config.min_precision <= 1:
        raise UserError(f"--min-precision must be between 0 and 1, got {config.min_precision}")
    concepts = load_concepts(Path(config.concepts or TINY_MODEL_CONCEPTS))
    trained = training_results(config.folder)
    saes = load_saes(config.folder, device, trained)
    cache = ActivationCache(config.cache)
    require_text(cache)
    check_cache(cache, saes, trained)
    model = TinyModel.from_pretrained(config.model or cache.recipe["model"], device=device)
    cache.require(weights_hash=model.weights_hash)
    membership(concepts, model.d_vocab)
    dataset = config.dataset or cache.recipe["dataset"]
    next(cached_rows(cache, dataset, 1, model.d_vocab))
    metrics = config.folder / METRICS
    curves = training_curves(metrics) if trained and metrics.exists() else None
    make_folder(config.out_folder)
    for path in (config.out_folder / name for name in (EVALUATION, *FIGURES)):
        if path.is_dir():
            raise UserError(f"{path} is a folder; the results need that name: give another --out")
    cache.verify()
    return Inputs(saes, trained, curves, cache, model, concepts, dataset)


def require_text(cache: ActivationCache) -> None:
    """Raises `UserError` where the cache was not made of a language model and text."""
    missing = [key for key in OF_TEXT if key not in cache.recipe]
    if missing:
        raise UserError(
            f"{cache.folder} was not made of a language model and its tokens: its recipe has no "
            f"{', '.join(missing)}"
        )


@torch.inference_mode()
def run(
    config: Config, show: Callable[[dict[str, Any]], object] = lambda results: None
) -> dict[str, Any]:
    """Scores the SAEs of `config.run`; writes evaluation.json and the figures to `config.out`.

    Returns what evaluation.json holds; calls `show` with it first, so that a full disk does not
    lose it. Raises `UserError` where the input is wrong or the results cannot be written.
    """
    device = pick_device(config.device)
    inputs = read_inputs(config, device)
    results = score(config, inputs, device)
    show(results)
    write_json(config.out_folder / EVALUATION, results)
    draw(results, inputs, config.out_folder)
    return results


def score(config: Config, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """What evaluation.json holds. Raises `UserError` where the activations leave it undefined."""
    started, cache, saes = time.perf_counter(), inputs.cache, inputs.saes
    members = membership(inputs.concepts, inputs.model.d_vocab).to(device)
    first_half = halves(cache.manifest.n_rows, config.seed).to(device)
    statistics = [
        Statistics(sae, ConceptCounts(sae.n_latents, members, first_half)) for sae in saes.values()
    ]
    norms = norms_of(cache, device)
    every, inliers = reconstruct(statistics, cache, outliers_among(norms), device)
    counted = [(one.sae, one.concepts) for one in statistics]
    absorbed = absorption(counted, cache, list(inputs.concepts), config.min_precision, BATCH_SIZE)
    losses = cross_entropy(config, inputs, every.mean)
    return {
        "config": dataclasses.asdict(config),
        "environment": environment(device),
        "cache": {
            "make": cache.recipe,
            "n_tokens": cache.n_tokens,
            "held_out": is_held_out(cache, saes, inputs.trained),
        },
        "norms": norm_spread(norms),
        "seconds": round(time.perf_counter() - started, 2),
        "cross_entropy": {key: losses[key] for key in ("clean", "mean", "predictions", "replaced")},
        "runs": [
            {
                "sae": name,
                **statistics[i].summary(every, inliers),
                "cross_entropy": losses["saes"][i],
                "loss_recovered": losses["recovered"][i],
                **cosine_summary(sae),
                "absorption": mean_absorption(absorbed[i]),
                "concepts": absorbed[i],
            }
            for i, (name, sae) in enumerate(saes.items())
        ],
    }


def cross_entropy(config: Config, inputs: Inputs, mean: Tensor) -> dict[str, Any]:
    """`splice_losses` on the first rows of the cache's dataset; `mean` is that of the cache."""
    cache, model = inputs.cache, inputs.model
    share = min(1, config.n_tokens / cache.n_tokens)
    rows = tqdm(
        cached_rows(cache, inputs.dataset, config.n_tokens, model.d_vocab),
        total=math.ceil(cache.manifest.n_rows * share / ROWS_AT_ONCE),
        unit=" batches",
        desc="cross-entropy",
    )
    saes, recipe = list(inputs.saes.values()), cache.recipe
    return splice_losses(model, saes, mean, rows, recipe["layer"], recipe["keep_begin"])


def cosine_summary(sae: SAE) -> dict[str, Any]:
    """The mean and the quantiles over latents of `highest_cosines`."""
    cosines = highest_cosines(sae.W_dec)
    quantiles = cosines.quantile(cosines.new_tensor(QUANTILES)).tolist()
    return {
        "mean_highest_cosine": float(cosines.mean()),
        "highest_cosine_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def draw(results: Mapping[str, Any], inputs: Inputs, out: Path) -> None:
    """FVU by prefix, how often latents fire, and how training went, where its curves are there."""
    from matryoshka import plots  # only here: matplotlib takes a second

    runs = {run["sae"]: run for run in results["runs"]}
    by_prefix, densities, training = (out / name for name in FIGURES)
    plots.fvu_by_prefix(by_prefix, {name: run["fvu_by_prefix"] for name, run in runs.items()})
    plots.density_histograms(
        densities, {name: run["density_histogram"] for name, run in runs.items()}
    )
    if inputs.curves:
        plots.training_curves(training, *inputs.curves, inputs.trained["config"]["target_l0"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__, argv)
        run(config, lambda results: print(f"{concept_table(results)}\n\n{summary(results)}"))


if __name__ == "__main__":
    main()
