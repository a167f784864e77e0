"""The TinyStories comparison on Modal: cache once to a Volume, train each SAE on a GPU of its own.

    modal run modal_tinystories.py --tokens 5000000 --n-steps 3000            # smoke run
    modal run modal_tinystories.py --n-latents 3072 --target-l0 30 --lr 0.001 # the comparison

The same without Modal, one container's work after another, on a folder in the Volume's place:

    python modal_tinystories.py --volume runs/volume --tokens 100000 --n-steps 200

What runs where: `compare` in a CPU container starts the others and waits for them; `cache_part` in
--cache-workers GPU containers side by side; `train_one` in a GPU container an SAE and seed. Each of
them calls the scripts, and can be called again with the same input: it goes on where it was. The
entrypoint, here, says what will be used, waits for `compare`, prints the table, downloads the run.

On the Volume: caches/MAKE.TOKENS/, a cache of activations, and runs/NAME/, a comparison.
"""

import contextlib
import dataclasses
import functools
import hashlib
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

import cache_activations
import evaluate
import plots
import script
import train_tinystories
from cache_activations import MANIFEST, RESIDENT_SHARE, TOKEN_BYTES
from script import UserError, setting

ROOT = "/volume"  # where the Volume is in a container

# By the names that Modal gives them: memory in GB, and peak float32 TFLOP/s, of the data sheets.
GPUS = {
    "T4": (16, 8.1),
    "L4": (24, 30.3),
    "A10": (24, 31.2),
    "L40S": (48, 91.6),
    "A100": (40, 19.5),
    "A100-40GB": (40, 19.5),
    "A100-80GB": (80, 19.5),
    "RTX-PRO-6000": (96, 125),
    "H100": (80, 67),
    "H100!": (80, 67),
    "H200": (141, 67),
    "B200": (180, 75),
    "B200+": (180, 75),
}


def as_in(config_class: type, name: str) -> Any:
    """The setting `name` of a script's Config: its default, its help, its choices."""
    field = next(f for f in dataclasses.fields(config_class) if f.name == name)
    return setting(field.default, **field.metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting. Those of the scripts have the scripts' defaults: the write-up's comparison."""

    model: str = as_in(cache_activations.Config, "model")
    model_revision: str | None = as_in(cache_activations.Config, "model_revision")
    dataset: str = as_in(cache_activations.Config, "dataset")
    dataset_revision: str | None = as_in(cache_activations.Config, "dataset_revision")
    tokens: int = as_in(cache_activations.Config, "tokens")
    validation_tokens: int = setting(500_000, "activations of the validation split to evaluate on")
    layer: int = as_in(cache_activations.Config, "layer")
    dtype: str = as_in(cache_activations.Config, "dtype")
    keep_begin: bool = as_in(cache_activations.Config, "keep_begin")
    rows_per_shard: int = as_in(cache_activations.Config, "rows_per_shard")

    n_latents: int = as_in(train_tinystories.Config, "n_latents")
    n_prefixes: int = as_in(train_tinystories.Config, "n_prefixes")
    target_l0: float = as_in(train_tinystories.Config, "target_l0")
    lr: float = as_in(train_tinystories.Config, "lr")
    n_steps: int = as_in(train_tinystories.Config, "n_steps")
    batch_size: int = as_in(train_tinystories.Config, "batch_size")
    prefixes: str = as_in(train_tinystories.Config, "prefixes")
    products: str = as_in(train_tinystories.Config, "products")
    refit: bool = as_in(train_tinystories.Config, "refit")
    sparsity: str = as_in(train_tinystories.Config, "sparsity")
    sparsity_weight: float = as_in(train_tinystories.Config, "sparsity_weight")
    seed: int = as_in(train_tinystories.Config, "seed")
    seeds: int = setting(1, "how many seeds, from --seed on; each trains two SAEs")
    checkpoint_every: int = as_in(train_tinystories.Config, "checkpoint_every")

    gpu: str = setting("H100", "GPU of a caching or training container: " + ", ".join(GPUS))
    cache_workers: int = setting(3, "containers that cache side by side, a GPU each")
    volume: str = setting(
        "matryoshka-tinystories", "Modal Volume, made where missing; without Modal, a folder"
    )
    name: str | None = setting(None, "the comparison's name; default: made of its settings")
    out: str = setting("runs/tinystories", "folder here; the comparison goes to NAME/ in it")


# Settings that do not change what an SAE becomes: they may differ between a run and its going on.
ELSEWHERE = ("seed", "seeds", "checkpoint_every", "gpu", "cache_workers", "volume", "name", "out")


def check(config: Config) -> None:
    """Raises `UserError` where a setting is impossible, before anything has started."""
    script.require_positive(config, "tokens", "validation_tokens", "rows_per_shard")
    script.require_positive(config, "seeds", "cache_workers")
    script.require_not_negative(config, "layer")
    train_tinystories.check(train_config(config, "", "", "vanilla", config.seed))
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
    """The settings that shape an SAE."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def cache_config(config: Config, root: str, split: str, tokens: int) -> cache_activations.Config:
    """How a cache is made, and where: a folder named by what it is made of."""
    made = cache_activations.Config(
        model=config.model,
        model_revision=config.model_revision,
        dataset=config.dataset,
        dataset_revision=config.dataset_revision,
        split=split,
        tokens=tokens,
        layer=config.layer,
        dtype=config.dtype,
        keep_begin=config.keep_begin,
        rows_per_shard=config.rows_per_shard,
    )
    make = dataclasses.asdict(made)
    for key in ("tokens", "out", "device", "batch_size"):
        del make[key]
    parts = [Path(config.model).name, Path(config.dataset).name, split, f"layer{config.layer}"]
    slug = ".".join(re.sub(r"[^\w-]+", "_", part) for part in [*parts, config.dtype])
    return dataclasses.replace(made, out=f"{root}/caches/{slug}.{short_hash(make)}.{tokens}")


def train_config(
    config: Config, root: str, cache: str, sae: str, seed: int
) -> train_tinystories.Config:
    """How one SAE is trained on the cache in the folder `cache`, and where it goes."""
    return train_tinystories.Config(
        cache=cache,
        sae=sae,
        n_latents=config.n_latents,
        n_prefixes=config.n_prefixes,
        target_l0=config.target_l0,
        lr=config.lr,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        prefixes=config.prefixes,
        products=config.products,
        refit=config.refit,
        sparsity=config.sparsity,
        sparsity_weight=config.sparsity_weight,
        seed=seed,
        out=f"{root}/runs/{name_of(config)}/{sae}_seed{seed}",
        resume=True,
        checkpoint_every=config.checkpoint_every,
    )


# -------------------------------------------------------------------------------------- the plan

# TinyModel and its rows, for the plan only: the scripts read shapes off the weights.
D_MODEL, D_MLP, SEQ = 768, 3072, 128
JSON_BYTES = 533  # a row of train.jsonl: 1.44 GB over 2.7M rows

# (rate, where it is from). "measured here" is on 2 busy CPU cores, without Modal.
TOKENS_A_ROW = 93.8, "measured: 349,677 activations in 3,727 rows"
READ_ROWS = 6_000, "measured here: rows/s of cache_activations.read_rows"
HASH = 1.2e9, "measured here: bytes/s of SHA-256 on one core"
VOLUME_READ = 1.0e9, "assumed: bytes/s a container; Modal says up to 2.5e9"
VOLUME_WRITE = 0.5e9, "assumed: bytes/s a container"
DISK = 1.0e9, "assumed: bytes/s of a container's own disk"
GPU_SHARE = 0.4, "assumed: share of the GPU's peak in float32, whatever --products"
STEP_FLOOR = 1e-3, "assumed: no step is faster, by its many small kernels"
STEP_FACTOR = 2.0, "assumed, after 2.16 measured for the original: FLOPs over five dense products"
EVALUATE = 60.0, "assumed: seconds"
START = 60.0, "assumed: seconds until a container has imported torch; the image is built once"


@dataclasses.dataclass(frozen=True)
class Phase:
    """One row of the plan: what one of its containers reads, writes and computes, and how long."""

    what: str
    containers: int
    on_gpu: bool
    read: float  # bytes off the hub or the Volume, all containers together; so the next two
    kept: float  # on the Volume
    flops: float
    seconds: float  # of the longest container
    from_rates: tuple[str, ...]


def plan(config: Config) -> list[Phase]:
    """Where the time goes, for TinyModel and its token data, when nothing is cached yet."""
    memory, peak = GPUS[config.gpu]
    gpu = 1e12 * peak * GPU_SHARE[0]  # FLOP/s
    each = D_MODEL * cache_activations.DTYPES[config.dtype].itemsize + TOKEN_BYTES
    tokens = config.tokens + config.validation_tokens
    rows = tokens / TOKENS_A_ROW[0]
    n_bytes = config.tokens * each
    a_position = 2 * (4 * D_MODEL**2 + 2 * D_MODEL * D_MLP) + 4 * SEQ * D_MODEL
    flops = rows * SEQ * config.layer * a_position
    workers = config.cache_workers
    # Each reads the file from its first row up to its own last one: half of it, on average.
    caching = rows / READ_ROWS[0] + max(
        flops / workers / gpu, tokens * each / workers * (1 / HASH[0] + 1 / VOLUME_WRITE[0])
    )
    n_saes = 2 * config.seeds
    a_step = STEP_FACTOR[0] * 5 * 2 * config.batch_size * D_MODEL * config.n_latents
    held = n_bytes * (1 - TOKEN_BYTES / each) <= RESIDENT_SHARE * 1e9 * memory
    reads = 2 if held else 1  # of the Volume: to check and to load, or to copy to the own disk
    steps = config.n_steps * max(a_step / gpu, STEP_FLOOR[0])
    passes = config.n_steps * config.batch_size / config.tokens
    from_disk = 0 if held else n_bytes * passes / DISK[0]
    training = n_bytes * (reads / VOLUME_READ[0] + 1 / HASH[0]) + max(steps, from_disk)
    return [
        Phase(
            "count the rows",
            *(1, False, rows * JSON_BYTES, 0, 0, START[0] + rows / READ_ROWS[0]),
            (TOKENS_A_ROW[1], READ_ROWS[1], START[1]),
        ),
        Phase(
            "cache",
            *(workers, True, rows * JSON_BYTES * (workers + 1) / 2, tokens * each, flops),
            START[0] + caching,
            (READ_ROWS[1], GPU_SHARE[1], HASH[1], VOLUME_WRITE[1]),
        ),
        Phase(
            "check the cache, " + ("load it" if held else "stream it") + ", train",
            *(n_saes, True, n_saes * n_bytes * reads),
            n_saes * 8 * D_MODEL * config.n_latents * 4,  # the SAE, and a checkpoint: 3 times it
            n_saes * config.n_steps * a_step,
            START[0] + training,
            (VOLUME_READ[1], HASH[1], STEP_FACTOR[1], STEP_FLOOR[1]),
        ),
        Phase(
            "evaluate, in the same container",
            *(n_saes, True, n_saes * config.validation_tokens * each, 0, 0, EVALUATE[0]),
            (EVALUATE[1],),
        ),
    ]


def plan_text(config: Config) -> str:
    """The plan as a table, and its sum in a sentence."""
    phases = plan(config)
    rows = [
        [
            phase.what,
            f"{phase.containers} x {config.gpu if phase.on_gpu else 'CPU'}",
            f"{phase.read / 1e9:.1f}",
            f"{phase.kept / 1e9:.1f}",
            f"{phase.flops / 1e15:.2f}",
            f"{phase.seconds / 60:.1f}",
        ]
        for phase in phases
    ]
    headers = ["where the time goes", "containers", "GB read", "GB kept", "PFLOP", "min"]
    minutes = sum(phase.seconds for phase in phases) / 60
    gpu_minutes = sum(p.containers * p.seconds for p in phases if p.on_gpu) / 60
    at_once = max(phase.containers for phase in phases if phase.on_gpu)
    return (
        script.table(headers, rows)
        + f"\n{at_once} {config.gpu} at most at once, about {gpu_minutes:.0f} GPU-minutes in "
        f"{minutes:.0f} minutes, {sum(p.kept for p in phases) / 1e9:.1f} GB on the Volume "
        f"{config.volume}. A cache that is there already saves the first two rows. These are "
        "estimates, from rates that were partly assumed: see the README."
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
    with script.main_guard():
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
    parser = script.parser_for(Config, __doc__.split("\n")[0])
    parser.prog = prog or parser.prog
    config = Config(**vars(parser.parse_args(argv)))
    check(config)
    return config


def timeout(config: Config, what: str) -> int:
    """Seconds after which a container that does `what` is stopped: 5 times the plan's, 1 to 24 h.

    It is then started again, as after any failure, and goes on where it was.
    """
    planned = sum(phase.seconds for phase in plan(config) if what in phase.what)
    return int(min(max(5 * planned, 3600), 24 * 3600))


SETTINGS = typed() or Config()
MODULES = (
    "cache_activations",
    "evaluate",
    "gradients",
    "cuda_graph",
    "plots",
    "refit",
    "sae",
    "script",
    "tiny_model",
    "toy_model",
    "train_tinystories",
)

app = modal.App("matryoshka-tinystories")
volume = modal.Volume.from_name(SETTINGS.volume, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install_from_pyproject(str(Path(__file__).with_name("pyproject.toml")))
    .env({"TQDM_MININTERVAL": "5"})  # seconds: a bar is a line of the log here
    .add_local_python_source(*MODULES)
    .add_local_file(Path(__file__).with_name("concepts.json"), "/root/concepts.json")
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


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """Dataset rows `start` up to `end`, for the cache of `config`."""

    config: cache_activations.Config
    start: int
    end: int

    def __str__(self) -> str:
        return f"caching rows {self.start} to {self.end - 1} of {self.config.split}"


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
    model = cache_activations.load_model(job.config)
    try:
        return cache_activations.cache_rows(job.config, model, job.start, job.end)
    finally:
        commit()


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One SAE: how it is trained, and the cache that it is evaluated on."""

    config: train_tinystories.Config
    validation: str

    def __str__(self) -> str:
        return f"training {self.config.sae}, seed {self.config.seed}"


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
    trained = train_tinystories.run(config, on_checkpoint=commit)
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
    return n_bytes <= cache_activations.RESIDENT_SHARE * torch.cuda.mem_get_info()[0]


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
    cache, validation = make_caches(config, root)
    n_tokens = cache_activations.read_record(cache / MANIFEST).n_tokens
    jobs = [
        TrainJob(
            dataclasses.replace(
                train_config(config, root, str(cache), sae, seed),
                tokens=config.tokens if config.tokens < n_tokens else 0,
            ),
            str(validation),
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for sae in ("matryoshka", "vanilla")
    ]
    done = each(train_one, jobs)
    reload()
    draw(run, jobs, done, config.target_l0)
    results = {
        "config": dataclasses.asdict(config),
        "caches": [str(cache), str(validation)],
        "runs": [
            {"sae": job.config.sae, "seed": job.config.seed, "out": job.config.out, **result}
            for job, result in zip(jobs, done, strict=True)
        ],
        "seconds": round(time.monotonic() - began, 1),
    }
    script.write_json(run / "results.json", results)
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
    script.make_folder(run, "--volume")
    script.write_json(file, shape)
    commit()


def make_caches(config: Config, root: str) -> tuple[Path, Path]:
    """The folders of finished caches of the train and the validation split, made where missing."""
    wanted = [
        cache_config(config, root, "train", config.tokens),
        cache_config(config, root, "validation", config.validation_tokens),
    ]
    model = cache_activations.load_model(dataclasses.replace(wanted[0], device="cpu"))
    folders: list[Path] = []
    jobs: list[CacheJob] = []
    to_finish: list[tuple[Path, int]] = []
    for one, workers in zip(wanted, (config.cache_workers, 1), strict=True):
        found = finished_cache(one, cache_activations.describe(one, model))
        folders.append(found or Path(one.out))
        if found:
            print(f"{found} is complete: no token is read, no language model run", flush=True)
            continue
        script.make_folder(folders[-1], "--volume")
        print(f"counting rows for {one.out}", flush=True)
        n_rows, n_tokens = cache_activations.count_rows(one, model.d_vocab)
        if n_tokens < one.tokens:
            print(f"the {one.split} split ends after {n_tokens:,} activations", flush=True)
        to_finish.append((folders[-1], n_rows))
        ranges = cache_activations.split_rows(one, n_rows, workers)
        jobs += [CacheJob(one, start, end) for start, end in ranges]
    if jobs:
        commit()
        each(cache_part, jobs)
        reload()
        for folder, n_rows in to_finish:
            cache_activations.finish(folder, n_rows)
        commit()
    return folders[0], folders[1]


def finished_cache(wanted: cache_activations.Config, make: dict[str, Any]) -> Path | None:
    """The cache that was wished for, or for training the smallest finished one that holds it.

    Raises `UserError` where one of that name is of another make: other weights, say.
    """
    own = Path(wanted.out)
    if cache_activations.is_complete(own, make):
        return own
    if wanted.split == "train":  # figures on the validation split are of exactly what was asked
        for folder in sorted(own.parent.glob(f"{own.stem}.*"), key=n_tokens_in_name):
            if n_tokens_in_name(folder) <= wanted.tokens or not (folder / MANIFEST).exists():
                continue
            if cache_activations.read_record(folder / MANIFEST).n_tokens < wanted.tokens:
                continue  # the dataset had no more
            if cache_activations.is_complete(folder, make):
                return folder
    return None


def n_tokens_in_name(folder: Path) -> int:
    return int(folder.suffix[1:])


def draw(run: Path, jobs: Sequence[TrainJob], done: Sequence[Any], target_l0: float) -> None:
    """Both SAEs, all seeds: training curves; of the first seed: FVU by prefix, and densities."""
    curves: dict[str, dict[str, list[list[float]]]] = {}  # a metric's curve for each seed
    for job in jobs:
        metrics = Path(job.config.out) / train_tinystories.METRICS
        steps, by_sae = evaluate.training_curves(metrics)
        for what, values in by_sae[job.config.sae].items():
            curves.setdefault(job.config.sae, {}).setdefault(what, []).append(values)
    plots.training_curves(run / "training_curves.png", steps, curves, target_l0)
    pair = [evaluation_of(result) for result in done[:2]]
    plots.fvu_by_prefix(run / "fvu_by_prefix.png", {e["sae"]: e["fvu_by_prefix"] for e in pair})
    plots.density_histograms(
        run / "density_histograms.png",
        {
            e["sae"]: np.array(e["fired"]) / result["evaluation"]["cache"]["n_tokens"]
            for e, result in zip(pair, done, strict=False)
        },
    )


def evaluation_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation of a run of one SAE says of it."""
    (one,) = result["evaluation"]["runs"]
    return one


def each(function: modal.Function, jobs: Sequence[Any]) -> list[Any]:
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


def _here(function: modal.Function, *args: Any) -> Any:
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
        return outcome
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
        script.make_folder(path.parent)
        script.write_atomically(path, functools.partial(_read_into, source, entry.path))


def _read_into(source: Any, path: str, part: Path) -> None:
    with part.open("wb") as file:
        for chunk in source.read_file(path):
            file.write(chunk)


def report(config: Config, results: dict[str, Any]) -> str:
    """The write-up's table: an SAE a row, the mean over seeds."""
    rows = []
    for sae in ("matryoshka", "vanilla"):
        of_seeds = [evaluation_of(run) for run in results["runs"] if run["sae"] == sae]
        fvu, l0, dead = (np.mean([e[k] for e in of_seeds]) for k in ("fvu", "l0", "dead_share"))
        rows.append([sae, f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}"])
    where = f"{config.seeds} seed(s), on held-out tokens"
    return (
        script.table([f"TinyStories, {where}", "FVU", "L0", "dead"], rows)
        + f"\n{results['seconds']:.0f} s; results.json, metrics, figures and checkpoints are in "
        f"{Path(config.out) / name_of(config)}"
    )


def run(config: Config) -> dict[str, Any]:
    """The whole comparison without Modal: every body here, on the folder `config.volume`.

    Returns its results. Raises `UserError` where the input is wrong or a part failed.
    """
    check(config)
    script.make_folder(Path(config.volume), "--volume")
    with cache_activations.writer_lock(Path(config.volume)):
        results = checked(config, _here(compare, config, config.volume))
    name = name_of(config)
    shutil.copytree(
        Path(config.volume) / "runs" / name, Path(config.out) / name, dirs_exist_ok=True
    )
    return results


if __name__ == "__main__":
    with script.main_guard():
        config = parse(None)
        print(report(config, run(config)))
