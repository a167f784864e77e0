"""Reads sparsify's folders, cfg.json and sae.safetensors, of TopK SAEs.

In sparsify, b_dec is subtracted from the input, the k largest activations fire, and decoder rows
have norm 1. Nothing is written in this format, because a ReLU SAE has no exact form in it.
"""

from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.foreign_files import read_object, read_safetensors, whole
from matryoshka.plain_weights import require_unit_rows, sae_of, uncentred, weights_from
from sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


def recognises(folder: Path) -> bool:
    """Whether a folder is one of sparsify's."""
    return (folder / WEIGHTS).exists() and (folder / CONFIG).exists()


def read(folder: Path) -> SAE:
    """Reads the SAE in a folder of sparsify. Raises `UserError` if it cannot be read."""
    config, tensors = read_object(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    try:
        _require_plain(config)
        d_model = whole(config, "d_in")
        n_latents = int(config.get("num_latents") or 0) or d_model * whole(
            config, "expansion_factor"
        )
        weights = uncentred(weights_from(tensors, TENSORS, n_latents, d_model))
        require_unit_rows(weights, "sparsify")
        about = {"from": {"format": "sparsify", **config}}
        return sae_of(weights, "topk", about, whole(config, "k"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _require_plain(config: dict[str, Any]) -> None:
    """Raises `UserError` if it is not a plain TopK SAE."""
    if config.get("activation", "topk") != "topk":
        raise UserError(f"activation {config['activation']!r} cannot be read here, only 'topk'")
    for name in ("transcode", "skip_connection", "signed"):
        if config.get(name):
            raise UserError(f"{name} is set: only plain TopK SAEs can be read here")
