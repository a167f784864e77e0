"""Trains SAEs of every kind for several seeds of the toy, as one stack, and scores them."""

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

if TYPE_CHECKING:  # scripts import this module, which needs them only for its annotations
    from toy_model import ToyData
    from train_toy import Config

THRESHOLDS = (0.9, 0.95, 0.99)  # cosines above which features are counted as clean
FEATURE_KINDS = ("parent", "child", "rare")
N_RECORDS = 200  # points of the training curves
N_REFERENCE = 1_000  # held-out samples that the curves are measured on
# The settings that an SAE's file reports beside its name, seed and tree.
REPORTED_SETTINGS = (
    "n_prefixes",
    "prefixes",
    "sparsity",
    "target_l0",
    "lr",
    "n_steps",
    "batch_size",
)
STEPS_A_REPORT = 100  # steps between reports of progress, when training can also be stopped

# Refits of an SAE on x [n, d_model], each by what it adds to the SAE's name.
REFITS: dict[str, Callable[[SAE, Tensor], SAE]] = {
    ", refit": lambda sae, x: refit_decoder(sae, [x]),
    ", refit both": lambda sae, x: refit_both(sae, lambda: [x]),
}
FOLLOWED_REFIT = ", refit"  # the refit whose worst cosine is recorded during training


class Member(NamedTuple):
    """An SAE of a stack."""

    name: str  # of its kind, and of its refit if it has one
    seed: int  # of its data, its initialisation and its prefixes


class StackResult(NamedTuple):
    """The result of training a stack."""

    runs: list[dict[str, Any]]  # an entry of results.json for each SAE, the refitted ones included
    saes: list[SAE]  # as `runs`
    curves: dict[str, np.ndarray]  # "step" [n_records]; others [n_records, n_trained] by name

    def sae(self, name: str) -> SAE:
        """The SAE called `name` of the first seed."""
        return self.saes[[run["sae"] for run in self.runs].index(name)]


def train_stack(
    config: "Config",
    data: "ToyData",
    seeds: Sequence[int],
    progress: Progress,
    trainer_class: type[Trainer] = Trainer,
) -> StackResult:
    """Trains an SAE of every kind for each of `seeds`, all as one stack, and scores them.

    Raises `UserError` where all samples of a seed to score on are the same, where training
    diverges, or where no refit is possible.
    """
    for seed in seeds:
        for n in (config.n_eval, N_REFERENCE):
            _require_variance(data.held_out(seed, n)[1], seed)
    # `ToyData.batches` gives the seeds' samples in this order: all seeds, once for each kind
    members = [Member(name, seed) for name in config.saes for seed in seeds]
    device = torch.device(config.device)
    trainer = trainer_class(
        [_untrained(config, member).to(device) for member in members],
        [config_of(name, config) for name, _ in members],
        [seed for _, seed in members],
    )
    curves = take_steps(trainer, config, data, members, progress)

    trained = {member: sae.to("cpu") for member, sae in zip(members, trainer.saes, strict=True)}
    saes = trained | (refits_of(trained, config, data) if config.refit else {})  # by Member
    for member, sae in saes.items():
        sae.about["name"] = member.name
    runs = [score(config, data, sae, member) for member, sae in saes.items()]
    add_steps_to(runs, members, curves)
    return StackResult(runs, list(saes.values()), curves)


def refits_of(
    trained: Mapping[Member, SAE], config: "Config", data: "ToyData"
) -> dict[Member, SAE]:
    """Every refit in REFITS of each SAE, on samples that it was not trained on."""
    seeds = dict.fromkeys(seed for _, seed in trained)
    x = {seed: data.for_refit(seed, config.n_eval) for seed in seeds}
    return {
        Member(name + refit, seed): _refitted(refit, sae, x[seed])
        for refit in REFITS
        for (name, seed), sae in trained.items()
    }


def _untrained(config: "Config", member: Member) -> SAE:
    """A new SAE, with `about` filled in for its file; of the tree's path only the name is there."""
    sae = SAE(config.d_model, config.n_latents, member.seed)
    own = config_of(member.name, config)
    sae.about = {"seed": member.seed, "dataset": Path(config.tree).name}
    sae.about |= {name: getattr(own, name) for name in REPORTED_SETTINGS}
    if own.unhedged:
        sae.about["unhedged"] = own.unhedged
    if own.widths:
        sae.about["widths"] = own.widths_of(config.n_latents)
        sae.about["width_weights"] = own.width_weights
    return sae


def _require_variance(x: Tensor, seed: int) -> None:
    """Raises `UserError` where all samples of x [n, d_model] are the same."""
    if (x == x[0]).all():
        raise UserError(
            f"the {len(x)} held-out samples of seed {seed} are all the same, so that FVU is not "
            "defined: --n-eval must be larger, or the tree's features active more often"
        )


def _refitted(refit: str, sae: SAE, x: Tensor) -> SAE:
    """The refit of an SAE on x [n, d_model] by a key of REFITS. Raises `UserError` where it is
    impossible."""
    try:
        return REFITS[refit](sae, x)
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
    """Takes all training steps. Returns the curves of `StackResult`."""
    device = torch.device(config.device)
    seeds = list(dict.fromkeys(seed for _, seed in members))
    # each batch is x [n_saes, batch_size, d_model]
    batches = data.batches(seeds, config.batch_size, device, copies=len(config.saes))
    # for each member: x [N_REFERENCE, d_model] and directions [n_features, d_model]
    reference = [data.held_out(seed, N_REFERENCE)[1].to(device) for _, seed in members]
    directions = [data.directions(seed).to(device) for _, seed in members]

    record_every = max(1, config.n_steps // N_RECORDS)
    records: list[dict[str, np.ndarray]] = []
    for step in range(1, config.n_steps + 1):
        metrics = trainer.step(next(batches))
        if step % STEPS_A_REPORT == 0 or step == config.n_steps:
            progress.advance((step - 1) % STEPS_A_REPORT + 1)  # steps since the last report
        if step % record_every == 0 or step == config.n_steps:
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
    """L0 and FVU of each SAE on its x [n, d_model], and its worst cosine, also after a refit on x
    if `with_refit`: [n_saes] each, by name. directions: [n_features, d_model] for each SAE."""
    acts = [sae.encode(x) for sae, x in zip(saes, xs, strict=True)]  # [n, n_latents] each
    values = {
        "l0": [float(l0(a)) for a in acts],
        "fvu": [float(fvu(x, sae.decode(a))) for sae, x, a in zip(saes, xs, acts, strict=True)],
        "worst_cosine": [worst_cosine(*pair) for pair in zip(saes, directions, strict=True)],
    }
    if with_refit and np.isfinite(values["fvu"]).all():  # otherwise `check_finite` will raise
        refitted = [_refitted(FOLLOWED_REFIT, sae, x) for sae, x in zip(saes, xs, strict=True)]
        pairs = zip(refitted, directions, strict=True)
        values["worst_cosine_refit"] = [worst_cosine(*pair) for pair in pairs]
    return {name: np.array(value) for name, value in values.items()}


def worst_cosine(sae: SAE, directions: Tensor) -> float:
    """The lowest of the features' best cosines. At a threshold below it, all features are clean.

    directions: [n_features, d_model].
    """
    return float(best_cosine(decoder_cosines(sae.W_dec.detach(), directions)).amin())


def check_finite(
    step: int,
    members: Sequence[Member],
    record: Mapping[str, np.ndarray],
    records: Sequence[Mapping[str, np.ndarray]],
) -> None:
    """Raises `UserError` where the FVU of an SAE in `record`, that of step `step`, is not finite.
    `records`: the earlier ones."""
    diverged = np.flatnonzero(~np.isfinite(record["fvu"]))
    if not len(diverged):
        return
    i = int(diverged[0])
    before = "there were no earlier metrics"
    if records:
        last = records[-1]
        before = f"at step {last['step']} FVU was {last['fvu'][i]:.4g}, L0 {last['l0'][i]:.4g}"
    raise UserError(
        f"step {step}: the {members[i].name} SAE of seed {members[i].seed} has an FVU of "
        f"{record['fvu'][i]}; {before}. Try a lower --lr"
    )


def add_steps_to(
    runs: Sequence[dict[str, Any]], members: Sequence[Member], curves: Mapping[str, np.ndarray]
) -> None:
    """Adds "steps_to" to the entries in `runs` of the SAEs whose worst cosine is in `curves`: the
    members, and their FOLLOWED_REFIT if there are refits."""
    entries = {(run["sae"], run["seed"]): run for run in runs}
    refit_of_curve = {"worst_cosine": "", "worst_cosine_refit": FOLLOWED_REFIT}
    for curve in refit_of_curve.keys() & curves.keys():
        for (name, seed), worst in zip(members, curves[curve].T, strict=True):
            entry = entries[name + refit_of_curve[curve], seed]
            entry["steps_to"] = steps_to(curves["step"], worst)


def steps_to(steps: np.ndarray, worst: np.ndarray) -> dict[str, int | None]:
    """For each threshold, the first recorded step after which every feature stays clean, or None.

    steps, worst: [n_records].
    """
    first: dict[str, int | None] = {}
    for threshold in THRESHOLDS:
        not_clean = np.flatnonzero(worst <= threshold)
        since = int(not_clean[-1]) + 1 if len(not_clean) else 0
        first[str(threshold)] = int(steps[since]) if since < len(steps) else None
    return first


# ---------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score(config: "Config", data: "ToyData", sae: SAE, member: Member) -> dict[str, Any]:
    """One entry of results.json: the SAE's metrics on held-out samples, and against the truth."""
    tree = data.tree
    features, x = data.held_out(member.seed, config.n_eval)  # [n, n_features], [n, d_model]
    acts = sae.encode(x)  # [n, n_latents]
    x_hat = sae.decode(acts)
    directions = data.directions(member.seed)  # [n_features, d_model]
    cosines = decoder_cosines(sae.W_dec, directions)  # [n_latents, n_features]
    best = best_cosine(cosines)  # [n_features]
    matched = match_latents(cosines)  # [n_features]: each feature's latent, -1 if it has none
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
    """Each latent's level, int64 [n_latents], for the forest of latents.

    With fixed widths it is the number of widths that do not contain the latent. Otherwise, as
    random prefixes end at any latent, each latent has a level of its own. An SAE that was trained
    at one prefix has one level.
    """
    places, widths = torch.arange(sae.n_latents), sae.about.get("widths")
    if widths:
        return torch.bucketize(places, torch.tensor(widths), right=True)
    one_prefix = sae.about.get("n_prefixes") == 1
    return torch.zeros_like(places) if one_prefix else places


def matched_views(data: "ToyData", sae: SAE, seed: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the plots show of the latents that are matched to the features, in the features' order.

    Returns the latents' a_j ||d_j|| on x [n, d_model] in the units of the data, [n, n_features],
    and the cosines of their decoder rows and of their encoder columns with the features'
    directions, [n_features, n_features] each. It is NaN where a feature has no latent.
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
    """The rows [n_latents, ...] of the latents `matched` [n_features], NaN for a latent of -1."""
    return torch.where(matched[:, None] >= 0, rows[matched], torch.nan)
