"""Proof that a converted SAE is the same SAE: both encode and decode the same inputs, in float64.

Differences that remain are of float32's rounding of the weights. A latent may fire differently
only where its pre-activation is so near to what decides that rounding can.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.metrics import squared_norms
from sae import SAE

TOLERANCE = 1e-5  # of a reconstruction's norm: rounding makes 1e-7, of odd weights 1e-6
NEAR = 1e-6  # of the largest pre-activation: how near to what decides rounding can matter
AT_ONCE = 256  # inputs: of 65,536 latents, that is 134 MB a tensor
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


class Sums(NamedTuple):
    """Of each of n inputs: squared norms, whether the same latents fire, and how many; all [n]."""

    x_hat: Tensor  # ||x_hat||^2
    difference: Tensor  # ||x_hat - x_hat'||^2
    left: Tensor  # ||x - x_hat||^2
    left_by_other: Tensor  # ||x - x_hat'||^2
    is_same: Tensor
    n_fired: Tensor
    n_near: Tensor
    n_different: Tensor


@torch.inference_mode()
def compare(sae: SAE, other: Codec, x: Tensor) -> Comparison:
    """Compares an SAE with another's float64 `encode` and `decode`.

    x: [n, d_model], in the units of the data. Latents whose decoder row is zero say nothing, and
    may fire or not.
    """
    double = sae.with_tensors().double()
    parts = [_sums(double, other, part.double()) for part in torch.split(x, AT_ONCE)]
    sums = Sums(*(torch.cat(of_parts) for of_parts in zip(*parts, strict=True)))
    variance = squared_norms(x.double() - x.double().mean(0)).sum()
    error = relative_errors(sums.x_hat, sums.difference)[sums.is_same]
    return Comparison(
        n=len(x),
        largest_error=float(error.amax()) if len(error) else 0.0,
        n_fired=int(sums.n_fired.sum()),
        n_near=int(sums.n_near.sum()),
        n_different=int(sums.n_different.sum()),
        fvu=(float(sums.left.sum() / variance), float(sums.left_by_other.sum() / variance)),
    )


def _sums(sae: SAE, other: Codec, x: Tensor) -> Sums:
    """Of inputs x [n, d_model], with a float64 SAE."""
    says_something = sae.W_dec.norm(dim=1) > 0  # [n_latents]
    acts, theirs = sae.encode(x), other[0](x)  # [n, n_latents]
    fired = (acts > 0) & says_something
    differs = (fired != (theirs > 0)) & says_something
    near = differs & (decision_margin(sae, x) <= NEAR) if differs.any() else differs
    x_hat, their_x_hat = sae.decode(acts), other[1](theirs)
    return Sums(
        x_hat=squared_norms(x_hat),
        difference=squared_norms(x_hat - their_x_hat),
        left=squared_norms(x - x_hat),
        left_by_other=squared_norms(x - their_x_hat),
        is_same=~differs.any(1),
        n_fired=fired.sum(1),
        n_near=near.sum(1),
        n_different=(differs & ~near).sum(1),
    )


def relative_errors(squares: Tensor, differences: Tensor) -> Tensor:
    """Roots of differences ||x_hat_i - x_hat_i'||^2 as a share of ||x_hat_i||^2 or, where that is
    larger, of its mean: [n]. Where a latent hardly fires, its activation is a small difference."""
    at_least = max(float(squares.mean()), torch.finfo(squares.dtype).tiny)
    errors: Tensor = (differences / squares.clamp(min=at_least)).sqrt()
    return errors


def decision_margin(sae: SAE, x: Tensor) -> Tensor:
    """How far each latent is from firing or not, [n, n_latents], as a share of the largest
    pre-activation of its input. x: [n, d_model], float64 as the SAE."""
    preacts = x * sae.scale @ sae.W_enc + sae.b_enc
    decided_at = torch.zeros_like(preacts)
    if sae.activation == "topk":
        preacts = preacts * sae.W_dec.norm(dim=1)
        decided_at = preacts.topk(int(sae.k or 1)).values[:, -1:].clamp(min=0)
    elif sae.threshold is not None:
        decided_at = sae.threshold
    return (preacts - decided_at).abs() / preacts.abs().amax(1, keepdim=True).clamp(min=1e-300)


def require_same(comparison: Comparison, what: str) -> None:
    """Raises `UserError` where two SAEs differ by more than rounding."""
    if not comparison.is_same:
        raise UserError(f"{what} is not the same SAE: {comparison}")
