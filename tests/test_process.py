"""Signals that wait for the end of a step."""

import os
import signal

import pytest

from matryoshka import process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_waits_and_a_second_one_does_not(number: int) -> None:
    before = signal.getsignal(number)
    with process.deferring_signals() as caught:
        os.kill(os.getpid(), number)
        assert caught == [number]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
