"""The toy's seeds in stacks, trained side by side in processes, with one progress bar for all."""

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

if TYPE_CHECKING:  # scripts import this module, which needs them for its annotations alone
    from toy_model import ToyData
    from train_toy import Config

SEEDS_A_STACK = 10  # on a CPU: a stack whose activations stay in a core's cache is fastest a seed


def train_stacks(
    config: "Config", data: "ToyData", trainer_class: type[Trainer] = Trainer
) -> Iterator[StackResult]:
    """Trains and scores every seed, in stacks; yields the stacks in order of seed.

    On a CPU they are side by side in processes. Raises `UserError` as `train_stack`, and where a
    process was killed.
    """
    on_cpu = config.device == "cpu"
    workers = min(config.workers, config.seeds) if on_cpu else 1
    size = min(SEEDS_A_STACK, math.ceil(config.seeds / workers)) if on_cpu else config.seeds
    seeds = range(config.seed, config.seed + config.seeds)
    stacks = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    progress = Progress(multiprocessing.get_context("spawn"), config.saes)
    executor = _executor(len(stacks), workers, progress)
    with executor, _bar(len(stacks) * config.n_steps) as bar:
        with ignoring_ctrl_c():  # processes that begin here inherit this: Ctrl-C is the parent's
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
                "a worker process was killed, perhaps since the memory was full: try fewer "
                "--workers, or a smaller --n-eval"
            ) from None
        finally:
            progress.stop.set()
            executor.shutdown(cancel_futures=True)


def _executor(n_stacks: int, workers: int, progress: Progress) -> concurrent.futures.Executor:
    """Processes; for one stack only a thread, beside that of the progress bar."""
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
    """Updates the bar, in which the figures of every SAE stand where a bar would be."""
    width = shutil.get_terminal_size().columns - len("100% 00:00:00<00:00:00 ") - 1
    bar.set_description_str(progress.text(width), refresh=False)
    bar.update(progress.steps.value - bar.n)
    bar.refresh()


_progress: Progress | None = None


def _begin_worker(progress: Progress) -> None:
    """In a worker: remembers the progress that it shares with the parent, and dies with it."""
    global _progress
    _progress = progress
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_after, args=(parent,), daemon=True).start()


def _die_after(parent: Any) -> None:
    """Ends this process when its parent has ended, however that was."""
    parent.join()
    os._exit(1)


def _pickled_stack(
    config: "Config", data: "ToyData", seeds: Sequence[int], trainer_class: type[Trainer]
) -> bytes:
    """In a worker: the result of `train_stack`, on one thread, for its tensors are small.

    It is pickled here, by value: PyTorch would hand over each tensor as an open file, of which a
    process may have a thousand.
    """
    assert _progress is not None
    with threads(1):
        return pickle.dumps(train_stack(config, data, seeds, _progress, trainer_class))
