"""The TinyStories comparison on Modal: cache once to a Volume, train each SAE on a GPU of its own.

    modal run modal_tinystories.py --tokens 5000000 --n-steps 3000            # smoke run
    modal run modal_tinystories.py --n-latents 3072 --target-l0 30 --lr 0.001 # the comparison

The same without Modal, one container's work after another, on a folder in the Volume's place:

    python modal_tinystories.py --volume runs/volume --tokens 100000 --n-steps 200

What runs where: `compare` in a CPU container starts the others and waits for them; `cache_part` in
--cache-workers GPU containers side by side; `train_one` in a GPU container an SAE and seed. Each of
them calls the scripts, and can be called again with the same input: it goes on where it was. The
entrypoint, here, says what will be used, waits for `compare`, prints the table, downloads the run.

On the Volume: caches/NAME.TOKENS/, a cache of activations, and runs/NAME/, a comparison.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import modal
import numpy as np
import torch

import evaluate
import train
import train_tinystories
from matryoshka import plots
from matryoshka.cache_config import CacheConfig, Dtype, load_source
from matryoshka.cache_format import MANIFEST, read_record
from matryoshka.cache_reader import RESIDENT_SHARE
from matryoshka.cache_writer import cache_rows
from matryoshka.command_line import (
    inherited,
    main_guard,
    parser_for,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
    table,
)
from matryoshka.errors import UserError
from matryoshka.files import make_folder, one_writer, write_atomically, write_json
from matryoshka.modal_plan import GPUS, plan_text, timeout
from matryoshka.saved_runs import METRICS, training_curves
from matryoshka.training_config import check_training
from matryoshka.volume_caches import CacheJob, make_caches, short_hash

ROOT = "/volume"  # where the Volume is in a container


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train_tinystories.Config):
    """Every setting. Those of the scripts have the scripts' defaults: the write-up's comparison."""

    model: str = inherited(CacheConfig, "model")
    model_revision: str | None = inherited(CacheConfig, "model_revision")
    dataset: str = inherited(CacheConfig, "dataset")
    dataset_revision: str | None = inherited(CacheConfig, "dataset_revision")
    tokens: int = inherited(CacheConfig, "tokens")
    validation_tokens: int = setting(500_000, "activations of the validation split to evaluate on")
    layer: int = inherited(CacheConfig, "layer")
    dtype: Dtype = inherited(CacheConfig, "dtype")
    keep_begin: bool = inherited(CacheConfig, "keep_begin")
    rows_per_shard: int = inherited(CacheConfig, "rows_per_shard")
    seeds: int = setting(1, "how many seeds, from --seed on; each trains every SAE of --saes")

    gpu: str = setting("H100", "GPU of a caching or training container: " + ", ".join(GPUS))
    cache_workers: int = setting(3, "containers that cache side by side, a GPU each")
    volume: str = setting(
        "matryoshka-tinystories", "Modal Volume, made where missing; without Modal, a folder"
    )
    name: str | None = setting(None, "the comparison's name; default: made of its settings")
    out: str = setting("runs/tinystories", "folder here; the comparison goes to NAME/ in it")
    # What the comparison decides itself.
    cache: str = setting("", is_flag=False)
    resume: bool = setting(True, is_flag=False)
    device: str = setting("auto", is_flag=False)


# Settings that do not change what an SAE becomes: they may differ between a run and its going on.
NOT_SHAPING = ("seed", "seeds", "checkpoint_every", "gpu", "cache_workers", "volume", "name", "out")


def check(config: Config) -> None:
    """Raises `UserError` where a setting is impossible, before anything has started."""
    require_positive(config, "tokens", "validation_tokens", "rows_per_shard")
    require_positive(config, "seeds", "cache_workers")
    require_not_negative(config, "layer")
    cache_config(config, "train", config.tokens).check()
    check_training(config)
    if config.batch_size > config.tokens:
        raise UserError(f"--batch-size {config.batch_size} is more than --tokens {config.tokens}")
    if config.gpu not in GPUS:
        raise UserError(f"--gpu {config.gpu} is none of {', '.join(GPUS)}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name_of(config), re.ASCII):
        raise UserError(f"--name {config.name}: letters, digits, '.', '-' and '_' only, 64 at most")


def check_for_modal(config: Config) -> None:
    """Raises `UserError` where a setting that is well here would be refused there."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", config.volume, re.ASCII):
        raise UserError(f"--volume {config.volume} is no name of a Modal Volume")
    for flag, value in (("model", config.model), ("dataset", config.dataset)):
        if value.count("/") != 1 or value[0] in "./~":
            raise UserError(
                f"--{flag} {value} is no hub repo's name: a container has none of this machine's "
                "files"
            )


def name_of(config: Config) -> str:
    """The comparison's folder in runs/: --name, or a readable one of all that shapes an SAE."""
    return config.name or (
        f"{config.tokens}tokens-{config.n_latents}x{config.n_prefixes}-l0_{config.target_l0:g}-"
        f"{config.n_steps}steps-{short_hash(shape_of(config))}"
    )


def shape_of(config: Config) -> dict[str, Any]:
    """The settings that shape an SAE, as JSON gives them back."""
    return {k: v for k, v in config.as_json().items() if k not in NOT_SHAPING}


def cache_config(config: Config, split: str, tokens: int) -> CacheConfig:
    """How a cache of one split is made."""
    ours, theirs = ({f.name for f in dataclasses.fields(c)} for c in (Config, CacheConfig))
    shared = ours & theirs - {"batch_size", "split"}  # the rest is about other models
    return CacheConfig(
        **{n: getattr(config, n) for n in shared} | {"tokens": tokens, "split": split}
    )


def train_config(config: Config, root: str, cache: str, sae: str, seed: int) -> Any:
    """How one SAE is trained on the cache in the folder `cache`, and where it goes."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(train_tinystories.Config)}
    return train_tinystories.Config(
        **shared
        | {
            "cache": cache,
            "tokens": 0,
            "saes": (sae,),
            "seed": seed,
            "out": f"{root}/runs/{name_of(config)}/{sae}_seed{seed}",
        }
    )


# ----------------------------------------------------------------------- what Modal needs to know


def typed() -> Config | None:
    """What follows `modal run modal_tinystories.py` where that is importing this file, else None.

    `modal run` starts the App before it calls the entrypoint. Read and checked now, a wrong setting
    is refused before anything starts, --help needs no account, and --gpu and --volume are known
    where functions are declared. In a container this is None, and the defaults stand in: there,
    Modal knows of a function's GPU and Volume from its declaration here.
    """
    if not modal.is_local() or "run" not in sys.argv or __name__ == "__main__":
        return None
    after = sys.argv[sys.argv.index("run") + 1 :]
    here = [i for i, word in enumerate(after) if Path(word.split("::")[0]).stem == __name__]
    if not here:
        return None
    with main_guard():
        config = parse(after[here[0] + 1 :], "modal run modal_tinystories.py")
        check_for_modal(config)
        print(plan_text(config))
        print(
            "Ctrl-C, or a lost connection, ends it: what is finished is kept. With modal run "
            "--detach it goes on to its end alone; the same command then fetches what it made."
        )
        return config


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Config:
    """A command line as a checked `Config`. Raises `UserError` where a setting is impossible."""
    parser = parser_for(Config, __doc__.split("\n")[0])
    parser.prog = prog or parser.prog
    config = Config(**vars(parser.parse_args(argv)))
    check(config)
    return config


SETTINGS = typed() or Config()
MODULES = ("evaluate", "matryoshka", "sae", "train", "train_tinystories")

app = modal.App("matryoshka-tinystories")
volume = modal.Volume.from_name(SETTINGS.volume, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install_from_pyproject(str(Path(__file__).with_name("pyproject.toml")))
    .env({"TQDM_MININTERVAL": "5"})  # seconds: a bar is a line of the log here
    .add_local_python_source(*MODULES, ignore=["**/__pycache__"])
)
RETRIES = modal.Retries(max_retries=5, initial_delay=10.0)  # preemptions come on top


@dataclasses.dataclass(frozen=True)
class Refused:
    """A `UserError` as a value: handed back, since the same input would be refused again."""

    message: str


def hands_back_refusals(body: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that returns `Refused` where `body` raises `UserError`: nothing retries."""

    @functools.wraps(body)
    def call(*args: Any) -> Any:
        try:
            return body(*args)
        except UserError as error:
            return Refused(str(error))

    return call


def commit() -> None:
    """Makes what was written to the Volume visible to other containers, and safe."""
    if not modal.is_local():
        volume.commit()


def reload() -> None:
    """Shows what other containers wrote to the Volume. No file on it may be open."""
    if not modal.is_local():
        volume.reload()


# ----------------------------------------------------------------------- in containers of their own


@app.function(
    image=image,
    gpu=SETTINGS.gpu,
    cpu=4.0,
    memory=16 * 1024,
    volumes={ROOT: volume},
    timeout=timeout(SETTINGS, "cache"),
    retries=RETRIES,
    max_containers=SETTINGS.cache_workers,
)
@hands_back_refusals
def cache_part(job: CacheJob) -> int:
    """Caches a range of rows. Returns how many shards it made; finished ones are kept."""
    reload()
    print(job, flush=True)
    source = load_source(job.config, pick_device("auto"))
    try:
        return cache_rows(job.folder, job.config, source, job.start, job.end)
    finally:
        commit()


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One SAE: how it is trained, and the cache that it is evaluated on."""

    config: train_tinystories.Config
    validation: str

    @property
    def sae(self) -> str:
        return self.config.saes[0]

    def __str__(self) -> str:
        return f"training {self.sae}, seed {self.config.seed}"


@app.function(
    image=image,
    gpu=SETTINGS.gpu,
    cpu=4.0,
    memory=16 * 1024,
    volumes={ROOT: volume},
    timeout=timeout(SETTINGS, "train"),
    retries=RETRIES,
)
@hands_back_refusals
def train_one(job: TrainJob) -> dict[str, Any]:
    """Trains an SAE, or goes on from its last checkpoint, and evaluates it.

    Returns {"training", "evaluation"}: the two scripts' results.
    """
    reload()
    print(job, flush=True)
    near = copied_near(Path(job.config.cache))
    config = dataclasses.replace(job.config, cache=str(near))
    trained = train.run(config, on_checkpoint=commit)
    evaluated = evaluate.run(evaluate.Config(run=job.config.out, cache=job.validation))
    commit()
    return {"training": trained, "evaluation": evaluated}


def copied_near(cache: Path) -> Path:
    """The cache's folder, or a copy on this container's disk where it does not fit on the GPU.

    One that fits is read in order, twice: to check it, and onto the GPU. One that does not would be
    streamed in small pieces, which a Volume is slow at; so it is copied, file by file, and streamed
    from there.
    """
    if fits_on_gpu(cache):
        return cache
    print(f"{cache.name} does not fit on the GPU: copying it to this container's disk", flush=True)
    copy = Path(tempfile.gettempdir()) / cache.name
    return Path(shutil.copytree(cache, copy, dirs_exist_ok=True))


def fits_on_gpu(cache: Path) -> bool:
    """Whether training will hold the cache on the GPU; without one there is nothing to decide."""
    if not torch.cuda.is_available():
        return True
    torch.cuda.empty_cache()  # of the SAE that this container may have trained before
    n_bytes = sum(path.stat().st_size for path in cache.glob("*.acts"))
    return n_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info()[0]


@app.function(
    image=image,
    cpu=2.0,
    memory=8 * 1024,
    volumes={ROOT: volume},
    timeout=24 * 3600,
    nonpreemptible=True,
)
@hands_back_refusals
def compare(config: Config, root: str) -> dict[str, Any]:
    """The comparison: both caches, all SAEs; its results, which runs/NAME/results.json holds too.

    In a container of its own, so that it lives on under --detach when nobody is watching.
    """
    began = time.monotonic()
    run = Path(root) / "runs" / name_of(config)
    claim(run, shape_of(config))
    cache, validation = both_caches(config, Path(root))
    n_tokens = read_record(cache / MANIFEST).n_tokens
    jobs = [
        TrainJob(
            dataclasses.replace(
                train_config(config, root, str(cache), sae, seed),
                tokens=config.tokens if config.tokens < n_tokens else 0,
            ),
            str(validation),
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for sae in config.saes
    ]
    done = each(train_one, jobs)
    reload()
    draw(run, jobs, done, config.target_l0)
    results = {
        "config": config.as_json(),
        "caches": [str(cache), str(validation)],
        "runs": [
            {"sae": job.sae, "seed": job.config.seed, "out": job.config.out, **result}
            for job, result in zip(jobs, done, strict=True)
        ],
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(run / "results.json", results)
    commit()
    return results


def claim(run: Path, shape: dict[str, Any]) -> None:
    """Writes down what the folder `run` is for. Raises `UserError` if it is for something else."""
    file = run / "config.json"
    if file.exists():
        for key, before in json.loads(file.read_text()).items():
            if shape[key] != before:
                raise UserError(
                    f"--name {run.name} was a comparison with --{key.replace('_', '-')} {before}, "
                    f"not {shape[key]}: choose another --name"
                )
    make_folder(run, "--volume")
    write_json(file, shape)
    commit()


def both_caches(config: Config, root: Path) -> tuple[Path, Path]:
    """The folders of finished caches of the train and the validation split, made where missing."""
    wanted = [
        (cache_config(config, "train", config.tokens), config.cache_workers),
        (cache_config(config, "validation", config.validation_tokens), 1),
    ]
    cache, validation = make_caches(wanted, root, cache_all, commit)
    return cache, validation


def cache_all(jobs: Sequence[CacheJob]) -> None:
    """Caches what the jobs say, side by side."""
    each(cache_part, jobs)
    reload()


def draw(run: Path, jobs: Sequence[TrainJob], done: Sequence[Any], target_l0: float) -> None:
    """Every SAE, all seeds: training curves; of the first seed: FVU by prefix, and densities."""
    curves: dict[str, dict[str, list[list[float]]]] = {}  # a metric's curve for each seed
    for job in jobs:
        steps, by_sae = training_curves(Path(job.config.out) / METRICS)
        for what, values in by_sae[job.sae].items():
            curves.setdefault(job.sae, {}).setdefault(what, []).append(values)
    plots.training_curves(run / "training_curves.png", steps, curves, target_l0)
    first = [evaluation_of(result) for result in done[: len(curves)]]
    plots.fvu_by_prefix(run / "fvu_by_prefix.png", {e["sae"]: e["fvu_by_prefix"] for e in first})
    densities = {e["sae"]: [e["density_histogram"]] for e in first}
    plots.density_histograms(run / "density_histograms.png", densities)


def evaluation_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation of a run of one SAE says of it."""
    one: dict[str, Any]
    (one,) = result["evaluation"]["runs"]
    return one


def each(function: modal.Function[Any, Any, Any], jobs: Sequence[Any]) -> list[Any]:
    """`function` of each job: in containers side by side, or here without Modal, in turn.

    All of them come to an end. Raises `UserError` naming those that failed, each with its reason.
    """
    outcomes: list[Any]
    if modal.is_local():
        outcomes = [_here(function, job) for job in jobs]
    else:
        outcomes = list(function.map(jobs, return_exceptions=True))
    failures = [
        f"{job}: {reason}"
        for job, outcome in zip(jobs, outcomes, strict=True)
        if (reason := reason_of(outcome))
    ]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} failed: {'; '.join(failures)}. What is finished is "
            "kept on the Volume, and the same command goes on from there"
        )
    return outcomes


def _here(function: modal.Function[Any, Any, Any], *args: Any) -> Any:
    """A function's body, here; an exception is its outcome, as it is of `map`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is executing locally")
        try:
            return function.local(*args)
        except Exception as error:
            return error


def reason_of(outcome: Any) -> str | None:
    """Why a function failed, by what it returned; None where it did not."""
    if isinstance(outcome, Refused):
        return outcome.message
    if isinstance(outcome, BaseException):
        return f"{type(outcome).__name__}: {outcome}"
    return None


# ---------------------------------------------------------------------------- here, on your machine


@app.local_entrypoint()
def main(*arglist: str) -> None:
    """`modal run modal_tinystories.py`: the flags are those of `Config`, read by `typed` before."""
    with one_line_errors():
        config = parse(arglist)
        try:
            results = compare.remote(config, ROOT)
        except modal.exception.ConnectionError:
            raise  # Modal says how a detached App goes on
        except Exception as error:
            results = error
        results = checked(config, results)
        folder = PurePosixPath("runs") / name_of(config)
        download(volume, folder, Path(config.out) / name_of(config))
        print(report(config, results))
        print(
            f"The rest is on the Volume: modal volume get {config.volume} / FOLDER, or "
            f"{Path(results['caches'][0]).relative_to(ROOT)} for /, which is the cache. To delete "
            f"it all: modal volume delete {config.volume}"
        )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """`UserError` as one line and exit code 2. Ctrl-C is left to Modal, which ends the App."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def checked(config: Config, outcome: Any) -> dict[str, Any]:
    """The results of `compare`, or `UserError` with why there are none, and what would help."""
    reason = reason_of(outcome)
    if reason is None:
        return dict(outcome)
    advice = ""
    if f"{ROOT}/" in reason:
        advice = f" ({ROOT} is the Volume; to delete: modal volume rm -r {config.volume} PATH)"
    raise UserError(reason + advice)


def download(source: Any, folder: PurePosixPath, out: Path) -> None:
    """Copies the files below `folder` of the Volume `source` to `out`; each whole or not at all."""
    for entry in source.listdir(str(folder), recursive=True):
        if entry.type.name != "FILE":
            continue
        name = PurePosixPath(entry.path.lstrip("/")).relative_to(folder)
        path = out / name
        make_folder(path.parent)
        write_atomically(path, functools.partial(_read_into, source, entry.path))


def _read_into(source: Any, path: str, part: Path) -> None:
    with part.open("wb") as file:
        for chunk in source.read_file(path):
            file.write(chunk)


def report(config: Config, results: dict[str, Any]) -> str:
    """The write-up's table: an SAE a row, the mean over seeds."""
    rows = []
    for sae in config.saes:
        of_seeds = [evaluation_of(run) for run in results["runs"] if run["sae"] == sae]
        fvu, l0, dead = (np.mean([e[k] for e in of_seeds]) for k in ("fvu", "l0", "dead_share"))
        rows.append([sae, f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}"])
    where = f"{config.seeds} seed(s), on held-out tokens"
    return (
        table([f"TinyStories, {where}", "FVU", "L0", "dead"], rows)
        + f"\n{results['seconds']:.0f} s; results.json, metrics, figures and checkpoints are in "
        f"{Path(config.out) / name_of(config)}"
    )


def run(config: Config) -> dict[str, Any]:
    """The whole comparison without Modal: every body here, on the folder `config.volume`.

    Returns its results. Raises `UserError` where the input is wrong or a part failed.
    """
    check(config)
    make_folder(Path(config.volume), "--volume")
    with one_writer(Path(config.volume), "--volume"):
        results = checked(config, _here(compare, config, config.volume))
    name = name_of(config)
    shutil.copytree(
        Path(config.volume) / "runs" / name, Path(config.out) / name, dirs_exist_ok=True
    )
    return results


if __name__ == "__main__":
    with main_guard():
        config = parse(None)
        print(report(config, run(config)))
