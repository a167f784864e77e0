"""Signals and threads of a script's process."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """A context in which Ctrl-C does nothing. Processes started in it ignore Ctrl-C for good."""
    in_main = in_main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def in_main_thread() -> bool:
    """Whether this is the main thread, which alone may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def deferring_signals() -> Iterator[list[int]]:
    """A context in which the first Ctrl-C or SIGTERM is only appended to the list that it yields.

    So a loop can finish its step, write what it has, and then raise `KeyboardInterrupt`. A second
    signal raises `KeyboardInterrupt` at once.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ()
    before = {n: signal.getsignal(n) for n in numbers}
    for n in numbers:
        if before[n] is not signal.SIG_IGN:  # an ignored signal, as under nohup, stays ignored
            signal.signal(n, catch)
    try:
        yield caught
    finally:
        for n in numbers:
            signal.signal(n, before[n])


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """A context in which torch uses `n` threads within an operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
