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

import train_toy
from matryoshka.toy_report import figures_of
from train_toy import Config

ROOT = Path(__file__).parents[1]
SHORT: dict[str, Any] = {"n_steps": 120, "batch_size": 50, "n_eval": 2_000, "workers": 1}


UNDRAWN = """
import sys, train_toy
train_toy.draw = lambda *_: None
train_toy.main(sys.argv[1:])
"""


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
def started(*args: object) -> Iterator["subprocess.Popen[str]"]:
    """The script in a group of processes of its own, of which none outlives the test."""
    process = subprocess.Popen(
        command(*args), cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until_training(process: "subprocess.Popen[str]") -> None:
    """Reads stderr until the bar shows that every SAE is trained."""
    assert process.stderr is not None
    seen = ""
    while seen.count("FVU") < 2:
        character = process.stderr.read(1)
        assert character, f"it ended: {seen}"
        seen += character


def short_run_in(out: Path, **settings: Any) -> dict[str, Any]:
    return train_toy.run(Config(out=str(out), **(SHORT | settings)))


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must repeat: everything but the time and where it was written."""
    return [dict(run) for run in results["runs"]]


def children(pid: int) -> list[int]:
    """The worker processes of a process; not multiprocessing's tracker of resources."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = {int(p): Path(f"/proc/{p}/cmdline").read_bytes() for p in found}
    return [p for p, line in words.items() if b"spawn_main" in line]


def wait_for_children(pid: int, n: int) -> list[int]:
    deadline = time.monotonic() + 300
    while len(children(pid)) < n:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return children(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
