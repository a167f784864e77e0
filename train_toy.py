"""The toy comparison: a Matryoshka SAE recovers a tree of features, a vanilla one does not.

Samples come from a tree of 20 features whose directions are known. For each seed a Matryoshka SAE
and a vanilla one (the same, with one prefix) are trained on the same batches from the same
initialisation. A feature counts as clean where some latent's decoder direction has a cosine over
0.9 with it. Seeds are trained together, as stacks of SAEs; see `sae.Trainer`.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import refit
import script
from sae import SAE, Trainer, TrainerConfig, seeded_generator
from script import UserError, setting
from toy_model import FeatureTree, true_directions

THRESHOLDS = (0.9, 0.95, 0.99)  # cosines at which features are counted as clean
KINDS = ("parent", "child", "rare")  # of features
SAES = ("matryoshka", "vanilla")  # the order in which a stack holds them
# Streams of a seed's random numbers, apart from those of sae.py.
STREAM_DIRECTIONS, STREAM_SAMPLES, STREAM_HELD_OUT, STREAM_REFIT = 10, 11, 12, 13
SEEDS_A_STACK = 10  # on a CPU: a stack whose activations stay in a core's cache is fastest a seed
STEPS_A_DRAW = 50  # batches drawn at once
N_RECORDS = 200  # points of the training curves
N_REFERENCE = 1_000  # held-out samples that the curves are measured on
N_DRAWN = 200  # held-out samples in the figure of activations


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of the toy comparison. The defaults are the write-up's."""

    seeds: int = setting(1, "how many seeds; each trains one SAE of either kind")
    seed: int = setting(0, "the first seed")
    steps: int = setting(40_000, "training steps")
    batch_size: int = setting(200, "samples a step")
    n_prefixes: int = setting(10, "prefixes a step of the Matryoshka SAE; vanilla has 1")
    n_latents: int = setting(0, "latents of an SAE; 0: as many as the tree has features")
    d_model: int = setting(20, "dimensions that the features live in")
    target_l0: float = setting(1.2338, "active latents a sample that the sparsity weight aims at")
    lr: float = setting(0.03, "learning rate, of Adam")
    prefixes: str = setting(
        "sampled",
        "prefixes drawn each step, or the loss's exact mean over them",
        choices=["sampled", "expected"],
    )
    restart_every: int = setting(
        0, "steps between chances to restart the last latent; 0: never, as in the paper"
    )
    sparsity: str = setting("l1", "the sparsity loss", choices=["l1", "log"])
    sparsity_weight: float = setting(0.2, "where the adaptive sparsity weight starts")
    tree: str = setting("tree.json", "file of the feature tree")
    refit: bool = setting(
        False, "score each SAE with its decoder refitted, too, and with both; see refit.py"
    )
    threshold: float = setting(0.9, "cosine over which a feature is clean")
    n_eval: int = setting(50_000, "held-out samples that an SAE is scored on")
    out: str = setting("runs/toy", "folder for results.json, the SAEs and the figures")
    device: str = setting("cpu", "torch device; auto: the GPU where there is one")
    workers: int = setting(0, "processes that share the seeds on a CPU; 0: one a core")


def fix_kernels() -> None:
    """Makes matrix products and vector arithmetic the same on every x86-64 CPU with AVX2.

    MKL and PyTorch choose their kernels by the CPU, each with a rounding of its own, and in 40,000
    steps a rounding decides whether a seed finds all features. Both read these variables when
    they first compute something, so this must come before that; processes born later inherit
    them. It costs half of a step's time again. Variables that are set already are left alone.
    """
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and " avx2 " in cpu_info.read_text():
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")


def load_tree(path: str) -> FeatureTree:
    """The tree in the file `path`, or beside this script where there is no such file."""
    beside = Path(__file__).parent / path
    return FeatureTree.from_json(beside if not Path(path).exists() and beside.exists() else path)


def check(config: Config, tree: FeatureTree) -> Config:
    """`config` with n_latents and workers filled in. Raises `UserError` where it is impossible."""
    script.require_positive(
        config, "seeds", "steps", "batch_size", "n_prefixes", "d_model", "target_l0", "lr"
    )
    script.require_positive(config, "n_eval", "sparsity_weight")
    script.require_not_negative(config, "seed", "n_latents", "workers", "restart_every")
    n_latents = config.n_latents or tree.n_features
    if config.n_prefixes > n_latents:
        raise UserError(
            f"--n-prefixes {config.n_prefixes} is more than there are latents: at most {n_latents}"
        )
    if not 0 < config.threshold < 1:
        raise UserError(f"--threshold {config.threshold} is no cosine between 0 and 1")
    workers = config.workers or os.cpu_count() or 1
    return dataclasses.replace(config, n_latents=n_latents, workers=workers)


# ------------------------------------------------------------------------------------ one stack


class Data(NamedTuple):
    """What a stack of seeds trains on: each seed's own directions and samples."""

    tree: FeatureTree
    directions: Tensor  # [n_seeds, n_features, d_model]
    generators: list[torch.Generator]

    @classmethod
    def of(cls, config: Config, tree: FeatureTree, seeds: Sequence[int], device: torch.device):
        directions = [directions_of(tree, config, seed) for seed in seeds]
        generators = [seeded_generator(seed, STREAM_SAMPLES) for seed in seeds]
        return cls(tree, torch.stack(directions).to(device), generators)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Endless batches for both kinds of SAE: x [2 n_seeds, batch, d_model]."""
        n_seeds, device = len(self.generators), self.directions.device
        while True:
            n = STEPS_A_DRAW * batch_size
            features = torch.stack([self.tree.sample(n, g) for g in self.generators]).to(device)
            x = torch.bmm(features, self.directions)  # [n_seeds, n, d_model]
            x = x.reshape(n_seeds, STEPS_A_DRAW, batch_size, -1).transpose(0, 1)
            yield from torch.cat([x, x], dim=1)  # [STEPS_A_DRAW, 2 n_seeds, batch, d_model]


def directions_of(tree: FeatureTree, config: Config, seed: int) -> Tensor:
    """The features' directions for `seed`: [n_features, d_model]."""
    generator = seeded_generator(seed, STREAM_DIRECTIONS)
    return true_directions(tree.n_features, config.d_model, generator)


def held_out(tree: FeatureTree, config: Config, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Features [n, n_features] and x [n, d_model] of `seed` that no SAE was trained on."""
    features = tree.sample(n, seeded_generator(seed, STREAM_HELD_OUT))
    return features, features @ directions_of(tree, config, seed)


class Progress:
    """Where training stands, in memory that processes share: steps done, then what to show."""

    SHOWN = ("l0", "fvu", "sparsity_weight")

    def __init__(self, context: Any):
        self.stop = context.Event()
        self.steps = context.Value("q", 0)
        self.latest = context.Array("d", len(SAES) * len(self.SHOWN))

    def report(self, steps: int, record: dict[str, np.ndarray]) -> None:
        """Adds `steps` done, by a stack whose first seed stands as in `record`."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        with self.steps.get_lock():
            self.steps.value += steps
        self.latest[:] = [
            float(record[name].reshape(len(SAES), -1)[k, 0])
            for k in range(len(SAES))
            for name in self.SHOWN
        ]

    def show(self, bar: tqdm) -> None:
        numbers = np.array(self.latest[:]).reshape(len(SAES), -1)
        shown = "; ".join(
            f"{name} L0 {l0:.2f} FVU {fvu:.3f} weight {weight:.2g}"
            for name, (l0, fvu, weight) in zip(SAES, numbers, strict=True)
        )
        bar.set_postfix_str(shown, refresh=False)
        bar.update(self.steps.value - bar.n)


class StackResult(NamedTuple):
    """What training a stack of seeds gives."""

    runs: list[dict[str, Any]]  # an entry of results.json each
    saes: list[dict[str, Tensor]]  # their state dicts, in the same order
    curves: dict[str, np.ndarray]  # [n_records, n_saes] each

    def sae(self, name: str) -> SAE:
        """The SAE of that name of the first seed."""
        which = [run["sae"] for run in self.runs].index(name)
        return SAE.from_tensors(self.saes[which])


def train_stack(
    config: Config,
    tree: FeatureTree,
    seeds: Sequence[int],
    progress: Progress,
    trainer_class: type[Trainer] = Trainer,
) -> StackResult:
    """Trains both SAEs of all `seeds` together, and scores them."""
    device = torch.device(config.device)
    assert config.n_latents > 0
    both = [*seeds, *seeds]
    trainer = trainer_class(
        SAE.stack([SAE(config.d_model, config.n_latents, seed) for seed in both]).to(device),
        TrainerConfig(
            n_steps=config.steps,
            target_l0=config.target_l0,
            lr=config.lr,
            prefixes=config.prefixes,  # type: ignore[arg-type]
            restart_every=config.restart_every,
            sparsity=config.sparsity,  # type: ignore[arg-type]
            sparsity_weight=config.sparsity_weight,
        ),
        seeds=both,
        n_prefixes=[config.n_prefixes] * len(seeds) + [1] * len(seeds),
    )
    batches = Data.of(config, tree, seeds, device).batches(config.batch_size)
    reference = torch.stack([held_out(tree, config, s, N_REFERENCE)[1] for s in both]).to(device)
    directions = torch.stack([directions_of(tree, config, s) for s in both]).to(device)

    every = max(1, config.steps // N_RECORDS)
    records: list[dict[str, np.ndarray]] = []
    for step in range(1, config.steps + 1):
        metrics = trainer.step(next(batches))
        if step % every == 0 or step == config.steps:
            record = measure(
                trainer.sae, reference, directions, metrics["sparsity_weight"], config.refit
            )
            check_finite(step, both, record, records)
            since = step - (int(records[-1]["step"]) if records else 0)
            records.append({"step": np.array(step), **record})
            progress.report(since, record)

    saes = [sae.to("cpu") for sae in trainer.sae.unstack()]
    named = list(zip((name for name in SAES for _ in seeds), both, saes, strict=True))
    if config.refit:
        x = [refit_samples(config, tree, seed) for seed in both]
        for how, fit in (
            ("refit", lambda sae, x: refit.refit_decoder(sae, [x])),
            ("refit both", lambda sae, x: refit.refit_both(sae, lambda: [x])),
        ):
            fitted = zip(named[: len(both)], x, strict=True)
            named += [(f"{name}, {how}", seed, fit(sae, x)) for (name, seed, sae), x in fitted]
    curves = {name: np.stack([record[name] for record in records]) for name in records[0]}
    runs = [score(config, tree, sae, name, seed) for name, seed, sae in named]
    for k, worst in enumerate(("worst_cosine", "worst_cosine_refit")):
        if worst in curves:
            own = runs[k * len(both) : (k + 1) * len(both)]
            for run, curve in zip(own, curves[worst].T, strict=True):
                run["steps_to"] = steps_to(curves["step"], curve)
    return StackResult(runs, [sae.state_dict() for _, _, sae in named], curves)


def refit_samples(config: Config, tree: FeatureTree, seed: int) -> Tensor:
    """Samples of `seed` to refit an SAE on, neither trained nor scored on: [n_eval, d_model]."""
    features = tree.sample(config.n_eval, seeded_generator(seed, STREAM_REFIT))
    return features @ directions_of(tree, config, seed)


@torch.no_grad()
def measure(
    sae: SAE, x: Tensor, directions: Tensor, sparsity_weight: Tensor, with_refit: bool
) -> dict[str, np.ndarray]:
    """L0 and FVU on x [n_saes, n, d_model], the weight, and the cosine of the feature that is found
    worst, before and after a refit on x: [n_saes] each."""
    acts = sae.encode(x)
    values = {
        "l0": evaluate.l0(acts),
        "fvu": evaluate.fvu(x, sae.decode(acts)),
        "sparsity_weight": sparsity_weight,
        "worst_cosine": worst_cosine(sae, directions),
    }
    if with_refit and values["fvu"].isfinite().all():  # else `check_finite` ends the run
        pairs = zip(sae.unstack(), x, strict=True)
        fitted = SAE.stack([refit.refit_decoder(one, [own]) for one, own in pairs])
        values["worst_cosine_refit"] = worst_cosine(fitted, directions)
    return {name: value.cpu().numpy().astype(np.float64) for name, value in values.items()}


def worst_cosine(sae: SAE, directions: Tensor) -> Tensor:
    """The lowest of the features' best cosines: all are clean at a threshold below it. [n_saes]"""
    cosines = evaluate.decoder_cosines(sae.W_dec.detach(), directions)
    return evaluate.best_cosine(cosines).amin(-1)


def steps_to(steps: np.ndarray, worst: np.ndarray) -> dict[str, int | None]:
    """By threshold, the first recorded step from which on every feature stays clean; None: never.

    steps, worst: [n_records].
    """
    first = {}
    for threshold in THRESHOLDS:
        late = np.flatnonzero(worst <= threshold)
        since = late[-1] + 1 if len(late) else 0
        first[str(threshold)] = int(steps[since]) if since < len(steps) else None
    return first


def check_finite(
    step: int, seeds: Sequence[int], record: dict[str, np.ndarray], records: list[dict]
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
    name = SAES[i * len(SAES) // len(seeds)]
    raise UserError(
        f"step {step}: the {name} SAE of seed {seeds[i]} has an FVU of {record['fvu'][i]}; {good}. "
        "Try a lower --lr"
    )


@torch.no_grad()
def score(config: Config, tree: FeatureTree, sae: SAE, name: str, seed: int) -> dict[str, Any]:
    """One entry of results.json: how the SAE does on held-out samples and against the truth."""
    features, x = held_out(tree, config, seed, config.n_eval)
    acts = sae.encode(x)
    cosines = evaluate.decoder_cosines(sae.W_dec, directions_of(tree, config, seed))
    best = evaluate.best_cosine(cosines)
    matched = evaluate.match_latents(cosines)
    absorbed = evaluate.absorption_rate(acts, features, tree.parent, matched)
    lost = [
        kind for kind, cosine in zip(tree.kind, best, strict=True) if cosine <= config.threshold
    ]
    return {
        "sae": name,
        "seed": seed,
        "fvu": float(evaluate.fvu(x, sae(x))),
        "l0": float(evaluate.l0(acts)),
        "clean_features": int(evaluate.clean_features(best, config.threshold)),
        "n_features": tree.n_features,
        "best_cosine": [round(float(c), 6) for c in best],
        "clean_at": {str(t): int(evaluate.clean_features(best, t)) for t in THRESHOLDS},
        "lost": {kind: lost.count(kind) for kind in KINDS},
        "dead_share": float(evaluate.dead_share(acts)),
        "absorption": [None if a.isnan() else round(float(a), 6) for a in absorbed],
    }


# ---------------------------------------------------------------------------------- the whole run


def run(config: Config, trainer_class: type[Trainer] = Trainer) -> dict[str, Any]:
    """Trains and scores both SAEs for every seed; writes results.json, the SAEs and the figures.

    Returns what results.json holds. Raises `UserError` where the input is wrong, before anything
    in `config.out` is touched. After Ctrl-C the stacks that were finished are written.
    """
    started = time.perf_counter()
    device = script.pick_device(config.device)
    tree = load_tree(config.tree)
    config = dataclasses.replace(check(config, tree), device=str(device))
    out = Path(config.out)
    script.make_folder(out)

    finished: list[StackResult] = []
    try:
        for result in train_stacks(config, tree, trainer_class):
            finished.append(result)
    except KeyboardInterrupt:
        if finished:
            write(config, tree, finished, time.perf_counter() - started)
        n_done = sum(run["sae"] == SAES[0] for result in finished for run in result.runs)
        raise script.Interrupted(
            f"{n_done} of {config.seeds} seeds are finished, in {out}"
        ) from None
    return write(config, tree, finished, time.perf_counter() - started)


def train_stacks(
    config: Config, tree: FeatureTree, trainer_class: type[Trainer] = Trainer
) -> Iterator[StackResult]:
    """Every seed, in stacks, side by side in processes on a CPU; yields stacks in order of seed."""
    on_cpu = config.device == "cpu"
    workers = min(config.workers, config.seeds) if on_cpu else 1
    size = min(SEEDS_A_STACK, math.ceil(config.seeds / workers)) if on_cpu else config.seeds
    seeds = range(config.seed, config.seed + config.seeds)
    stacks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    # One stack needs no process of its own, only a thread beside the progress bar.
    executor = (
        concurrent.futures.ProcessPoolExecutor(
            min(workers, len(stacks)), mp_context=context, initializer=_adopt, initargs=(progress,)
        )
        if len(stacks) > 1
        else concurrent.futures.ThreadPoolExecutor(1, initializer=_adopt, initargs=(progress,))
    )
    with executor, tqdm(total=len(stacks) * config.steps, unit=" steps", smoothing=0.05) as bar:
        with script.ignoring_ctrl_c():  # which processes born here inherit: it is the parent's
            futures = [
                executor.submit(_train_stack, config, tree, stack, trainer_class)
                for stack in stacks
            ]
        try:
            for future in futures:
                while concurrent.futures.wait([future], timeout=0.2).not_done:
                    progress.show(bar)
                yield future.result()
            progress.show(bar)
        finally:
            progress.stop.set()
            executor.shutdown(cancel_futures=True)


_progress: Progress | None = None


def _adopt(progress: Progress) -> None:
    """In a worker: takes over the progress that it shares with the parent."""
    global _progress
    _progress = progress


def _train_stack(
    config: Config, tree: FeatureTree, seeds: Sequence[int], trainer_class: type[Trainer]
) -> StackResult:
    """`train_stack` on one thread: its tensors are too small for two to help."""
    assert _progress is not None
    with script.threads(1):
        return train_stack(config, tree, seeds, _progress, trainer_class)


def write(
    config: Config, tree: FeatureTree, finished: Sequence[StackResult], seconds: float
) -> dict[str, Any]:
    """Writes the SAEs, then the figures, then results.json, into `config.out`."""
    import plots  # only here: matplotlib takes a second to import, and workers have no use for it

    out = Path(config.out)
    runs = sorted((r for result in finished for r in result.runs), key=lambda r: r["seed"])
    for result in finished:
        for entry, state in zip(result.runs, result.saes, strict=True):
            sae = SAE.from_tensors(state)
            script.write_atomically(
                out / f"{file_name(entry['sae'])}_seed{entry['seed']}.safetensors", sae.save
            )

    draw(config, tree, finished, plots)
    results = {
        "config": dataclasses.asdict(config),
        "environment": script.environment(torch.device(config.device)),
        "seconds": round(seconds, 2),
        "runs": runs,
    }
    script.write_json(out / "results.json", results)
    return results


def file_name(sae: str) -> str:
    """What an SAE's file is called: "matryoshka, refit both" -> "matryoshka_refit_both"."""
    return sae.replace(",", "").replace(" ", "_")


def draw(config: Config, tree: FeatureTree, finished: Sequence[StackResult], plots: Any) -> None:
    """The figures: the first seed's activations and cosines, and every seed's training curves."""
    out, first = Path(config.out), finished[0]
    seed = first.runs[0]["seed"]
    features, x = held_out(tree, config, seed, N_REFERENCE)
    features, x = features[:N_DRAWN], x[:N_DRAWN]
    directions = directions_of(tree, config, seed)
    acts, decoder, encoder = {}, {}, {}
    for name in SAES:
        sae = first.sae(name)
        cosines = evaluate.decoder_cosines(sae.W_dec.detach(), directions)
        matched = torch.as_tensor(evaluate.match_latents(cosines))
        with torch.no_grad():
            # in the units of the truth: an activation times its decoder row's length in the data
            contribution = sae.encode(x) * sae.W_dec.norm(dim=1) / sae.scale
        acts[name] = in_feature_order(contribution.T, matched).T
        decoder[name] = in_feature_order(cosines, matched)
        encoder[name] = in_feature_order(
            evaluate.decoder_cosines(sae.W_enc.detach().T, directions), matched
        )
    plots.toy_activations(out / "activations.png", features, acts, tree)
    plots.toy_cosines(out / "decoder_cosines.png", decoder, tree, "decoder")
    plots.toy_cosines(out / "encoder_cosines.png", encoder, tree, "encoder")
    curves = {
        name: {
            what: np.concatenate(
                [np.split(r.curves[what], len(SAES), axis=1)[k] for r in finished], axis=1
            ).T
            for what in ("l0", "fvu", "sparsity_weight")
        }
        for k, name in enumerate(SAES)
    }
    plots.training_curves(
        out / "curves.png", first.curves["step"], curves, config.target_l0, tree.expected_l0
    )
    if config.seeds > 1:
        runs = [run for result in finished for run in result.runs if run["sae"] in SAES]
        plots.toy_seeds(out / "seeds.png", runs, tree, config.threshold)


def in_feature_order(rows: Tensor, matched: Tensor) -> Tensor:
    """Row f of the result is that of feature f's latent, NaN where it has none."""
    return torch.where(matched[:, None] >= 0, rows[matched], torch.nan)


def summary(results: dict[str, Any]) -> str:
    """The table of the write-up, as mean and spread over seeds, and what each kind of SAE lost."""
    rows, lost_rows = [], []
    threshold = results["config"]["threshold"]
    for name in dict.fromkeys(run["sae"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["sae"] == name]
        n = runs[0]["n_features"]

        def spread(key: str, digits: int, runs: list[dict] = runs) -> str:
            values = np.array([run[key] for run in runs])
            mean = f"{values.mean():.{digits}f}"
            return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"

        clean = np.array([run["clean_features"] for run in runs])
        counts = [
            f"{c}/{n}" + (f" in {(clean == c).sum()}" if len(runs) > 1 else "")
            for c in sorted(set(clean.tolist()), reverse=True)
        ]
        at = [np.mean([run["clean_at"][str(t)] for run in runs]) for t in THRESHOLDS]
        rows.append([name, spread("fvu", 4), spread("l0", 3), ", ".join(counts)])
        lost = [np.mean([run["lost"][kind] for run in runs]) for kind in KINDS]
        absorbed = [a for run in runs for a in run["absorption"] if a is not None]
        lost_rows.append(
            [
                name,
                *(f"{value:.2f}" for value in (*at, *lost)),
                f"{np.mean(absorbed):.3f}" if absorbed else "-",
            ]
        )
    n_seeds = len({run["seed"] for run in results["runs"]})
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else f"seed {results['runs'][0]['seed']}"
    return "\n\n".join(
        [
            script.table([seeds, "FVU", "L0", f"clean features (cosine > {threshold})"], rows),
            script.table(
                [
                    "mean a seed",
                    "clean > 0.9",
                    "> 0.95",
                    "> 0.99",
                    "parents lost",
                    "children lost",
                    "rare lost",
                    "absorption",
                ],
                lost_rows,
            ),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        config = script.parse(Config, __doc__, argv)
        fix_kernels()
        results = run(config)
        print(summary(results))
        print(f"\n{results['seconds']:.0f} s; figures, SAEs and results.json are in {config.out}")


if __name__ == "__main__":
    main()
