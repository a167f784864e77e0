"""Documents of text: from the Hugging Face hub, a folder or a file, streamed in one fixed order.

A file is .jsonl, .parquet or .txt, or one of them compressed (.gz, .xz, .bz2, .zst). A line of a
.txt file is a document. In a folder, or in its subfolder `data`, those files are read whose names
begin with the split's name (`train.jsonl`, `train-00000-of-00002.parquet`) or that lie in a
subfolder of that name. They are sorted by path, and must all be of one kind. The library `datasets`
opens and decodes them.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError

BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}  # names that `datasets` uses
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
HASHED_AT_ONCE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Documents:
    """The texts in one column of one split of a dataset, in order."""

    dataset: str  # a file, a folder, or a hub dataset's name
    split: str = "train"
    column: str = "text"
    config: str | None = None  # the configuration of a hub dataset that has several
    revision: str | None = None  # a hub dataset's branch, tag or commit

    def identity(self) -> dict[str, Any]:
        """What identifies these texts: names, and for local files their total size and checksum.

        Raises `UserError` if there are no such files.
        """
        files = self.files()
        return {
            "dataset": self.dataset,
            "dataset_config": self.config,
            "dataset_revision": self.revision,
            "dataset_bytes": sum(map(os.path.getsize, files)) if files else None,
            "dataset_sha256": hash_of_files(files) if files else None,
            "split": self.split,
            "text_column": self.column,
        }

    def files(self) -> list[Path]:
        """The local files, in order; [] for a dataset on the hub. Raises `UserError`."""
        path = Path(self.dataset)
        if os.path.isfile(self.dataset):
            builder_of(path)
            return [path]
        if not os.path.isdir(self.dataset):
            is_path = self.dataset.count("/") > 1 or self.dataset[:1] in ("", ".", "~", "/")
            if is_path or builder_name(path):
                raise UserError(
                    f"--dataset {self.dataset} is neither a file or folder here nor the name of a "
                    "dataset on the hub"
                )
            return []
        files = sorted(
            file
            for pattern in (f"{glob.escape(self.split)}*", f"{glob.escape(self.split)}/*")
            for folder in (path, path / "data")
            for file in folder.glob(pattern)
            if file.is_file() and builder_name(file)
        )
        if not files:
            raise UserError(
                f"dataset folder {path} holds no {self.split}.jsonl, .parquet or .txt; give "
                "--split the beginning of its files' names, or --dataset a file"
            )
        if len({builder_of(file) for file in files}) > 1:
            raise UserError(
                f"dataset folder {path} holds {files[0].name} and {files[-1].name} of split "
                f"{self.split}: give --dataset one of them"
            )
        return files

    def read(self) -> Iterator[str]:
        """The texts that are not empty, in order.

        Raises `UserError` if they cannot be read, or one is not text.
        """
        n_read = 0
        try:
            for number, row in enumerate(self._stream()):
                n_read = number + 1
                text = self._text_in(row, number)
                if text:
                    yield text
        except (UserError, GeneratorExit):
            raise
        # The errors of `datasets` come from a dozen libraries and share no class.
        except Exception as error:
            cause = error.__cause__ or error  # `datasets` wraps it in "an error occurred"
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
            advice = (
                ""
                if self.files()
                else "; without a network, give --dataset a folder or a file, or HF_HUB_OFFLINE=1 "
                "and HF_HOME where it was downloaded before"
            )
            raise UserError(
                f"cannot read {self.dataset} from document {n_read} on ({reason}){advice}"
            ) from error

    def _stream(self) -> Any:
        """The rows of the dataset, as `datasets` streams them."""
        import datasets  # only here, because the import takes seconds

        files = self.files()
        if not files:
            return datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
        # Escaped, because a file's name is not to be taken for a pattern.
        paths = [glob.escape(os.path.abspath(file)) for file in files]
        return datasets.load_dataset(
            builder_of(files[0]), data_files={"train": paths}, split="train", streaming=True
        )

    def _text_in(self, row: dict[str, Any], number: int) -> str | None:
        """The text of a row, None if its text is missing. Raises `UserError`."""
        where = f"{self.dataset}, document {number}"
        if self.column not in row:
            raise UserError(
                f"{where}: there is no column {self.column}, only {', '.join(row)}; give "
                "--text-column one of them"
            )
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{where}: column {self.column} holds {text!r:.40}, expected text; give "
                "--text-column another"
            )
        return text


def builder_name(file: Path) -> str | None:
    """What `datasets` calls a file of this kind, compressed or not; None for any other kind."""
    suffixes = [s for s in file.suffixes if s not in COMPRESSED]
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def builder_of(file: Path) -> str:
    """Like `builder_name`, but raises `UserError` for a file of any other kind."""
    name = builder_name(file)
    if name is None:
        raise UserError(
            f"{file} is not a {', '.join(BUILDERS)} file; each may be compressed "
            f"({', '.join(COMPRESSED)})"
        )
    return name


def hash_of_files(files: list[Path]) -> str:
    """SHA-256 of the files' contents, one after another. Raises `UserError`."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                while part := opened.read(HASHED_AT_ONCE):
                    digest.update(part)
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror})") from None
    return digest.hexdigest()


def batched(texts: Iterator[str], n_characters: int) -> Iterator[list[str]]:
    """The texts in lists of at least `n_characters` characters; the last may have fewer."""
    while batch := list(_enough(texts, n_characters)):
        yield batch


def _enough(texts: Iterator[str], n_characters: int) -> Iterator[str]:
    left = n_characters
    while left > 0:
        text = next(texts, None)
        if text is None:
            return
        left -= len(text)
        yield text
