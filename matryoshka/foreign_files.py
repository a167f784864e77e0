"""Readers of JSON and of tensors that other tools wrote, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from matryoshka.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if the file does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, not a list or a value")
    return content


def whole(config: dict[str, Any], name: str, at_least: int = 1) -> int:
    """The setting `name` as an int. Raises `UserError` unless it is whole and large enough."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if value < at_least:
        raise UserError(f"{name} must be at least {at_least}, got {value!r}")
    return int(value)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU. Raises `UserError`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by name, on the CPU. No code in the file is run.

    Raises `UserError` if it holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can raise nearly anything in the unpickler
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} holds more than tensors, or is damaged: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UserError(f"{path} must hold tensors by name, and nothing else")
    return content
