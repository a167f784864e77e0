"""Short runs of train_toy.py for its tests, and the processes of one that is started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import train_toy
from matryoshka.toy_report import figures_of
from matryoshka.trainer import Trainer
from train_toy import Config

ROOT = Path(__file__).parents[1]
SHORT: dict[str, Any] = {"n_steps": 30, "batch_size": 50, "n_eval": 1_000, "workers": 1}


UNDRAWN = """
import sys, train_toy
train_toy.draw = lambda *_: None
train_toy.main(sys.argv[1:])
"""

NOTED = """
import sys, toy_commands, train_toy
run = train_toy.run
train_toy.run = lambda config, **rest: run(config, toy_commands.Noted, **rest)
train_toy.main(sys.argv[1:])
"""


class Noted(Trainer):
    """Leaves a file in the folder `NOTES` as its process takes a step, called by its number."""

    def step(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        Path(os.environ["NOTES"], str(os.getpid())).touch()
        return super().step(x)


def blank_figures(config: Config, *_: object) -> None:
    """In the place of `train_toy.draw`, which takes most of a short run's time: files of the
    figures' names, with nothing in them."""
    for name in figures_of(config.seeds):
        (Path(config.out) / name).touch()


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "train_toy.py"), *map(str, args)]


def cli(*args: object, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    return _completed(command(*args), **kwargs)


def undrawn_cli(*args: object, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, without its figures."""
    return _completed([sys.executable, "-c", UNDRAWN, *map(str, args)], **kwargs)


def _completed(words: list[str], **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs)


@contextlib.contextmanager
def started(notes: Path, *args: object) -> Iterator["subprocess.Popen[str]"]:
    """The script in a group of processes of its own, of which none outlives the test; each that
    trains is noted in the folder `notes`."""
    process = subprocess.Popen(
        [sys.executable, "-c", NOTED, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"NOTES": str(notes), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_training(process: "subprocess.Popen[str]", notes: Path, n: int) -> list[int]:
    """Waits until `n` processes train, and returns their numbers."""
    deadline = time.monotonic() + 300
    while len(found := [int(path.name) for path in notes.iterdir()]) < n:
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def short_run_in(out: Path, **settings: Any) -> dict[str, Any]:
    return train_toy.run(Config(out=str(out), **(SHORT | settings)))


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must repeat: everything but the time and where it was written."""
    return [dict(run) for run in results["runs"]]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may end between being opened and read
        return False
    return state != "Z"
