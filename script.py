"""What every script shares: its command line, its one-line errors, its files, its surroundings.

A script's settings are a frozen dataclass whose fields are made by `setting`; `parse` turns a
command line into one, and `--help` shows every flag with its default. Bad input raises
`UserError`, which `main_guard` turns into one line on stderr and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Interrupted(Exception):
    """Ctrl-C, after what was finished has been written. The message says what that is."""


Config = typing.TypeVar("Config")


class UserError(Exception):
    """Something in the input is wrong. The message is one line: what, where, and what would do."""


def setting(
    default: Any, help: str, *, choices: Sequence[Any] | None = None, metavar: str | None = None
) -> Any:
    """A dataclass field that is also a command-line flag: its default, one line on what it does."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "metavar": metavar}
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; a default wherever there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser_for(config_class: type, description: str) -> argparse.ArgumentParser:
    """An argparse parser with one flag a field of `config_class`: `n_latents` is `--n-latents`.

    A bool field is two flags, `--name` and `--no-name`. A field of type `X | None` takes an X.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        kwargs: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        concrete = [t for t in typing.get_args(hints[field.name]) if t is not type(None)]
        kind = concrete[0] if concrete else hints[field.name]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            choices = field.metadata["choices"]
            metavar = field.metadata["metavar"] or (None if choices else kind.__name__.upper())
            parser.add_argument(flag, type=kind, choices=choices, metavar=metavar, **kwargs)
    return parser


def parse(config_class: type[Config], description: str, argv: Sequence[str] | None) -> Config:
    """`argv` (None: the process's own) as a `config_class`. Exits with 2 on an unknown flag."""
    return config_class(**vars(parser_for(config_class, description).parse_args(argv)))


@contextlib.contextmanager
def main_guard() -> Iterator[None]:
    """Turns `UserError` into one line on stderr and exit code 2, and Ctrl-C into one and 130."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(130)


def require_positive(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is not above zero."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:  # written so that NaN fails too
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def require_not_negative(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is below zero."""
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises `UserError` where there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name} is not there ({reason}); try --device cpu") from None
    return device


@contextlib.contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Ctrl-C does nothing meanwhile; processes started meanwhile ignore it for good."""
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch on `n` threads within an operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_folder(path: Path, flag: str = "--out") -> None:
    """Makes the folder `path`, or raises `UserError` naming `flag` where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a file beside `path`, then renames: a kill leaves old or new, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. NaN is refused: JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was made: versions, device, threads. Goes into every `results.json`."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table that is also Markdown; all but the first column are right-aligned."""
    cells = [list(map(str, headers)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return "\n".join([line(cells[0]), rule + "|", *map(line, cells[1:])])
