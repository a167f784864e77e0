"""Reading an SAE from disk, with all the care that a file of somebody's takes; see docs/files.md.

`SAE.save` writes these files, and `SAE.load` is what calls this.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from matryoshka import convert
from sae import FORMAT, SAE


def load(path: Path, device: torch.device) -> SAE:
    """The SAE in a file of this project, or in a folder of another tool.

    Raises ValueError where there is no such SAE, OSError where it cannot be read.
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
    """The tensors and the metadata of a safetensors file. Raises ValueError where it is none."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def described(metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its SAE; a file of format 1 says nothing that is used.

    Raises ValueError where that is of another program, or of a later version of this one.
    """
    about = json.loads(metadata.get("sae", "{}"))
    if not isinstance(about, dict) or not isinstance(about.get("about", {}), dict):
        raise ValueError("its metadata is of another program")
    if about.get("format", 1) not in range(1, FORMAT + 1):
        raise ValueError(f"format must be at most {FORMAT}, got {about['format']!r}")
    return about


def check_values(sae: SAE) -> None:
    """Raises ValueError where a value is not finite, or not of the sign that it must have."""
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if sae.threshold is not None and (sae.threshold < 0).any():
        raise ValueError("threshold must not be negative")
    if not sae.mean_norm > 0:
        raise ValueError(f"mean_norm must be above 0, got {float(sae.mean_norm)}")
