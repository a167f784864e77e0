"""Scores the SAEs of a training run on activations that they were not trained on.

    python cache_activations.py --split validation --out cache/validation
    python evaluate.py --run runs/tinystories --cache cache/validation

Scores every NAME.safetensors in the run's folder: how well it reconstructs, how much the language
model's loss rises when activations are replaced by reconstructions, how similar the latents are,
and how much absorption of concepts there is.
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
from matryoshka.cache_config import rows_of
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import (
    main_guard,
    parse,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
)
from matryoshka.concepts import CONCEPTS, Resolved, load_concepts, membership
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.evaluation_inputs import (
    ModelSettings,
    concepts_of,
    load_model_of,
    vocabulary_of,
)
from matryoshka.evaluation_tables import report
from matryoshka.files import make_folder, write_json
from matryoshka.frontier import is_frontier, lines_of
from matryoshka.language_models import LanguageModel
from matryoshka.loss_recovered import cached_rows, rows_at_once, splice_losses
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
from matryoshka.sources import Rows
from sae import SAE

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
EVALUATION = "evaluation.json"
FIGURES = ("fvu_by_prefix.png", "density_histograms.png", "training_curves.png", "frontier.png")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which SAEs are scored, and on which activations."""

    run: str = setting("runs/tinystories", "folder of a training run, with its SAEs")
    cache: str = setting("cache/validation", "cache of a split that was not trained on")
    model: str | None = setting(
        None,
        "the language model; none: leave out the scores that need one; default: the cache's model",
    )
    model_revision: str | None = setting(
        None, "branch, tag or commit of the model; default: the cache's"
    )
    trust_remote_code: bool = setting(False, "run the Python code that comes with the model")
    dataset: str | None = setting(
        None, "text or token ids that the model reads; default: the cache's dataset"
    )
    tokenizer: str | None = setting(
        None, "tokenizer that the concepts' words are looked up in; default: the model's own"
    )
    n_tokens: int = setting(100_000, "most tokens to measure the cross-entropy on")
    concepts: str | None = setting(
        None, "JSON file of concepts, sets of words or token ids; default: matryoshka/concepts.json"
    )
    min_precision: float = setting(
        0.8,
        "precision that a latent needs to count as more specific than a concept's detector (see "
        "choose_detectors in matryoshka/absorption.py)",
    )
    seed: int = setting(
        0, "seed of the split of the rows: one half chooses detectors, the other is scored"
    )
    out: str | None = setting(None, "folder for evaluation.json and the figures; default: --run")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run)

    @property
    def out_folder(self) -> Path:
        return Path(self.out or self.run)

    @property
    def model_settings(self) -> ModelSettings:
        """The settings that concern the language model and its text."""
        return ModelSettings(**{name: getattr(self, name) for name in ModelSettings._fields})


class Inputs(NamedTuple):
    """Everything that is read, after it was checked."""

    saes: dict[str, SAE]
    trained: dict[str, Any]  # results.json, or {}
    curves: tuple[Any, Any] | None  # from metrics.jsonl, if it is there
    cache: ActivationCache
    model: LanguageModel | None
    rows: Rows | None  # the rows of token ids that the cache was made from
    concepts: Resolved
    d_vocab: int
    left_out: dict[str, str]  # for each result that is left out, the reason


def read_inputs(config: Config, device: torch.device) -> Inputs:
    """Reads and checks all input, so that errors are found before anything is computed.

    Raises `UserError`.
    """
    require_positive(config, "n_tokens")
    require_not_negative(config, "seed")
    if not 0 <= config.min_precision <= 1:
        raise UserError(f"--min-precision must be between 0 and 1, got {config.min_precision}")
    named = load_concepts(Path(config.concepts or CONCEPTS))
    trained = training_results(config.folder)
    saes = load_saes(config.folder, device, trained)
    cache = ActivationCache(config.cache)
    check_cache(cache, saes, trained)
    model, no_loss = load_model_of(cache, config.model_settings, device)
    concepts, no_absorption = concepts_of(named, cache, model, config.model_settings)
    d_vocab = model.d_vocab if model else vocabulary_of(cache, concepts)
    membership(concepts.ids, d_vocab)
    rows = rows_of(cache.recipe, model, config.dataset) if model else None
    if model and not model.has_head:
        no_loss = f"{cache.recipe['model']} has no head that predicts next tokens"
    elif rows:
        next(cached_rows(cache, rows, 1))
    metrics = config.folder / METRICS
    dropped = trained.get("dropped", {})
    curves = training_curves(metrics, dropped) if trained and metrics.exists() else None
    make_folder(config.out_folder)
    for path in (config.out_folder / name for name in (EVALUATION, *FIGURES)):
        if path.is_dir():
            raise UserError(f"{path} is a folder; the results need that name: give another --out")
    cache.verify()
    reasons = {"cross_entropy": no_loss, "absorption": no_absorption}
    left_out = {what: why for what, why in reasons.items() if why}
    return Inputs(saes, trained, curves, cache, model, rows, concepts, d_vocab, left_out)


@torch.inference_mode()
def run(
    config: Config, show: Callable[[dict[str, Any]], object] = lambda results: None
) -> dict[str, Any]:
    """Scores the SAEs of `config.run`; writes evaluation.json and the figures to `config.out`.

    Returns what evaluation.json holds. Calls `show` with it before writing, so that it is not lost
    if the disk is full. Raises `UserError` if the input is wrong or the results cannot be written.
    """
    device = pick_device(config.device)
    inputs = read_inputs(config, device)
    results = score(config, inputs, device)
    show(results)
    write_json(config.out_folder / EVALUATION, results)
    draw(results, inputs, config.out_folder)
    return results


def score(config: Config, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """What evaluation.json holds. Raises `UserError` if a score is undefined here."""
    started, cache, saes = time.perf_counter(), inputs.cache, inputs.saes
    members = membership(inputs.concepts.ids, inputs.d_vocab).to(device)
    first_half = halves(cache.manifest.n_rows, config.seed).to(device)
    statistics = [
        Statistics(sae, ConceptCounts(sae.n_latents, members, first_half)) for sae in saes.values()
    ]
    norms = norms_of(cache, device)
    every, inliers = reconstruct(statistics, cache, outliers_among(norms), device)
    counted = [(one.sae, one.concepts) for one in statistics]
    names = list(inputs.concepts.ids)
    absorbed = absorption(counted, cache, names, config.min_precision, BATCH_SIZE)
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
        "left_out": inputs.left_out,
        "concepts": concept_counts(inputs.concepts),
        "cross_entropy": losses
        and {key: losses[key] for key in ("clean", "mean", "predictions", "replaced")},
        "runs": [
            {
                "sae": name,
                **description(sae),
                **statistics[i].summary(every, inliers),
                "cross_entropy": losses and losses["saes"][i],
                "loss_recovered": losses and losses["recovered"][i],
                **cosine_summary(sae),
                "absorption": mean_absorption(absorbed[i]),
                "concepts": absorbed[i],
            }
            for i, (name, sae) in enumerate(saes.items())
        ],
    }


def cross_entropy(config: Config, inputs: Inputs, mean: Tensor) -> dict[str, Any] | None:
    """`splice_losses` on the cache's first rows, or None if no model predicts next tokens.

    mean: [d_model], the mean of the cache's activations.
    """
    cache, model, rows = inputs.cache, inputs.model, inputs.rows
    if model is None or rows is None or not model.has_head:
        return None
    first = next(cached_rows(cache, rows, 1))
    at_once = rows_at_once(first.tok_ids.shape[1], model.d_vocab)
    share = min(1, config.n_tokens / cache.n_tokens)
    blocks = tqdm(
        cached_rows(cache, rows, config.n_tokens, at_once),
        total=math.ceil(cache.manifest.n_rows * share / at_once),
        unit=" batches",
        desc="cross-entropy",
    )
    site = cache.recipe.get("site", "resid_pre")
    return splice_losses(
        model, list(inputs.saes.values()), mean, blocks, cache.recipe["layer"], site
    )


def concept_counts(concepts: Resolved) -> dict[str, int]:
    """How many of the concepts' words were looked up, and how many of them are not one token."""
    return {"words": concepts.n_words, "words_left_out": concepts.n_left_out}


def description(sae: SAE) -> dict[str, Any]:
    """The entries of an SAE's file that are needed to compare its scores with others'."""
    names = ("kind", "target_l0", "seed", "widths")
    return {
        "activation": sae.activation,
        "n_latents": sae.n_latents,
        **{name: sae.about[name] for name in names if name in sae.about},
    }


def cosine_summary(sae: SAE) -> dict[str, Any]:
    """The mean and the quantiles over latents of `highest_cosines`."""
    cosines = highest_cosines(sae.W_dec)
    quantiles = cosines.quantile(cosines.new_tensor(QUANTILES)).tolist()
    return {
        "mean_highest_cosine": float(cosines.mean()),
        "highest_cosine_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def draw(results: Mapping[str, Any], inputs: Inputs, out: Path) -> None:
    """Draws FVU by prefix and how often latents fire; the training curves, if there are any; and
    the frontier, if the SAEs have several target L0s."""
    from matryoshka import frontier_plot, plots  # only here: matplotlib takes a second

    runs = {run["sae"]: run for run in results["runs"]}
    by_prefix, densities, training, frontier = (out / name for name in FIGURES)
    plots.fvu_by_prefix(by_prefix, {name: run["fvu_by_prefix"] for name, run in runs.items()})
    plots.density_histograms(
        densities, {name: run["density_histogram"] for name, run in runs.items()}
    )
    if inputs.curves:
        plots.training_curves(training, *inputs.curves, inputs.trained["config"]["target_l0"])
    if is_frontier(results["runs"]):
        frontier_plot.draw(frontier, lines_of(results["runs"]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__, argv)
        run(config, lambda results: print(report(results)))


if __name__ == "__main__":
    main()
