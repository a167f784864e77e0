"""What every script shares: its command line, its one-line errors, its files, its surroundings.

A script's settings are a frozen dataclass whose fields are made by `setting`; `parse` turns a
command line into one, and `--help` shows every flag with its default. Bad input raises
`UserError`, which `main_guard` turns into one line on stderr and exit code 2.

Linux and macOS; elsewhere nothing locks a folder, and the CPU's instruction sets are not recorded.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


class Interrupted(Exception):
    """Ctrl-C, after what was finished has been written. The message says what that is."""


Config = typing.TypeVar("Config")


class UserError(Exception):
    """Something in the input is wrong. The message is one line: what, where, and what would do."""


class CannotWrite(UserError, OSError):
    """A file cannot be written, and the message names it. An OSError, for who has more to say."""


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
    Flags are written out: `--step` is unknown where there is `--steps`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=_Help, allow_abbrev=False
    )
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
    """Turns `UserError` into one line on stderr and exit code 2, and Ctrl-C into one and 130.

    Prints on any stdout: characters that its encoding lacks become "?". One that cannot be written
    to is a `UserError`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # A script may have had Ctrl-C end it without a word while it imported torch.
    if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        commit()  # that of the code which runs, whatever is committed while it does
        yield
        _flush_stdout()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(130)


def _flush_stdout() -> None:
    """Raises `UserError` where what was printed does not arrive: a full disk, a closed pipe."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        raise UserError(f"stdout cannot be written to ({error.strerror})") from None


def require_positive(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is not finite, above 0."""
    require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def require_not_negative(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is not finite, 0 or more."""
    require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")


def require_finite(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is NaN or infinite, or an
    integer of more than 64 bits."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be below 2^63")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be a finite number")


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
    in_main = _in_main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def _in_main_thread() -> bool:
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

    numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
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


def make_folder(path: Path, flag: str = "--out") -> None:
    """Makes the folder `path`, or raises `UserError` naming `flag` where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def one_writer(folder: Path, flag: str = "--out") -> Iterator[None]:
    """Holds the folder for one writer on this machine; a dead writer's lock goes with it.

    Raises `UserError` where another holds it. Where the system or the folder's file system has no
    locks, a line on stderr says so. `folder`/.lock stays: to delete it would let two writers in.
    """
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            if fcntl is None:
                raise OSError("not on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{flag} {folder}: another process is writing there: wait for it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            print(
                f"{folder} cannot be locked ({reason}): start nothing else that writes there",
                file=sys.stderr,
            )
        yield


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a file beside `path`, then renames: a kill leaves old or new, whole.

    Raises `CannotWrite` that names `path` where it cannot be written: a full disk, a folder there.
    """
    part = None
    try:
        name = f".{path.name}."
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=name, suffix=path.suffix)
        os.close(handle)
        part = Path(made)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"cannot write {path} ({reason})") from error
    finally:
        if part is not None:
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
    """Where a result was made; goes into every `results.json`. No path of the machine is in it.

    Versions and the code's commit, device and threads, and what decides how sums are rounded: the
    CPU, its instruction sets, and what was asked of them. A seed's bits depend on these.
    """
    on_gpu = device.type == "cuda"
    cpu, instruction_sets = _cpu()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "instruction_sets": instruction_sets,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ.get(name) for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")},
    }


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and which of the instruction sets that arithmetic may use it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)  # an ARM CPU gives none
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [
        flag
        for flag in (flags[1].split() if flags else [])
        if re.match(r"avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm", flag)
    ]
    return name[1].strip() if name else platform.machine(), sorted(sets)


@functools.cache
def commit() -> str | None:
    """The git commit of the checkout that this file is in; None where it is in none.

    "+changes" follows where a Python file that git tracks is not the commit's.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not the checkout around an installed copy
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


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


def narrow_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int = 80) -> str:
    """`table` for a terminal: its columns in several tables, one above another, where they do not
    fit in `width` characters. Each begins with the first column."""
    groups: list[list[int]] = [[0]]
    for i in range(1, len(headers)):
        wider = [*groups[-1], i]
        fits = len(_columns(headers, rows, wider).split("\n")[0]) <= width
        if fits or len(wider) == 2:
            groups[-1] = wider
        else:
            groups.append([0, i])
    return "\n\n".join(_columns(headers, rows, group) for group in groups)


def _columns(headers: Sequence[str], rows: Sequence[Sequence[object]], which: list[int]) -> str:
    return table([headers[i] for i in which], [[row[i] for i in which] for row in rows])
