"""Trains the toy's seeds, in stacks, in several processes at once, with one progress bar."""

import concurrent.futures.process
import math
import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from matryoshka.errors import UserError
from matryoshka.process import ignoring_ctrl_c, threads
from matryoshka.toy_progress import Progress
from matryoshka.toy_stack import StackResult, train_stack
from matryoshka.trainer import Trainer

if TYPE_CHECKING:  # for annotations only, because these scripts import this module
    from toy_model import ToyData
    from train_toy import Config

# Seeds in a stack on a CPU: few enough that its activations stay in a core's cache.
SEEDS_A_STACK = 10


def train_stacks(
    config: "Config", data: "ToyData", trainer_class: type[Trainer] = Trainer
) -> Iterator[StackResult]:
    """Trains and scores every seed, in stacks; yields the stacks in the order of their seeds.

    On a CPU, the stacks are divided among processes. Raises `UserError` as `train_stack` does, and
    if a process was killed.
    """
    on_cpu = config.device == "cpu"
    workers = min(config.workers, config.seeds) if on_cpu else 1
    size = min(SEEDS_A_STACK, math.ceil(config.seeds / workers)) if on_cpu else config.seeds
    seeds = range(config.seed, config.seed + config.seeds)
    stacks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    progress = Progress(multiprocessing.get_context("spawn"), config.saes)
    executor = _executor(len(stacks), workers, progress)
    with executor, _bar(len(stacks) * config.n_steps) as bar:
        with ignoring_ctrl_c():  # processes started here inherit this; the parent handles Ctrl-C
            futures = [
                executor.submit(_pickled_stack, config, data, stack, trainer_class)
                for stack in stacks
            ]
        try:
            for future in futures:
                while concurrent.futures.wait([future], timeout=0.2).not_done:
                    _show(bar, progress)
                yield pickle.loads(future.result())
            _show(bar, progress)
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because the memory was full: try fewer "
                "--workers, or a smaller --n-eval"
            ) from None
        finally:
            progress.stop.set()
            executor.shutdown(cancel_futures=True)


def _executor(n_stacks: int, workers: int, progress: Progress) -> concurrent.futures.Executor:
    """A pool of processes; for one stack, a single thread."""
    if n_stacks == 1:
        return concurrent.futures.ThreadPoolExecutor(
            1, initializer=_begin_worker, initargs=(progress,)
        )
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(
        min(workers, n_stacks), mp_context=context, initializer=_begin_worker, initargs=(progress,)
    )


def _bar(total: int) -> "tqdm[Any]":
    form = "{percentage:3.0f}% {elapsed}<{remaining} {desc}"
    return tqdm(total=total, bar_format=form, smoothing=0.05, dynamic_ncols=True)


def _show(bar: "tqdm[Any]", progress: Progress) -> None:
    """Updates the progress bar, which shows the figures of every SAE instead of a bar."""
    width = shutil.get_terminal_size().columns - len("100% 00:00:00<00:00:00 ") - 1
    bar.set_description_str(progress.text(width), refresh=False)
    bar.update(progress.steps.value - bar.n)
    bar.refresh()


_progress: Progress | None = None


def _begin_worker(progress: Progress) -> None:
    """Runs first in a worker: stores the shared progress, and ends the worker with its parent."""
    global _progress
    _progress = progress
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_after, args=(parent,), daemon=True).start()


def _die_after(parent: Any) -> None:
    """Ends this process when its parent has ended, for whatever reason."""
    parent.join()
    os._exit(1)


def _pickled_stack(
    config: "Config", data: "ToyData", seeds: Sequence[int], trainer_class: type[Trainer]
) -> bytes:
    """Runs in a worker: the pickled result of `train_stack`, on one thread, as tensors are small.

    It is pickled here because PyTorch would pass each tensor as an open file, and a process may
    only have about a thousand of these.
    """
    assert _progress is not None
    with threads(1):
        return pickle.dumps(train_stack(config, data, seeds, _progress, trainer_class))
