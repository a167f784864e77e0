"""Folders and files of a script: written whole or not at all, by one writer.

Linux and macOS; elsewhere nothing locks a folder, and a line on stderr says so.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from matryoshka.errors import CannotWrite, UserError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


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
    """Writes `value` as JSON, whole or not at all: a line a key, and a line an item of a list.

    NaN is refused: JSON has none.
    """
    write_atomically(path, lambda part: part.write_text(json_text(value), encoding="utf-8"))


def json_text(value: Any) -> str:
    """`value` as JSON that a person can read and a line tool can search.

    An object at the top has a line a key, and a list of objects in it a line an item.
    """

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    def block(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(line, value)) + "\n ]"
        return line(value)

    if not isinstance(value, dict):
        return block(value) + "\n"
    return "{\n " + ",\n ".join(f"{line(k)}: {block(v)}" for k, v in value.items()) + "\n}\n"


def without_paths(value: Any) -> Any:
    """`value` with every string that is a path reduced to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_path(value):
        return Path(value).name
    return value


def is_path(text: str) -> bool:
    """Whether `text` leads somewhere on this machine: a hub's name, owner/name, does not."""
    return text.startswith(("/", "~", "./", "../")) or (text.count("/") > 1 and " " not in text)
