"""Estimates the time and storage of a comparison on Modal, for TinyModel and its token data.

docs/modal.md has a table of the assumptions. Nothing here needs torch.
"""

from collections.abc import Sequence
from typing import Any

# By Modal's name of a GPU: its memory in GB and its peak float32 TFLOP/s, from the data sheets.
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
D_MODEL, D_MLP, SEQ = 768, 3072, 128
TOKENS_A_ROW = 93.8
READ_ROWS = 6_000  # rows/s that are read and checked
HASH = 4 * 1.2e9  # bytes/s of SHA-256 on four cores
VOLUME_READ, VOLUME_WRITE = 1.0e9, 0.5e9  # bytes/s for each container
COMMIT = 2.0  # seconds for a commit, without the writing
GPU_SHARE = 0.4  # the share of the GPU's float32 peak that is reached
# A step of one SAE takes at least so many seconds, because of the host's work; and so many times
# the FLOPs of five dense products.
STEP_FLOOR, STEP_FACTOR = 5e-3, 2.0
EVALUATE, START = 60.0, 60.0  # seconds to evaluate, and until a container has started


def estimate(
    comparison: Any, gpu: str, workers: int, is_cached: Sequence[bool] = (False, False)
) -> dict[str, float]:
    """Returns "minutes" until the end, billed "gpu_minutes", and "gb", new on the Volume.

    is_cached: whether the train and the validation cache are finished already.
    """
    training, cache = comparison.training, comparison.cache
    sizes = (cache.tokens, comparison.config.validation_tokens)
    missing = [0 if is_there else n for n, is_there in zip(sizes, is_cached, strict=True)]
    an_activation = D_MODEL * (4 if cache.dtype == "float32" else 2) + 12
    flops = 1e12 * GPUS[gpu][1] * GPU_SHARE  # a second
    of_token = SEQ * cache.layer * (2 * (4 * D_MODEL**2 + 2 * D_MODEL * D_MLP) + 4 * SEQ * D_MODEL)
    a_token = max(
        of_token / TOKENS_A_ROW / flops, an_activation * (4 / HASH + 1 / VOLUME_WRITE)
    )  # seconds to cache it
    containers = caching_containers(workers, is_cached)
    caching = [
        START + n / TOKENS_A_ROW / READ_ROWS + n * a_token / many if many else 0.0
        for n, many in zip(missing, containers, strict=True)
    ]

    step = STEP_FACTOR * 5 * 2 * training.batch_size * D_MODEL * training.n_latents / flops
    n_together = len(training.targets)  # SAEs in a container; a step trains one after another
    steps = n_together * training.n_steps * max(step, STEP_FLOOR)
    saes = n_together * 8 * D_MODEL * training.n_latents  # bytes
    commits = steps / 60 * (COMMIT + 3 * saes / VOLUME_WRITE)
    reading = cache.tokens * an_activation / min(VOLUME_READ, HASH)
    train = START + reading + steps + commits + EVALUATE
    n_containers = len(comparison.kinds) * comparison.config.seeds
    counting = START + sum(missing) / TOKENS_A_ROW / READ_ROWS
    cached = sum(many * seconds for many, seconds in zip(containers, caching, strict=True))
    return {
        "minutes": (counting + max(caching) + train) / 60,
        "gpu_minutes": (cached + n_containers * train) / 60,
        "gb": (sum(missing) * an_activation + n_containers * 4 * saes) / 1e9,
    }


def caching_containers(workers: int, is_cached: Sequence[bool]) -> tuple[int, int]:
    """How many containers cache the train split, and how many the validation split, at once."""
    train, validation = is_cached
    return (0 if train else workers, 0 if validation else 1)


def plan_text(
    comparison: Any, gpu: str, workers: int, is_cached: Sequence[bool] = (False, False)
) -> str:
    """The estimate in three lines."""
    e = estimate(comparison, gpu, workers, is_cached)
    n_containers = len(comparison.kinds) * comparison.config.seeds
    n_caching = sum(caching_containers(workers, is_cached))
    first = f"{n_caching} {gpu} cache, then " if n_caching else ""
    is_there = ["is cached already" if there else "is not cached yet" for there in is_cached]
    return (
        f"{first}{n_containers} {gpu} train: about {e['gpu_minutes']:.0f} GPU-minutes in "
        f"{e['minutes']:.0f} minutes, {e['gb']:.1f} GB new on the Volume.\n"
        f"The train split {is_there[0]}, the validation split {is_there[1]}.\n"
        "Estimates, partly of assumed rates: docs/modal.md."
    )
