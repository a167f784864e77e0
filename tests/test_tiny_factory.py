"""What the tests leave behind: no processes."""

import multiprocessing
import os
import time
from typing import Any

import pytest
from tiny_factory import die_with_parent, fresh_processes


def sleep_on(ready: Any, seconds: float) -> None:
    """In a process of its own: says that it is there, and never ends by itself."""
    die_with_parent(seconds)
    ready.send(os.getpid())
    while True:
        time.sleep(1)


def start_a_sleeper(ready: Any, seconds: float) -> None:
    """In a process of its own: starts another, and waits for it."""
    die_with_parent()
    sleeper = multiprocessing.get_context("fork").Process(target=sleep_on, args=(ready, seconds))
    sleeper.start()
    ready.close()
    sleeper.join()


@pytest.mark.parametrize("seconds", [0.5, 1000])
def test_no_process_outlives_the_tests_that_started_it(seconds: float) -> None:
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    starter = context.Process(target=start_a_sleeper, args=(send, seconds))
    starter.start()
    send.close()
    assert receive.poll(300)
    receive.recv()
    if seconds == 1000:
        starter.kill()
    assert receive.poll(300)
    with pytest.raises(EOFError):  # nobody is left who could send
        receive.recv()
    starter.join(300)
    assert starter.exitcode is not None
