"""An SAE's weights for inputs in the units of the data, as other tools have them:

    acts  = activation(x W_enc + b_enc)        x_hat = acts W_dec + b_dec

This project multiplies inputs by s = sqrt(d_model) / mean_norm. With that folded in, the weights
are s W_enc, b_enc, W_dec / s and b_dec / s, and the activations do not change. Everything is
computed in float64, and rounded once, when an SAE or a file is made.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from sae import SAE, WITH_K

OF_THRESHOLD = ("batchtopk", "jumprelu")
UNIT_ROW = 1e-3  # how far a norm may be from 1; a row stored in bfloat16 is off by about 1e-4


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in float64, for inputs in the units of the data.

    W_enc [d_model, n_latents], b_enc [n_latents], W_dec [n_latents, d_model], b_dec [d_model], and
    threshold [n_latents] or None.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """The norms of the decoder rows, [n_latents]."""
        norms: Tensor = self.W_dec.norm(dim=1)
        return norms

    def float32(self) -> dict[str, Tensor]:
        """Contiguous float32 tensors by name. Raises `UserError` if a value is too large for it."""
        tensors = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                tensors[field.name] = value.float().contiguous()
                if not tensors[field.name].isfinite().all():
                    raise UserError(f"{field.name} has values that float32 cannot hold")
        return tensors


def weights_of(sae: SAE) -> Weights:
    """The weights of an SAE, with its input scale folded in."""
    state = {name: tensor.detach().cpu().double() for name, tensor in sae.state_dict().items()}
    s = math.sqrt(sae.d_model) / state["mean_norm"]
    return Weights(
        W_enc=state["W_enc"] * s,
        b_enc=state["b_enc"],
        W_dec=state["W_dec"] / s,
        b_dec=state["b_dec"] / s,
        threshold=state.get("threshold"),
    )


def sae_of(
    weights: Weights,
    activation: str,
    about: Mapping[str, Any],
    k: float | None = None,
    mean_norm: float | None = None,
) -> SAE:
    """An SAE with these weights, in float32.

    `mean_norm`: the mean norm of its inputs; by default sqrt(d_model), for which s = 1. Raises
    `UserError` if the values do not make an SAE.
    """
    d_model = len(weights.b_dec)
    s = 1.0 if mean_norm is None else math.sqrt(d_model) / mean_norm
    threshold = weights.threshold if activation in OF_THRESHOLD else None
    tensors = Weights(
        weights.W_enc / s, weights.b_enc, weights.W_dec * s, weights.b_dec * s, threshold
    ).float32()
    tensors["mean_norm"] = torch.tensor(math.sqrt(d_model) / s)
    try:
        return SAE.from_tensors(tensors, activation, about, k if activation in WITH_K else None)
    except ValueError as error:
        raise UserError(str(error)) from None


def has_prefixes(sae: SAE) -> bool:
    """Whether the SAE was trained at prefixes that are shorter than all of its latents."""
    shorter = [m for m in sae.about.get("widths") or () if 0 < m < sae.n_latents]
    return bool(shorter) or sae.about.get("n_prefixes", 1) > 1


def unit_rows(weights: Weights) -> Weights:
    """Weights with decoder rows of norm 1 and the same reconstructions.

    Activations are multiplied by the norms. A row of zeros, which has no direction, becomes the
    first unit vector; its latent, which added nothing, then never fires.
    """
    norms = weights.norms
    is_zero = norms == 0
    W_dec = weights.W_dec / torch.where(is_zero, 1.0, norms)[:, None]
    W_dec[is_zero, 0] = 1.0
    threshold = None if weights.threshold is None else weights.threshold * norms
    return dataclasses.replace(
        weights,
        W_enc=weights.W_enc * norms,
        b_enc=weights.b_enc * norms,
        W_dec=W_dec,
        threshold=threshold,
    )


def centred(weights: Weights) -> Weights:
    """The same SAE for a tool that subtracts b_dec from the input: (x - b_dec) W_enc + b_enc."""
    return dataclasses.replace(weights, b_enc=weights.b_enc + weights.b_dec @ weights.W_enc)


def uncentred(weights: Weights) -> Weights:
    """The inverse of `centred`."""
    return dataclasses.replace(weights, b_enc=weights.b_enc - weights.b_dec @ weights.W_enc)


def require_unit_rows(weights: Weights, what: str) -> None:
    """Raises `UserError` if the decoder rows' norms differ, so that TopK means another SAE here.

    The tool chooses the k largest activations; this project chooses the k largest activations times
    norms.
    """
    norms = weights.norms[weights.norms > 0]
    if len(norms) and float(norms.max() / norms.min()) > 1 + UNIT_ROW:
        raise UserError(
            f"{what} chooses the largest activations, whatever the norms of their decoder rows, "
            f"which are {float(norms.min()):.4g} to {float(norms.max()):.4g}; here activations "
            "times norms are compared, so it would be another SAE"
        )


# ------------------------------------------------------------------------------------ from a file


def weights_from(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], n_latents: int, d_model: int
) -> Weights:
    """Weights from the tensors of a file, in float64.

    names: the name in the file of each field of `Weights`; "name.T" is transposed. A scalar
    threshold applies to every latent. A threshold below 0 becomes 0, because firing activations are
    positive. Raises `UserError` if a tensor is missing, or not of floats, or has another shape or
    values that are not finite.
    """
    shapes = {
        "W_enc": [d_model, n_latents],
        "b_enc": [n_latents],
        "W_dec": [n_latents, d_model],
        "b_dec": [d_model],
        "threshold": [n_latents],
    }
    found = {}
    for field, name in names.items():
        tensor = _checked(tensors, name.removesuffix(".T")).double()
        tensor = tensor.T if name.endswith(".T") else tensor
        if field == "threshold":
            tensor = tensor.clamp(min=0).expand(n_latents) if tensor.dim() == 0 else tensor
            tensor = tensor.clamp(min=0)
        if list(tensor.shape) != shapes[field]:
            raise UserError(
                f"{name.removesuffix('.T')} is {list(tensor.shape)} where the sizes in the "
                f"settings, {n_latents} latents of {d_model}, need {shapes[field]}"
                + (" transposed" if name.endswith(".T") else "")
            )
        found[field] = tensor
    return Weights(**found)


def _checked(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor `name`. Raises `UserError` unless it is there and holds finite floats."""
    if name not in tensors:
        raise UserError(f"{name} is missing among {', '.join(sorted(tensors)) or 'no tensors'}")
    tensor = tensors[name]
    if not tensor.is_floating_point():
        raise UserError(f"{name} must hold floats, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds values that are not finite")
    return tensor
