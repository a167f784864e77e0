"""Whether two runs came out the same: every SAE bit for bit, every row of results.json.

    python -m studies.same_results runs/before runs/after

For a change that should not alter results. Exits with 1, naming what differs, where it does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

# What may differ between two equal runs: when and where they ran, and what their files are called.
IGNORED = {"seconds", "waited_for_data", "environment", "config", "file_sha256"}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two folders, a line each."""
    lines = []
    names = {path.relative_to(before) for path in before.rglob("*.safetensors")}
    names |= {path.relative_to(after) for path in after.rglob("*.safetensors")}
    for name in sorted(names):
        if not ((before / name).exists() and (after / name).exists()):
            lines.append(f"{name}: only in one of them")
            continue
        old, new = tensors_of(before / name), tensors_of(after / name)
        lines += [
            f"{name}: {key}"
            for key in sorted(old.keys() | new.keys())
            if key not in old or key not in new or not torch.equal(old[key], new[key])
        ]
    old, new = rows_of(before), rows_of(after)
    if len(old) != len(new):
        lines.append(f"results.json: {len(old)} rows and {len(new)}")
    for i, (one, other) in enumerate(zip(old, new, strict=False)):
        lines += [f"results.json, row {i}: {key}" for key in one if one[key] != other.get(key)]
    return lines


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["runs"]
    return [{key: row[key] for key in row if key not in IGNORED} for row in rows]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    before, after = map(Path, sys.argv[1:])
    found = differences(before, after)
    if found:
        print("\n".join(found))
        sys.exit(1)
    n_files = len(list(after.rglob("*.safetensors")))
    print(f"the same: {n_files} files of tensors, {len(rows_of(after))} rows")


if __name__ == "__main__":
    main()
