"""Small trainings for tests: caches, command lines, processes that are killed, damage."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_factory import fresh_processes

import train_tinystories
from matryoshka.cache_writer import finish, write_shard
from matryoshka.training import Training
from train_tinystories import Config

ROOT = Path(__file__).parents[1]

D_MODEL, N_TOKENS = 12, 5_000

WRITTEN = {"matryoshka.safetensors", "vanilla.safetensors", "metrics.jsonl"}

# Crosses a block of prefixes (256 steps) and many passes of the cache; a record every 2 steps.
KILLED = {"n_steps": 621, "checkpoint_every": 100}  # 7 checkpoints: 6 and the last step's


def write_cache(
    folder: Path, n_tokens: int, *, d_model: int = D_MODEL, n_features: int = 48, seed: int = 0
) -> Path:
    """A float32 cache, in 4 shards, of sums of sparse features: 3 of 48 in the mean."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d_model, generator=generator)
    n_rows = -(-n_tokens // 100)
    per_shard = -(-n_rows // 4)
    make = {
        "format": 1,
        "tokens": n_tokens,
        "dtype": "float32",
        "d_model": d_model,
        "rows_per_shard": per_shard,
    }
    for first in range(0, n_rows, per_shard):
        end = min(first + per_shard, n_rows)
        i = np.arange(first * 100, min(end * 100, n_tokens))
        active = torch.rand(len(i), n_features, generator=generator) < 3 / n_features
        sizes = 0.5 + torch.rand(len(i), n_features, generator=generator)
        tokens = np.stack([i % 9000, i // 100, i % 100], axis=1).astype("<i4")
        acts = (active * sizes) @ directions
        write_shard(folder, acts, tokens, (first, end), make)
    finish(folder, n_rows)
    return folder


def config_for(cache: Path, out: Path, **settings: Any) -> Config:
    """A run of a moment: several passes, a last record and a last checkpoint out of step."""
    small: dict[str, Any] = {
        "cache": str(cache),
        "out": str(out),
        "n_latents": 20,
        "n_prefixes": 3,
        "target_l0": 3.0,
        "lr": 3e-3,
        "n_steps": 50,
        "batch_size": 128,
        "checkpoint_every": 15,
        "device": "cpu",
    }
    return Config(**{**small, **settings})


def argv_for(config: Config) -> list[str]:
    argv = []
    for field in dataclasses.fields(config):
        if not field.metadata["is_flag"]:
            continue
        value = config.targets if field.name == "target_l0s" else getattr(config, field.name)
        flag = (field.metadata["flag"] or field.name).replace("_", "-")
        if value in (None, ()):
            continue
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            argv += [f"--{flag}", *map(str, value)]
        else:
            argv.append(f"--{flag}={value}")
    return argv


def contents(folder: Path) -> dict[str, bytes]:
    """A folder's files by name, but for the lock, which is empty and stays."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def learnt(folder: Path) -> dict[str, bytes]:
    """What must be the same byte for byte: metrics and weights. The rest holds times.

    Of a safetensors file that is all but its header, in which metadata stand in random order.
    """
    return {
        name: data[8 + int.from_bytes(data[:8], "little") :] if "safetensors" in name else data
        for name, data in contents(folder).items()
        if name in WRITTEN
    }


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(config: Config) -> Config:
    return dataclasses.replace(config, resume=True)


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which the command line refuses `config`, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_tinystories.main(argv_for(config))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def exit_code(target: Callable[..., None], *args: Any, timeout: float = 600) -> int | None:
    """How a process of its own that runs `target` ended. Interrupted, this takes it along."""
    process = fresh_processes().Process(target=target, args=args, daemon=True)
    process.start()
    try:
        process.join(timeout)
        code: int | None = process.exitcode  # None: it has not ended
        return code
    finally:
        process.kill()
        process.join()


def die_with(parent: int) -> None:
    """Ends this process once its parent is gone: even a killed test leaves nothing running."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(parent, 0)
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_and_die(config: Config, moment: str, nth: int, number: int, test: int) -> None:
    """In a process of its own: the command, which sends itself signal `number` when it comes to
    `moment` for the nth time."""
    die_with(test)
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    count = itertools.count(1)

    def reached(here: str) -> None:
        if here == moment and next(count) == nth:
            os.kill(os.getpid(), number)

    def around(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            reached(before)
            result = function(*args, **kwargs)
            reached(after)
            return result

        return wrapped

    def save_in_two(tensors: Any, filename: Any, metadata: Any = None) -> None:
        data = safetensors.torch.save(tensors, metadata)
        with open(filename, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            reached("half written")
            file.write(data[len(data) // 2 :])

    Training.step = around(Training.step, "", "step")  # type: ignore[method-assign]
    os.fsync = around(os.fsync, "syncing", "synced")
    os.replace = around(os.replace, "renaming", "renamed")
    safetensors.torch.save_file = save_in_two
    train_tinystories.main(argv_for(config))
    os._exit(0)


def kill(config: Config, moment: str, nth: int, number: int = signal.SIGKILL) -> None:
    code = exit_code(run_and_die, config, moment, nth, number, os.getpid())
    assert code == (-number if number == signal.SIGKILL else 130), f"not killed: {code}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")
