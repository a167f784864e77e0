"""Folders and files that scripts write: each file whole or not at all, each folder by one writer.

On systems other than Linux and macOS folders are not locked, and a line on stderr says so.
"""

import contextlib
import hashlib
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
    """Makes the folder `path`. Raises `UserError` naming `flag` if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def one_writer(folder: Path, flag: str = "--out") -> Iterator[None]:
    """Locks the folder against a second writer on this machine.

    Raises `UserError` if another process has locked it. The lock of a process that dies is
    released. If the system or the folder's file system has no locks, a line on stderr says so. The
    file `folder`/.lock is never deleted, because then two writers could get in.
    """
    try:
        file = (folder / ".lock").open("a", encoding="utf-8")
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
    """Calls `write` on a temporary file beside `path`, then renames that file to `path`.

    A process that is killed leaves the old content or the new, and never a part of it. Raises
    `CannotWrite` naming `path` if it cannot be written, because the disk is full, for example.
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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text(value)` to a file, whole or not at all.

    Raises `ValueError` if it holds a NaN, which JSON does not have, and `CannotWrite`.
    """
    write_atomically(path, lambda part: part.write_text(json_text(value), encoding="utf-8"))


def json_text(value: Any) -> str:
    """`value` as JSON that is easy to read, and to search with tools that work on lines.

    Each key of the outermost object is on its own line, and so is each item of a list of objects.
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
    """`value`, but of every string that is a path only the last part is kept."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_path(value):
        return Path(value).name
    return value


def is_path(text: str) -> bool:
    """Whether `text` looks like a path on this machine; OWNER/NAME, of the hub, does not."""
    return text.startswith(("/", "~", "./", "../")) or (text.count("/") > 1 and " " not in text)
