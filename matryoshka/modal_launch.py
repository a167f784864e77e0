"""The command line of `modal run modal_tinystories.py`; works on a machine without torch."""

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from matryoshka.errors import UserError
from matryoshka.modal_plan import GPUS


@dataclasses.dataclass(frozen=True)
class Launch:
    """The flags about Modal, which are read here, and the words of all other flags."""

    gpu: str = "H100"
    cache_workers: int = 3
    volume: str = "matryoshka-tinystories"
    secret: str | None = None
    out: str = "runs/tinystories"
    plan: bool = False
    words: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `UserError` if a flag has an impossible value."""
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu} is none of {', '.join(GPUS)}")
        if self.cache_workers < 1:
            raise UserError(f"--cache-workers is {self.cache_workers}: it must be positive")

    def check_for_modal(self) -> None:
        """Raises `UserError` for paths of this machine and names that Modal does not allow."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", self.volume, re.ASCII):
            raise UserError(
                f"--volume {self.volume} cannot be the name of a Modal Volume: it may have up to "
                "64 letters, digits, dots, dashes and underscores"
            )
        parts = [part for word in self.words for part in word.split("=", 1)]
        for flag, value in itertools.pairwise(parts):
            is_path = value.startswith((".", "~", "/")) and not value.startswith("/volume/")
            is_file = flag == "--members" and not value.startswith("/volume/")
            if is_file or (flag in ("--model", "--dataset", "--tokenizer") and is_path):
                name = Path(value).name
                raise UserError(
                    f"{flag} {value}: a container has none of this machine's files; put them on "
                    f"the Volume (modal volume put {self.volume} {value} {name}), and give {flag} "
                    f"/volume/{name}"
                )


HELP = {
    "gpu": "GPU of each container that caches or trains: " + ", ".join(GPUS),
    "cache_workers": "how many containers cache at once, with a GPU each",
    "volume": "Modal Volume, made if missing; without Modal a folder, by default runs/volume",
    "secret": "Modal Secret with HF_TOKEN, for private or gated models and datasets",
    "out": "folder on this machine; the comparison goes to NAME/ in it",
    "plan": "print the time and storage it would take, and start nothing",
}


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `Launch`'s own flags."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS, exit_on_error=False
    )
    group = parser.add_argument_group("flags for Modal")
    for field in dataclasses.fields(Launch)[:-1]:
        flag, text = "--" + field.name.replace("_", "-"), HELP[field.name]
        if field.default is False:
            group.add_argument(flag, action="store_true", help=text)
        else:
            kind = int if field.type is int else str
            text += "" if field.default is None else f" (default: {field.default})"
            group.add_argument(flag, type=kind, default=field.default, help=text)
    return parser


def launch_of(words: Sequence[str], **defaults: Any) -> Launch:
    """Reads a command line into a checked `Launch`. Raises `UserError`.

    defaults: those that differ from `Launch`'s.
    """
    parser = launch_parser()
    parser.set_defaults(**defaults)
    try:
        known, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    launch = Launch(**vars(known), words=tuple(others))
    launch.check()
    return launch


def words_after(module: str) -> list[str] | None:
    """The words after the file of `module` on the command line of `modal run`.

    None if this is another command, or a run of another file.
    """
    if "run" not in sys.argv:
        return None
    after = sys.argv[sys.argv.index("run") + 1 :]
    here = [i for i, word in enumerate(after) if Path(word.split("::")[0]).stem == module]
    return after[here[0] + 1 :] if here else None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A context in which a `UserError` prints one line and exits with 2.

    Ctrl-C is left to Modal, which stops the App.
    """
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def download(source: Any, folder: PurePosixPath, out: Path) -> None:
    """Copies the files below `folder` of the Volume `source` to `out`, each whole or not at all.

    Hidden files are not copied: they are locks, and files that killed containers left half written.
    Raises `UserError` if one cannot be written.
    """
    for entry in source.listdir(str(folder), recursive=True):
        name = PurePosixPath(entry.path.lstrip("/")).relative_to(folder)
        if entry.type.name == "FILE" and not name.name.startswith("."):
            try:
                _download_file(source, entry.path, out / name)
            except OSError as error:
                raise UserError(f"--out: cannot write {out / name} ({error.strerror})") from None


def _download_file(source: Any, name: str, path: Path) -> None:
    """Copies one file. It does without matryoshka/files.py, which needs torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for chunk in source.read_file(name):
            file.write(chunk)
    os.replace(part, path)
