"""What a comparison on Modal is expected to take, before it is started. docs/modal.md shows it.

For TinyModel and its token data, with nothing cached yet. Rates marked "measured" are of two busy
CPU cores without Modal.
"""

import dataclasses
from typing import Protocol

from matryoshka.cache_format import DTYPES, TOKEN_BYTES
from matryoshka.cache_reader import RESIDENT_SHARE
from matryoshka.command_line import table

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

# TinyModel and its rows, for the plan only: the scripts read shapes off the weights.
D_MODEL, D_MLP, SEQ = 768, 3072, 128
JSON_BYTES = 533  # a row of train.jsonl: 1.44 GB over 2.7M rows
TOKENS_A_ROW = 93.8  # measured: 349,677 activations in 3,727 rows
READ_ROWS = 6_000  # rows/s read and checked: measured
HASH = 1.2e9  # bytes/s of SHA-256 on one core: measured
VOLUME_READ = 1.0e9  # bytes/s a container: assumed; Modal says up to 2.5e9
VOLUME_WRITE = 0.5e9  # bytes/s a container: assumed
DISK = 1.0e9  # bytes/s of a container's own disk: assumed
GPU_SHARE = 0.4  # of the GPU's peak in float32: assumed, whatever --matmul-dtype
STEP_FLOOR = 1e-3  # seconds; no step is faster, by its many small kernels: assumed
STEP_FACTOR = 2.0  # FLOPs over five dense products: assumed, after 2.16 for the original
EVALUATE = 60.0  # seconds: assumed
START = 60.0  # seconds until a container has imported torch: assumed; the image is built once


class Comparison(Protocol):
    """The settings that the plan depends on."""

    @property
    def tokens(self) -> int: ...
    @property
    def validation_tokens(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def n_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def saes(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def gpu(self) -> str: ...
    @property
    def cache_workers(self) -> int: ...
    @property
    def volume(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """One row of the plan: what its containers read, write and compute together, and how long."""

    what: str
    containers: int
    on_gpu: bool
    seconds: float  # of the longest container
    read: float = 0.0  # bytes off the hub or the Volume
    kept: float = 0.0  # bytes on the Volume
    flops: float = 0.0


def plan(config: Comparison) -> list[Phase]:
    """Where the time goes."""
    rows = (config.tokens + config.validation_tokens) / TOKENS_A_ROW
    counting = Phase("count the rows", 1, False, START + rows / READ_ROWS, read=rows * JSON_BYTES)
    return [counting, _caching(config, rows), _training(config), _evaluation(config)]


def _bytes_each(config: Comparison) -> int:
    """Of an activation in the cache, with its token."""
    return D_MODEL * DTYPES[config.dtype].itemsize + TOKEN_BYTES


def _flops(config: Comparison) -> float:
    """That a GPU is assumed to do in a second."""
    return 1e12 * GPUS[config.gpu][1] * GPU_SHARE


def _caching(config: Comparison, rows: float) -> Phase:
    workers = config.cache_workers
    a_position = 2 * (4 * D_MODEL**2 + 2 * D_MODEL * D_MLP) + 4 * SEQ * D_MODEL
    flops = rows * SEQ * config.layer * a_position
    n_bytes = (config.tokens + config.validation_tokens) * _bytes_each(config)
    writing = n_bytes / workers * (1 / HASH + 1 / VOLUME_WRITE)
    # Each reads the file from its first row up to its last one: half of it, on average.
    seconds = START + rows / READ_ROWS + max(flops / workers / _flops(config), writing)
    read = rows * JSON_BYTES * (workers + 1) / 2
    return Phase("cache", workers, True, seconds, read, n_bytes, flops)


def _training(config: Comparison) -> Phase:
    n_saes, each = len(config.saes) * config.seeds, _bytes_each(config)
    n_bytes = config.tokens * each
    acts_bytes = n_bytes * (1 - TOKEN_BYTES / each)
    is_held = acts_bytes <= RESIDENT_SHARE * 1e9 * GPUS[config.gpu][0]
    reads = 2 if is_held else 1  # of the Volume: to check and to load, or to copy to the disk
    a_step = STEP_FACTOR * 5 * 2 * config.batch_size * D_MODEL * config.n_latents
    steps = config.n_steps * max(a_step / _flops(config), STEP_FLOOR)
    passes = config.n_steps * config.batch_size / config.tokens
    from_disk = 0 if is_held else n_bytes * passes / DISK
    seconds = START + n_bytes * (reads / VOLUME_READ + 1 / HASH) + max(steps, from_disk)
    return Phase(
        "check the cache, " + ("load it" if is_held else "stream it") + ", train",
        n_saes,
        True,
        seconds,
        read=n_saes * n_bytes * reads,
        kept=n_saes * 8 * D_MODEL * config.n_latents * 4,  # the SAE; a checkpoint is 3 times it
        flops=n_saes * config.n_steps * a_step,
    )


def _evaluation(config: Comparison) -> Phase:
    n_saes = len(config.saes) * config.seeds
    read = n_saes * config.validation_tokens * _bytes_each(config)
    return Phase("evaluate, in the same container", n_saes, True, EVALUATE, read)


def plan_text(config: Comparison) -> str:
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
        table(headers, rows) + f"\n{at_once} {config.gpu} at most at once, about "
        f"{gpu_minutes:.0f} GPU-minutes in {minutes:.0f} minutes, "
        f"{sum(p.kept for p in phases) / 1e9:.1f} GB on the Volume {config.volume}. A cache that "
        "is there already saves the first two rows. These are estimates, from rates that were "
        "partly assumed: see docs/modal.md."
    )


def timeout(config: Comparison, what: str) -> int:
    """Seconds after which a container that does `what` is stopped: 5 times the plan's, 1 to 24 h.

    It is then started again, as after any failure, and goes on where it was.
    """
    planned = sum(phase.seconds for phase in plan(config) if what in phase.what)
    return int(min(max(5 * planned, 3600), 24 * 3600))
