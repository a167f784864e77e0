"""The toy comparison: a Matryoshka SAE recovers a tree of features, a vanilla one does not.

Samples come from a tree of 20 features whose directions are known. For each seed, a Matryoshka SAE
and a vanilla one (the same, with one prefix) are trained on the same batches from the same
initialisation. A feature counts as clean if some latent's decoder direction has a cosine over 0.9
with it. The SAEs of several seeds are trained together, as a stack; see matryoshka/trainer.py.
"""

if __name__ == "__main__":  # no traceback after Ctrl-C while torch is imported; see `main_guard`
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.command_line import (
    inherited,
    main_guard,
    parse,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
)
from matryoshka.environment import environment, fix_kernels
from matryoshka.errors import Interrupted, UserError
from matryoshka.files import make_folder, one_writer, write_atomically, write_json
from matryoshka.kinds import KINDS, check_names
from matryoshka.run_folder import as_flag, shown
from matryoshka.toy_report import SEEDS_FIGURE, draw, figures_of, summary
from matryoshka.toy_stack import REFITS, StackResult
from matryoshka.toy_workers import train_stacks
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from toy_model import STEPS_A_DRAW, FeatureTree, ToyData

RESULTS = "results.json"
NEW = ".new"  # folder in --out where a run's files are written before they replace an earlier run's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Every setting of the toy comparison. The trainer's settings are inherited, and the defaults
    are those of the write-up."""

    seeds: int = setting(1, "how many seeds; each trains one SAE of every kind")
    seed: int = setting(0, "the first seed")
    saes: tuple[str, ...] = setting(tuple(KINDS), "the kinds of SAE to train", alias="sae")
    n_steps: int = inherited(TrainerConfig, "n_steps", default=40_000, alias="steps")
    target_l0: float = inherited(TrainerConfig, "target_l0", default=1.2338)
    n_prefixes: int = inherited(
        TrainerConfig, "n_prefixes", help="prefixes a step of the Matryoshka SAE; vanilla has 1"
    )
    batch_size: int = setting(200, "samples a step")
    n_latents: int = setting(0, "latents of an SAE; 0: as many as the tree has features")
    d_model: int = setting(20, "dimensions that the features live in")
    tree: str = setting("tree.json", "file of the feature tree")
    refit: bool = setting(
        False,
        "also score each SAE with its decoder refitted, and with its encoder and decoder refitted; "
        "see refit.py",
    )
    threshold: float = setting(0.9, "cosine above which a feature counts as clean")
    n_eval: int = setting(50_000, "held-out samples that an SAE is scored on")
    out: str = setting("runs/toy", "folder for results.json, the SAEs and the figures")
    overwrite: bool = setting(False, "replace a run in --out even if its settings are others")
    device: str = setting("cpu", "torch device; auto: the GPU if there is one")
    workers: int = setting(0, "processes that share the seeds on a CPU; 0: one a core")


# Settings that do not change the results: a run that differs in them alone is replaced unasked.
REPLACEABLE = ("out", "overwrite", "workers")
REMEDY = "choose another --out, or add --overwrite"


def run(
    config: Config,
    trainer_class: type[Trainer] = Trainer,
    report: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Trains and scores the SAEs of every seed. Writes results.json, the SAEs and the figures.

    Returns the content of results.json, with which `report` is called before anything is written,
    so that a full disk cannot lose it. `trainer_class`: studies/ablate_toy.py has others.
    Raises `UserError` where the input is wrong, before anything in `config.out` is touched. After
    Ctrl-C, or where a stack of seeds fails, the finished stacks are written, unless `config.out`
    holds a run of the same settings with more seeds.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    tree = load_tree(config.tree)
    config = dataclasses.replace(checked(config, tree), device=str(device))
    data = ToyData(tree, config.d_model)
    out = Path(config.out)
    make_folder(out)
    with one_writer(out):
        claim(config)
        finished: list[StackResult] = []
        stopped: BaseException | None = None
        try:
            for result in train_stacks(config, data, trainer_class):
                finished.append(result)
        except (KeyboardInterrupt, UserError) as error:
            stopped = error
        results = results_of(config, finished, time.perf_counter() - started)
        if stopped is None:
            if report:
                report(results)
            write(config, data, finished, results)
            return results
        message = keep_finished(config, data, finished, results)
        if isinstance(stopped, UserError):
            raise UserError(f"{stopped} ({message})" if finished else str(stopped)) from None
        raise Interrupted(message)


def keep_finished(
    config: Config, data: ToyData, finished: Sequence[StackResult], results: dict[str, Any]
) -> str:
    """Writes the finished stacks of a run that was stopped. Returns a message on how many seeds
    are finished, and where they are."""
    n_done = len({entry["seed"] for entry in results["runs"]})
    message = f"{n_done} of {config.seeds} seeds are finished"
    earlier = recorded(Path(config.out) / RESULTS, "runs") or []
    if len(earlier) > len(results["runs"]) and not config.overwrite:
        return f"{message}; the earlier run, which has more, is still in {config.out}"
    if finished:
        write(config, data, finished, results)
    return f"{message}, in {config.out}"


# -------------------------------------------------------------------------- checks before a run


def load_tree(path: str) -> FeatureTree:
    """The tree in the file `path`. If there is no such file here, it is looked for beside this
    script."""
    beside = Path(__file__).parent / path
    return FeatureTree.from_json(beside if not Path(path).exists() and beside.exists() else path)


def checked(config: Config, tree: FeatureTree) -> Config:
    """`config` with n_latents and workers filled in. Raises `UserError` where a setting is
    impossible."""
    require_positive(config, "seeds", "batch_size", "d_model", "n_eval")
    require_not_negative(config, "seed", "n_latents", "workers")
    check_names(config.saes)
    if config.n_eval == 1:
        raise UserError("--n-eval must be at least 2, got 1: one sample has no variance to explain")
    if not 0 < config.threshold < 1:
        raise UserError(f"--threshold must be between 0 and 1, got {config.threshold}")
    config = dataclasses.replace(
        config,
        n_latents=config.n_latents or tree.n_features,
        workers=config.workers or os.cpu_count() or 1,
    )
    config.check(config.n_latents, config.batch_size)
    config.require_eights("--d-model", config.d_model)
    require_memory(config, tree.n_features)
    return config


def require_memory(config: Config, n_features: int) -> None:
    """Raises `UserError` where a setting takes more memory than this machine has, and names it.

    It knows a lower bound: the bytes of the large tensors, float32 except in FVU, whose three are
    float64.
    """
    d_sample = config.d_model + n_features  # of x and features
    W_dec_bytes = 4 * config.n_latents * config.d_model * len(config.saes)  # of every kind's SAE
    n_scoring = min(config.workers, config.seeds)  # processes, each with samples of its own
    sample_bytes = 4 * (d_sample + config.n_latents) + 3 * 8 * config.d_model  # in scoring
    needed = {  # bytes, by the setting that is to blame
        # W_enc and W_dec as parameters, gradients, Adam's two moments, and a copy
        "n_latents" if config.n_latents > config.d_model else "d_model": 10 * W_dec_bytes,
        "batch_size": 4 * STEPS_A_DRAW * config.batch_size * d_sample,
        "n_eval": n_scoring * config.n_eval * sample_bytes,
        "seeds": 2 * W_dec_bytes * config.seeds,  # the trained SAEs
    }
    for name, n_bytes in needed.items():
        if n_bytes > _memory():
            value = getattr(config, name)
            raise UserError(
                f"--{as_flag(name)} {value} takes at least {n_bytes / 1e9:.3g} GB of memory, and "
                f"this machine has {_memory() / 1e9:.3g} GB"
            )


def _memory() -> int:
    """The bytes of this machine's memory, or a terabyte where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a Unix
        return 10**12


def claim(config: Config) -> None:
    """Raises `UserError` where `config.out` holds another run and `config.overwrite` is false, or
    where a folder has the name of a file to be written."""
    out = Path(config.out)
    for name in files_of(config):
        if (out / name).is_dir():
            raise UserError(f"{out / name} is a folder: a file of that name is to be written")
    if saes_in(out) and not (out / RESULTS).exists() and not config.overwrite:
        raise UserError(f"{out} holds SAEs, and no {RESULTS} that says what they are: {REMEDY}")
    require_same_run(out / RESULTS, config)


def require_same_run(path: Path, config: Any) -> None:
    """Raises `UserError` where the results in the file `path` are of other settings, and
    `config.overwrite` is false. Where they are of the same, says on stderr that they are replaced.
    """
    if config.overwrite or not path.exists():
        return
    found = recorded(path, "config")
    if found is None:
        raise UserError(f"{path} was not written by this script: {REMEDY}")
    for name, asked in json.loads(json.dumps(dataclasses.asdict(config))).items():
        if name not in REPLACEABLE and found.get(name) != asked:
            which = "of an earlier version"  # one that did not have this setting
            if name in found:
                which = f"with --{as_flag(name)} {shown(found[name])}"
            raise UserError(
                f"{path.parent} holds a run {which}, not --{as_flag(name)} {shown(asked)}: {REMEDY}"
            )
    print(f"{path.parent} holds a run of these settings, which is replaced", file=sys.stderr)


def recorded(path: Path, key: str) -> Any:
    """The value of `key`, "config" or "runs", in the results.json at `path`. None if the file
    cannot be read or is not a results.json."""
    kinds = {"config": dict, "runs": list}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, kinds[key]) else None


def saes_in(out: Path) -> list[Path]:
    """The files in a folder that are named as this script names SAEs."""
    return [path for path in out.glob("[!.]*_seed*.safetensors") if path.is_file()]


def files_of(config: Config) -> list[str]:
    """The names of all files that a run may write."""
    names = [name + refit for refit in ("", *REFITS) for name in config.saes]
    seeds = range(config.seed, config.seed + config.seeds)
    saes = [file_name(name, seed) for name in names for seed in seeds]
    return [RESULTS, *figures_of(config.seeds), *saes]


def file_name(sae: str, seed: int) -> str:
    """The name of an SAE's file: that of "matryoshka, refit both" and seed 0 is
    "matryoshka_refit_both_seed0.safetensors"."""
    return f"{sae.replace(',', '').replace(' ', '_')}_seed{seed}.safetensors"


# ------------------------------------------------------------------------------ what a run writes


def results_of(config: Config, finished: Sequence[StackResult], seconds: float) -> dict[str, Any]:
    """The content of results.json, for the finished stacks."""
    entries = (entry for result in finished for entry in result.runs)
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "environment": environment(torch.device(config.device)),
        "seconds": round(seconds, 2),
        "runs": sorted(entries, key=lambda entry: entry["seed"]),
    }


def write(
    config: Config, data: ToyData, finished: Sequence[StackResult], results: dict[str, Any]
) -> None:
    """Writes the SAEs, the figures and results.json to `config.out`, in place of an earlier run.
    Raises `UserError` where a file cannot be written. Then the earlier run is still there, whole.
    """
    out = Path(config.out)
    new = out / NEW
    shutil.rmtree(new, ignore_errors=True)  # a process that was killed may have left it
    try:
        make_folder(new)
        for result in finished:
            for entry, sae in zip(result.runs, result.saes, strict=True):
                write_atomically(new / file_name(entry["sae"], entry["seed"]), sae.save)
        draw(dataclasses.replace(config, out=str(new)), data, finished)
        write_json(new / RESULTS, results)
        # from here until the end, no results.json describes the mixture of old and new files
        (out / RESULTS).unlink(missing_ok=True)
        for path in (out / SEEDS_FIGURE, *saes_in(out)):
            if not (new / path.name).exists():
                path.unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == RESULTS):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__ or "", argv)
        fix_kernels()
        results = run(config, report=lambda results: print(summary(results)))
        print(f"\n{results['seconds']:.0f} s; figures, SAEs and results.json are in {config.out}")


if __name__ == "__main__":
    main()
