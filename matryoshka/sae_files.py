"""Writes an SAE's file, whole or not at all, and reads it with checks, as it may be anyone's.

`SAE.save` and `SAE.load` call this. docs/files.md describes the file.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from matryoshka import convert
from matryoshka.files import write_atomically
from matryoshka.sae_checks import check_values
from sae import SAE

FORMAT = 2  # format 1 has neither a format number nor an activation function


def save(sae: SAE, path: Path) -> None:
    """Writes an SAE's file, whole or not at all.

    Raises `CannotWrite`, an OSError that names `path`, if it cannot be written.
    """
    content = to_bytes(sae)
    write_atomically(path, lambda part: part.write_bytes(content))


def to_bytes(sae: SAE) -> bytes:
    """The bytes of an SAE's safetensors file.

    Its metadata has one key, "sae": JSON of format, activation, k, d_model, n_latents, about.
    """
    names = ("activation", "k", "d_model", "n_latents", "about")
    config = {"format": FORMAT, **{name: getattr(sae, name) for name in names}}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in sae.state_dict().items()}
    return safetensors.torch.save(tensors, metadata={"sae": json.dumps(config)})


def load(path: Path, device: torch.device) -> SAE:
    """Loads the SAE in a file of this project, or in a folder of another tool.

    Raises ValueError if it is not an SAE, and OSError if it cannot be read.
    """
    if path.is_dir():
        return convert.load(path).to(device)
    tensors, metadata = read(path, device)
    try:
        about = described(metadata)
        name, k = about.get("activation") or "relu", about.get("k")
        sae = SAE.from_tensors(tensors, name, about.get("about"), k)
        check_values(sae)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not an SAE's file: {error}") from None
    return sae


def read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises ValueError if it is not one."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def described(metadata: dict[str, str]) -> dict[str, Any]:
    """What a file's metadata says about its SAE; in format 1, nothing that is used.

    Raises ValueError if it is another program's metadata, or a later format.
    """
    about = json.loads(metadata.get("sae", "{}"))
    if not isinstance(about, dict) or not isinstance(about.get("about", {}), dict):
        raise ValueError("its metadata is of another program")
    if about.get("format", 1) not in range(1, FORMAT + 1):
        raise ValueError(f"format must be at most {FORMAT}, got {about['format']!r}")
    return about
