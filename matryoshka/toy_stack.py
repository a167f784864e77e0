"""A stack of the toy's seeds: SAEs of every kind for each seed, trained side by side and scored."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hierarchy import forest, pairs_of, stands_for, tree_edges
from matryoshka.kinds import config_of
from matryoshka.metrics import (
    absorption_rate,
    best_cosine,
    clean_features,
    dead_share,
    decoder_cosines,
    fvu,
    l0,
    match_latents,
)
from matryoshka.refit import refit_both, refit_decoder
from matryoshka.toy_progress import Progress
from matryoshka.trainer import Trainer
from matryoshka.truth_scores import TruthScores
from sae import SAE

if TYPE_CHECKING:  # scripts import this module, which needs them for its annotations alone
    from toy_model import ToyData
    from train_toy import Config

THRESHOLDS = (0.9, 0.95, 0.99)  # cosines at which features are counted as clean
FEATURE_KINDS = ("parent", "child", "rare")
N_RECORDS = 200  # points of the training curves
N_REFERENCE = 1_000  # held-out samples that the curves are measured on
# What an SAE's file says of how it was trained, beside its name, seed and tree.
TOLD = ("n_prefixes", "prefixes", "sparsity", "target_l0", "lr", "n_steps", "batch_size")
STEPS_A_REPORT = 100  # between looks at whether to stop

# What follows the name of an SAE that was refitted -> the refit of it on x [n, d_model].
REFITS: dict[str, Callable[[SAE, Tensor], SAE]] = {
    ", refit": lambda sae, x: refit_decoder(sae, [x]),
    ", refit both": lambda sae, x: refit_both(sae, lambda: [x]),
}
FOLLOWED_REFIT = ", refit"  # that whose worst cosine is recorded in training


class Member(NamedTuple):
    """An SAE of a stack: its kind, and the seed of its data, its start and its prefixes."""

    name: str
    seed: int


class StackResult(NamedTuple):
    """What training a stack of seeds gives: for each SAE, the refitted ones included, an entry of
    results.json and the SAE; for those trained, curves [n_records, n_trained] by what they show."""

    runs: list[dict[str, Any]]
    saes: list[SAE]
    curves: dict[str, np.ndarray]

    def sae(self, name: str) -> SAE:
        """The SAE of that name of the first seed."""
        return self.saes[[run["sae"] for run in self.runs].index(name)]


def train_stack(
    config: "Config",
    data: "ToyData",
    seeds: Sequence[int],
    progress: Progress,
    trainer_class: type[Trainer] = Trainer,
) -> StackResult:
    """Trains SAEs of all kinds and `seeds` together, and scores them.

    Raises `UserError` where the samples that they are scored on are all the same, where training
    diverges, or where no refit is possible.
    """
    for seed in seeds:
        for n in (config.n_eval, N_REFERENCE):
            _require_variance(data.held_out(seed, n)[1], seed)
    # kind by kind, and within each seed by seed: as `ToyData.batches` repeats the seeds' samples
    members = [Member(name, seed) for name in config.saes for seed in seeds]
    device = torch.device(config.device)
    trainer = trainer_class(
        [_untrained(config, member).to(device) for member in members],
        [config_of(name, config) for name, _ in members],
        [seed for _, seed in members],
    )
    curves = take_steps(trainer, config, data, members, progress)

    trained = {member: sae.to("cpu") for member, sae in zip(members, trainer.saes, strict=True)}
    saes = trained | (refits_of(trained, config, data) if config.refit else {})
    for member, sae in saes.items():
        sae.about["name"] = member.name
    runs = [score(config, data, sae, member) for member, sae in saes.items()]
    add_steps_to(runs, members, curves)
    return StackResult(runs, list(saes.values()), curves)


def refits_of(
    trained: Mapping[Member, SAE], config: "Config", data: "ToyData"
) -> dict[Member, SAE]:
    """The SAEs refitted, in every way of REFITS, on samples that they were not trained on."""
    seeds = dict.fromkeys(seed for _, seed in trained)
    x = {seed: data.for_refit(seed, config.n_eval) for seed in seeds}
    return {
        Member(name + how, seed): _refitted(how, sae, x[seed])
        for how in REFITS
        for (name, seed), sae in trained.items()
    }


def _untrained(config: "Config", member: Member) -> SAE:
    """A new SAE, whose file will say how it was trained; no path is in it."""
    sae = SAE(config.d_model, config.n_latents, member.seed)
    settings = dataclasses.asdict(config_of(member.name, config))
    sae.about = {"seed": member.seed, "dataset": Path(config.tree).name}
    sae.about |= {name: settings[name] for name in TOLD}
    if settings["unhedged"]:
        sae.about["unhedged"] = settings["unhedged"]
    if settings["widths"]:
        sae.about["widths"] = config_of(member.name, config).widths_of(config.n_latents)
        sae.about["width_weights"] = settings["width_weights"]
    return sae


def _require_variance(x: Tensor, seed: int) -> None:
    if (x == x[0]).all():
        raise UserError(
            f"the {len(x)} held-out samples of seed {seed} are all the same, so that FVU is not "
            "defined: --n-eval must be larger, or the tree's features active more often"
        )


def _refitted(how: str, sae: SAE, x: Tensor) -> SAE:
    try:
        return REFITS[how](sae, x)
    except ValueError as error:
        raise UserError(f"no refit is possible ({error}): --no-refit does without") from None


# --------------------------------------------------------------------------------------- training


def take_steps(
    trainer: Trainer,
    config: "Config",
    data: "ToyData",
    members: Sequence[Member],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Trains; returns the curves: [n_records, n_saes] each, and "step" [n_records]."""
    device = torch.device(config.device)
    seeds = list(dict.fromkeys(seed for _, seed in members))
    batches = data.batches(seeds, config.batch_size, device, copies=len(config.saes))
    reference = [data.held_out(seed, N_REFERENCE)[1].to(device) for _, seed in members]
    directions = [data.directions(seed).to(device) for _, seed in members]

    every = max(1, config.n_steps // N_RECORDS)
    records: list[dict[str, np.ndarray]] = []
    for step in range(1, config.n_steps + 1):
        metrics = trainer.step(next(batches))
        if step % STEPS_A_REPORT == 0 or step == config.n_steps:
            progress.advance((step - 1) % STEPS_A_REPORT + 1)
        if step % every == 0 or step == config.n_steps:
            record = measure(trainer.saes, reference, directions, config.refit)
            record["sparsity_weight"] = metrics["sparsity_weight"].double().cpu().numpy()
            check_finite(step, members, record, records)
            records.append({"step": np.array(step), **record})
            progress.show(record)
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


@torch.no_grad()
def measure(
    saes: Sequence[SAE], xs: Sequence[Tensor], directions: Sequence[Tensor], with_refit: bool
) -> dict[str, np.ndarray]:
    """L0 and FVU of each SAE on its x [n, d_model], and the cosine of the feature that it finds
    worst, before and after a refit on x: [n_saes] each."""
    acts = [sae.encode(x) for sae, x in zip(saes, xs, strict=True)]
    values = {
        "l0": [float(l0(a)) for a in acts],
        "fvu": [float(fvu(x, sae.decode(a))) for sae, x, a in zip(saes, xs, acts, strict=True)],
        "worst_cosine": [worst_cosine(*pair) for pair in zip(saes, directions, strict=True)],
    }
    if with_refit and np.isfinite(values["fvu"]).all():  # else `check_finite` ends the training
        refitted = [_refitted(FOLLOWED_REFIT, sae, x) for sae, x in zip(saes, xs, strict=True)]
        pairs = zip(refitted, directions, strict=True)
        values["worst_cosine_refit"] = [worst_cosine(*pair) for pair in pairs]
    return {name: np.array(value) for name, value in values.items()}


def worst_cosine(sae: SAE, directions: Tensor) -> float:
    """The lowest of the features' best cosines: all are clean at a threshold below it."""
    return float(best_cosine(decoder_cosines(sae.W_dec.detach(), directions)).amin())


def check_finite(
    step: int,
    members: Sequence[Member],
    record: Mapping[str, np.ndarray],
    records: Sequence[Mapping[str, np.ndarray]],
) -> None:
    """Raises `UserError` where an SAE's FVU is no longer a number."""
    bad = np.flatnonzero(~np.isfinite(record["fvu"]))
    if not len(bad):
        return
    i = int(bad[0])
    good = "there were no earlier metrics"
    if records:
        last = records[-1]
        good = f"at step {last['step']} FVU was {last['fvu'][i]:.4g}, L0 {last['l0'][i]:.4g}"
    raise UserError(
        f"step {step}: the {members[i].name} SAE of seed {members[i].seed} has an FVU of "
        f"{record['fvu'][i]}; {good}. Try a lower --lr"
    )


def add_steps_to(
    runs: Sequence[dict[str, Any]], members: Sequence[Member], curves: Mapping[str, np.ndarray]
) -> None:
    """Adds "steps_to" to the entries of results.json of what was followed in training: the
    members, and their first refit where there are curves of it."""
    entries = {(run["sae"], run["seed"]): run for run in runs}
    followed = {"worst_cosine": "", "worst_cosine_refit": FOLLOWED_REFIT}
    for curve in followed.keys() & curves.keys():
        for (name, seed), worst in zip(members, curves[curve].T, strict=True):
            entries[name + followed[curve], seed]["steps_to"] = steps_to(curves["step"], worst)


def steps_to(steps: np.ndarray, worst: np.ndarray) -> dict[str, int | None]:
    """By threshold, the first recorded step from which on every feature stays clean; None: never.

    steps, worst: [n_records].
    """
    first: dict[str, int | None] = {}
    for threshold in THRESHOLDS:
        late = np.flatnonzero(worst <= threshold)
        since = int(late[-1]) + 1 if len(late) else 0
        first[str(threshold)] = int(steps[since]) if since < len(steps) else None
    return first


# ---------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score(config: "Config", data: "ToyData", sae: SAE, member: Member) -> dict[str, Any]:
    """One entry of results.json: how the SAE does on held-out samples and against the truth."""
    tree = data.tree
    features, x = data.held_out(member.seed, config.n_eval)
    acts = sae.encode(x)
    x_hat = sae.decode(acts)
    directions = data.directions(member.seed)
    cosines = decoder_cosines(sae.W_dec, directions)
    best = best_cosine(cosines)
    matched = match_latents(cosines)
    scores = TruthScores(sae.W_dec, directions)
    scores.add(acts, features > 0, x, x_hat)
    absorbed = absorption_rate(acts, features, tree.parent, matched).tolist()
    parents = forest(pairs_of(acts * sae.W_dec.norm(dim=1)), toy_levels(sae))
    named = stands_for(cosines, matched, config.threshold)
    lost = [kind for kind, c in zip(tree.kind, best, strict=True) if c <= config.threshold]
    return {
        "sae": member.name,
        "seed": member.seed,
        "fvu": float(fvu(x, x_hat)),
        "l0": float(l0(acts)),
        "clean_features": int(clean_features(best, config.threshold)),
        "n_features": tree.n_features,
        "best_cosine": [round(float(c), 6) for c in best],
        "clean_at": {str(t): int(clean_features(best, t)) for t in THRESHOLDS},
        "lost": {kind: lost.count(kind) for kind in FEATURE_KINDS},
        "dead_share": float(dead_share(acts)),
        "absorption": [None if math.isnan(rate) else round(rate, 6) for rate in absorbed],
        "edges": tree_edges(parents, named, tree.parent),
        "truth_scores": scores.summary(),
    }


def toy_levels(sae: SAE) -> Tensor:
    """Each latent's level, int64 [n_latents]: one of its own, since prefixes end anywhere, and
    there are few latents; or that of the widths, where those are fixed. All are of one level
    where the SAE was trained at one prefix."""
    places, widths = torch.arange(sae.n_latents), sae.about.get("widths")
    if widths:
        return torch.bucketize(places, torch.tensor(widths), right=True)
    one_prefix = sae.about.get("n_prefixes") == 1
    return torch.zeros_like(places) if one_prefix else places


def matched_views(data: "ToyData", sae: SAE, seed: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the latents matched to the features do, in the order of the features.

    Returns their activations on x in the units of the data, times the length of a decoder row:
    [n, n_features]; the cosines of their decoder and of their encoder with the features'
    directions: [n_features, n_features] each. NaN where a feature has no latent.
    """
    directions = data.directions(seed)
    cosines = decoder_cosines(sae.W_dec.detach(), directions)
    matched = match_latents(cosines)
    with torch.no_grad():
        acts = sae.encode(x) * sae.W_dec.norm(dim=1) / sae.scale
    encoder = decoder_cosines(sae.W_enc.detach().T, directions)
    in_order = [_in_feature_order(rows, matched) for rows in (acts.T, cosines, encoder)]
    return in_order[0].T, in_order[1], in_order[2]


def _in_feature_order(rows: Tensor, matched: Tensor) -> Tensor:
    """Row f of the result is that of feature f's latent, NaN where it has none."""
    return torch.where(matched[:, None] >= 0, rows[matched], torch.nan)
