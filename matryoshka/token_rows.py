"""Reads rows of token ids from a folder or from the Hugging Face hub, checks and counts them.

A dataset is a file `SPLIT.jsonl` in which each line is a row of token ids, {"tok_ids": [...]}; all
rows have the same length. Rows are counted from 0; blank lines do not count. A dataset in a folder
is read without the library `datasets`, which would read the name as a pattern and write copies.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.cache_format import whole_number
from matryoshka.errors import UserError
from matryoshka.files import file_sha256
from matryoshka.tiny_model import BEGIN, PAD


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of one split of a dataset, which is a folder with `SPLIT.jsonl` or on the hub."""

    dataset: str
    split: str = "train"
    revision: str | None = None  # the branch, tag or commit of a dataset on the hub

    @property
    def file(self) -> Path:
        """The file of the rows, in the folder or the hub's dataset."""
        return Path(self.dataset) / f"{self.split}.jsonl"

    def identity(self) -> dict[str, Any]:
        """What distinguishes these rows from others: names, and a local file's size and checksum.

        Raises `UserError` if the file cannot be read.
        """
        is_local = os.path.isfile(self.file)
        return {
            "dataset": self.dataset,
            "dataset_revision": self.revision,
            "dataset_bytes": os.path.getsize(self.file) if is_local else None,
            "dataset_sha256": _sha256(self.file) if is_local else None,
            "split": self.split,
        }

    def read(
        self, start: int, end: int | None, d_vocab: int, block_size: int = 1024
    ) -> Iterator[np.ndarray]:
        """Yields the token ids of rows `start` to `end` - 1 (None: to the end), int64 [n, seq].

        A block has `block_size` rows. If the dataset has fewer rows than `end`, it ends early.
        Raises `UserError`, which names the file and the row, if there is no `tok_ids`, if a row has
        another length than the first one read, or if an id is not below `d_vocab`. Raises
        `ValueError` if `start` and `end` are not a range.
        """
        whole_number("start", start, 0)
        rows = self._parsed_rows(start, block_size)
        if end is not None:
            rows = itertools.islice(rows, whole_number("end", end, start) - start)
        checked = self._checked_rows(rows, start, d_vocab)
        while block := list(itertools.islice(checked, block_size)):
            yield np.stack(block)

    def _checked_rows(self, rows: Iterator[Any], start: int, d_vocab: int) -> Iterator[np.ndarray]:
        """Yields the token ids of `rows`, each int64 [seq]; the first of them is row `start`."""
        seq = None
        for i, row in enumerate(rows, start):
            ids = _token_ids(row, f"{self.file} row {i}", d_vocab)
            seq = seq or len(ids)
            if len(ids) != seq:
                raise UserError(
                    f"{self.file} row {i}: {len(ids)} tokens, expected {seq} as in the rows before"
                )
            yield ids

    def _parsed_rows(self, start: int, block_size: int) -> Iterator[Any]:
        """The rows from `start` on, unchecked. Raises `UserError` if there is no dataset."""
        if os.path.isdir(self.dataset):
            if not os.path.isfile(self.file):
                raise UserError(f"dataset folder {self.dataset} holds no {self.split}.jsonl")
            return self._local_rows(start)
        if self.dataset.count("/") == 1 and self.dataset[0] not in "./~":
            return self._hub_rows(start, block_size)
        raise UserError(
            f"--dataset {self.dataset} is neither a folder here nor the name of a hub dataset"
        )

    def _local_rows(self, start: int) -> Iterator[Any]:
        """Yields the contents of the file's lines that are not blank, from row `start` on."""
        row = 0
        try:
            with self.file.open("rb") as lines:
                for line in filter(bytes.strip, lines):
                    if row >= start:
                        yield json.loads(line)
                    row += 1
        except OSError as error:
            raise UserError(
                f"cannot read {self.file} from row {row} on ({error.strerror})"
            ) from None
        except (ValueError, RecursionError):
            raise UserError(
                f'{self.file} row {row} is not JSON: expected {{"tok_ids": [...]}}'
            ) from None

    def _hub_rows(self, start: int, block_size: int) -> Iterator[Any]:
        """Yields the rows of a dataset on the hub from `start` on, while they are downloaded."""
        import datasets  # imported here: it takes seconds, and needs a home that it can write to

        try:
            stream = datasets.load_dataset(
                self.dataset,
                data_files={self.split: f"{self.split}.jsonl"},
                split=self.split,
                streaming=True,
                revision=self.revision,
            ).skip(start)
            for block in stream.with_format("arrow").iter(batch_size=block_size):
                yield from block.to_pylist()
        # Its errors come from many libraries and have no common class.
        except Exception as error:
            cause = error.__cause__ or error  # its own message is only "an error occurred"
            reason = f"{type(cause).__name__}: {cause}"[:200]
            raise UserError(
                f"cannot get {self.file} from the Hugging Face hub ({reason}); to use a local "
                f"copy, give --dataset the folder that holds its {self.split}.jsonl"
            ) from error


def _sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises `UserError` if it cannot be read."""
    try:
        return file_sha256(file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from None


def _token_ids(row: Any, where: str, d_vocab: int) -> np.ndarray:
    """The checked token ids of one row, int64 [seq]. Raises `UserError`, beginning with `where`."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}, expected {{"tok_ids": [...]}}')
    ids = row.get("tok_ids")
    if ids is None:
        others = ", ".join(key for key in row if key != "tok_ids")
        raise UserError(f"{where}: no tok_ids, only {others or 'null'}")
    if not isinstance(ids, list):
        raise UserError(f"{where}: tok_ids is {ids!r:.40}, expected a list of integers")
    if not ids:
        raise UserError(f"{where}: tok_ids is empty")
    if set(map(type, ids)) != {int}:
        wrong = json.dumps(next(i for i in ids if type(i) is not int))
        raise UserError(f"{where}: tok_ids holds {wrong:.40}, expected integers")
    if min(ids) < 0 or max(ids) >= d_vocab:
        wrong_id = next(i for i in ids if not 0 <= i < d_vocab)
        raise UserError(
            f"{where}: token id {wrong_id} is out of the vocabulary, 0 to {d_vocab - 1}"
        )
    return np.array(ids, dtype=np.int64)


def kept_positions(rows: np.ndarray, keep_begin: bool) -> np.ndarray:
    """Which positions of `rows` [n, seq] are cached: bool [n, seq].

    [PAD] never is, and [BEGIN] only if `keep_begin`.
    """
    kept: np.ndarray = rows != PAD
    return kept if keep_begin else kept & (rows != BEGIN)


def count_rows(
    token_rows: TokenRows, n_tokens: int, keep_begin: bool, d_vocab: int
) -> tuple[int, int]:
    """How many rows it takes to get `n_tokens` activations, and how many activations they have.

    The second number is below `n_tokens` if the dataset ends earlier. This reads the rows, so a bad
    one is found before a model has run. Raises `UserError` if there is nothing to cache.
    """
    n_rows = n_found = 0
    for rows in token_rows.read(0, None, d_vocab):
        total = n_found + kept_positions(rows, keep_begin).sum(axis=1).cumsum()
        enough = int(np.searchsorted(total, n_tokens))  # the row that completes the count
        if enough < len(rows):
            return n_rows + enough + 1, int(total[enough])
        n_rows, n_found = n_rows + len(rows), int(total[-1])
    if n_found == 0:
        raise UserError(f"{token_rows.file} holds no tokens to cache in {n_rows} rows")
    return n_rows, n_found
