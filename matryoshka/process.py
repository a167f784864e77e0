"""Signals and threads of a script's process."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Ctrl-C does nothing meanwhile; processes started meanwhile ignore it for good."""
    in_main = in_main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def in_main_thread() -> bool:
    """Whether this thread may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def deferring_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM meanwhile only join the list that this yields; a second one interrupts.

    So a loop can come to the end of a step, write what it has, and raise `KeyboardInterrupt`.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ()
    before = {n: signal.getsignal(n) for n in numbers}
    for n in numbers:
        if before[n] is not signal.SIG_IGN:  # as under nohup: that stays so
            signal.signal(n, catch)
    try:
        yield caught
    finally:
        for n in numbers:
            signal.signal(n, before[n])


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch on `n` threads within an operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
