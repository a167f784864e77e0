"""The command line of `modal run modal_tinystories.py`, on a machine that has no torch."""

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
    """What is Modal's: the flags that are read here, and the words of all others."""

    gpu: str = "H100"
    cache_workers: int = 3
    volume: str = "matryoshka-tinystories"
    secret: str | None = None
    out: str = "runs/tinystories"
    plan: bool = False
    words: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `UserError` where one is impossible."""
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu} is none of {', '.join(GPUS)}")
        if self.cache_workers < 1:
            raise UserError(f"--cache-workers is {self.cache_workers}: it must be positive")

    def check_for_modal(self) -> None:
        """Raises `UserError` where one is well here, and would be refused there."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", self.volume, re.ASCII):
            raise UserError(f"--volume {self.volume} is no name of a Modal Volume")
        parts = [part for word in self.words for part in word.split("=", 1)]
        for flag, value in itertools.pairwise(parts):
            is_path = value.startswith((".", "~", "/")) and not value.startswith("/volume/")
            is_file = flag == "--members" and not value.startswith("/volume/")
            if is_file or (flag in ("--model", "--dataset", "--tokenizer") and is_path):
                name = Path(value).name
                raise UserError(
                    f"{flag} {value}: a container has none of this machine's files; put them on "
                    f"the Volume, modal volume put {self.volume} {value} {name}, and give {flag} "
                    f"/volume/{name}"
                )


HELP = {
    "gpu": "GPU of a caching or training container: " + ", ".join(GPUS),
    "cache_workers": "containers that cache side by side, a GPU each",
    "volume": "Modal Volume, made where missing; without Modal a folder, and runs/volume",
    "secret": "Modal Secret with HF_TOKEN, for what is private or gated on the hub",
    "out": "folder here; the comparison goes to NAME/ in it",
    "plan": "print what it would take, and start nothing",
}


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `Launch`'s own flags."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS, exit_on_error=False
    )
    group = parser.add_argument_group("flags of Modal's")
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
    """A command line as a checked `Launch`, with other defaults. Raises `UserError`."""
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
    """What follows the file of `module` on the command line of `modal run`; None for any other."""
    if "run" not in sys.argv:
        return None
    after = sys.argv[sys.argv.index("run") + 1 :]
    here = [i for i, word in enumerate(after) if Path(word.split("::")[0]).stem == module]
    return after[here[0] + 1 :] if here else None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """`UserError` as one line and exit code 2. Ctrl-C is left to Modal, which ends the App."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def download(source: Any, folder: PurePosixPath, out: Path) -> None:
    """Copies the files below `folder` of the Volume `source` to `out`; each whole or not at all.

    Hidden ones are locks, and what killed containers have left half written. Raises `UserError`
    where one cannot be written.
    """
    for entry in source.listdir(str(folder), recursive=True):
        name = PurePosixPath(entry.path.lstrip("/")).relative_to(folder)
        if entry.type.name == "FILE" and not name.name.startswith("."):
            try:
                _download_file(source, entry.path, out / name)
            except OSError as error:
                raise UserError(f"--out: cannot write {out / name} ({error.strerror})") from None


def _download_file(source: Any, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for chunk in source.read_file(name):
            file.write(chunk)
    os.replace(part, path)
