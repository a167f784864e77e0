"""Before torch is imported: one thread a process. Tests are small, and run side by side.

And before the hub's client is: no test asks the hub for anything.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
from collections.abc import Iterator

import pytest
import torch

from matryoshka.process import threads

OF_KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")  # what `fix_kernels` sets
# A shell starts what runs in the background with Ctrl-C ignored, and so would all processes be that
# tests start: those that are sent Ctrl-C would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
(torch.ones(8, 8) @ torch.ones(8, 8)).exp()  # now this process has chosen its kernels


@pytest.fixture(autouse=True)
def kernels_as_chosen() -> Iterator[None]:
    """A toy run in this process must not let later tests' processes choose other kernels."""
    before = {name: os.environ.get(name) for name in OF_KERNELS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of floats depend on how many threads share them: as the processes that a test starts."""
    with threads(1):
        yield
