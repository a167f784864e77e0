"""Checks that two runs have the same results: every bit of every tensor, every row of results.json.

    python -m studies.same_results runs/before runs/after

Use it to test a change that should not alter results. If they differ, it prints where, and exits
with 1.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from matryoshka.command_line import main_guard
from matryoshka.errors import UserError

# Entries in which the rows of two equal runs may differ: times, and hashes of files (whose metadata
# may differ).
IGNORED = {"seconds", "waited_for_data", "file_sha256", "refit_file_sha256"}


def differences(before: Path, after: Path) -> list[str]:
    """The differences between two folders, one line each.

    Raises `UserError` if a folder has nothing to compare, or a file cannot be read.
    """
    for folder in (before, after):
        if not files_of(folder) and not (folder / "results.json").exists():
            raise UserError(f"{folder} holds no results.json and no file of tensors")
    lines = []
    for name in sorted(files_of(before) | files_of(after)):
        lines += differing_tensors(name, before, after)
    return lines + differing_rows(rows_of(before), rows_of(after))


def files_of(folder: Path) -> set[Path]:
    """The safetensors files anywhere below a folder, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*.safetensors")}


def differing_tensors(name: Path, before: Path, after: Path) -> list[str]:
    """The tensors of one file that differ, one line each."""
    for folder in (before, after):
        if not (folder / name).exists():
            return [f"{name}: not in {folder}"]
    old, new = tensors_of(before / name), tensors_of(after / name)
    return [
        f"{name}: {key}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or not same_bits(old[key], new[key])
    ]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises `UserError` if it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: NaN equals itself, and 0 does not equal -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def differing_rows(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[str]:
    """The entries of the rows of results.json that differ, one line each."""
    lines = []
    if len(old) != len(new):
        lines.append(f"results.json: {len(old)} rows and {len(new)}")
    for i, (one, other) in enumerate(zip(old, new, strict=False)):
        lines += [
            f"results.json, row {i}: {key}"
            for key in sorted(one.keys() | other.keys())
            if key not in one or key not in other or one[key] != other[key]
        ]
    return lines


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's results.json without IGNORED; none if there is no such file."""
    path = folder / "results.json"
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [{key: row[key] for key in row.keys() - IGNORED} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not results.json of a run") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="folder of a run")
    parser.add_argument("after", type=Path, help="folder of a run that should be the same")
    with main_guard():
        folders = parser.parse_args(argv)
        found = differences(folders.before, folders.after)
        if not found:
            n_files, n_rows = len(files_of(folders.after)), len(rows_of(folders.after))
            print(f"the same: {n_files} files of tensors, {n_rows} rows")
        else:
            print("\n".join(found))
            raise SystemExit(1)


if __name__ == "__main__":
    main()
