"""Proof that a converted SAE is the same SAE: both encode and decode the same inputs, in float64.

Differences that remain are of float32's rounding of the weights. A latent may fire differently
only where its pre-activation is so near to what decides that rounding can.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.metrics import squared_norms
from sae import SAE

TOLERANCE = 1e-5  # of a reconstruction's norm: rounding makes 1e-7, of odd weights 1e-6
NEAR = 1e-6  # of the largest pre-activation: how near to what decides rounding can matter
Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # encode and decode


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two SAEs do on n inputs."""

    n: int
    largest_error: (
        float  # max ||x_hat - x_hat'|| / ||x_hat||, of inputs where the same latents fire
    )
    n_fired: int  # latents that fire, over all inputs
    n_near: int  # those that fire in one alone, so near to what decides that rounding can
    n_different: int  # those that fire in one alone, without that excuse
    fvu: tuple[float, float]

    @property
    def is_same(self) -> bool:
        """Whether no difference is left but rounding's."""
        return self.n_different == 0 and self.largest_error <= TOLERANCE

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"on {self.n:,} inputs: largest relative error {self.largest_error:.1e}, latents that "
            f"fire in one alone {self.n_different + self.n_near} of {self.n_fired:,}"
            + (f" ({self.n_near} by rounding)" if self.n_near else "")
            + f", FVU {self.fvu[0]:.6f} and {self.fvu[1]:.6f}"
        )


def codec(sae: SAE) -> Codec:
    """An SAE's encode and decode, in float64."""
    double = sae.with_tensors().double()
    return double.encode, double.decode


@torch.inference_mode()
def compare(sae: SAE, other: Codec, x: Tensor) -> Comparison:
    """Compares an SAE with another's float64 `encode` and `decode`.

    x: [n, d_model], in the units of the data. Latents whose decoder row is zero say nothing, and
    may fire or not.
    """
    x = x.double()
    encode, decode = codec(sae)
    says_something = sae.W_dec.norm(dim=1) > 0  # [n_latents]
    acts, theirs = encode(x), other[0](x)  # [n, n_latents]
    fired = (acts > 0) & says_something
    differs = (fired != (theirs > 0)) & says_something
    near = differs & (decision_margin(sae, x) <= NEAR)
    x_hat, their_x_hat = decode(acts), other[1](theirs)
    error, same = relative_errors(x_hat, their_x_hat), ~differs.any(1)
    return Comparison(
        n=len(x),
        largest_error=float(error[same].amax()) if same.any() else 0.0,
        n_fired=int(fired.sum()),
        n_near=int(near.sum()),
        n_different=int((differs & ~near).sum()),
        fvu=(fvu(x, x_hat), fvu(x, their_x_hat)),
    )


def relative_errors(x_hat: Tensor, other: Tensor) -> Tensor:
    """||x_hat_i - other_i|| as a share of ||x_hat_i|| or, where that is larger, of the root of the
    mean of its square: [n]. Where a latent hardly fires, its activation is a small difference."""
    squares = squared_norms(x_hat)
    errors: Tensor = (
        squared_norms(x_hat - other) / squares.clamp(min=float(squares.mean()))
    ).sqrt()
    return errors


def decision_margin(sae: SAE, x: Tensor) -> Tensor:
    """How far each latent is from firing or not, [n, n_latents], as a share of the largest
    pre-activation of its input. x: float64 [n, d_model]."""
    double = sae.with_tensors().double()
    preacts = x * double.scale @ double.W_enc + double.b_enc
    decided_at = torch.zeros_like(preacts)
    if sae.activation == "topk":
        preacts = preacts * double.W_dec.norm(dim=1)
        decided_at = preacts.topk(int(sae.k or 1)).values[:, -1:].clamp(min=0)
    elif sae.threshold is not None:
        decided_at = sae.threshold.double()
    return (preacts - decided_at).abs() / preacts.abs().amax(1, keepdim=True).clamp(min=1e-300)


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """The fraction of variance unexplained; nan where the inputs are all the same."""
    return float(squared_norms(x - x_hat).sum() / squared_norms(x - x.mean(0)).sum())


def require_same(comparison: Comparison, what: str) -> None:
    """Raises `UserError` where two SAEs differ by more than rounding."""
    if not comparison.is_same:
        raise UserError(f"{what} is not the same SAE: {comparison}")
