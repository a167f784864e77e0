"""The checkpoint of a training run: its tensors with a checksum, and what it belongs to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.files import write_atomically

NUMBERS = {"metrics_bytes": int, "n_steps_done": int, "seconds": float, "waited": float}


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all values of `tensors`, which are on the CPU; safetensors has no checksum."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes `tensors` and `about`, whole or not at all.

    about: has "config", "cache_hash", "dropped" and the keys of NUMBERS. Raises `CannotWrite`.
    """
    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {
        "config": json.dumps(about["config"]),
        "dropped": json.dumps(about["dropped"]),
        "cache_hash": about["cache_hash"],
        "tensors_hash": tensors_hash(on_cpu),
        **{name: str(about[name]) for name in NUMBERS},
    }
    write_atomically(path, lambda part: safetensors.torch.save_file(on_cpu, part, metadata))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`about` and `tensors` as they were written. Raises `UserError` if the file is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["tensors_hash"] != tensors_hash(tensors):
            raise ValueError("its checksum is not the recorded one")
        about: dict[str, Any] = {
            "config": dict(json.loads(metadata["config"])),
            "dropped": dict(json.loads(metadata["dropped"])),
            "cache_hash": metadata["cache_hash"],
            **{name: kind(metadata[name]) for name, kind in NUMBERS.items()},
        }
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise no_checkpoint(path, error) from None
    return about, tensors


def no_checkpoint(path: Path, error: Exception) -> UserError:
    """The `UserError` that says that a file is not a checkpoint of the run in its folder."""
    return UserError(
        f"{path} is not a checkpoint of this run ({error}): to start over, delete {path.parent} or "
        "choose another --out"
    )
