"""Checks that a converted SAE is the same SAE: both encode and decode the same inputs, in float64.

Only differences that float32's rounding of the weights can make are allowed. A latent may fire in
one SAE alone only if its pre-activation is so near to the threshold that rounding can decide.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.metrics import squared_norms
from sae import SAE

TOLERANCE = 1e-5  # relative error of a reconstruction; rounding makes 1e-7, with odd weights 1e-6
NEAR = 1e-6  # distance to the threshold at which rounding may decide, / largest pre-activation
AT_ONCE = 256  # inputs at a time: with 65,536 latents, a tensor of 134 MB
Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # encode and decode


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two SAEs differ on n inputs.

    largest_error: the largest ||x_hat - x_hat'|| / ||x_hat|| of inputs on which the same latents
    fire in both. The other counts are of latents, summed over all inputs.
    """

    n: int
    largest_error: float
    n_fired: int  # latents that fire in the first SAE
    n_near: int  # latents that fire in one SAE alone, which rounding explains
    n_different: int  # latents that fire in one SAE alone, which rounding does not explain
    fvu: tuple[float, float]

    @property
    def is_same(self) -> bool:
        """Whether rounding explains all differences."""
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
    """Squared norms and counts of latents for each of n inputs; all [n]."""

    x_hat: Tensor  # ||x_hat||^2
    difference: Tensor  # ||x_hat - x_hat'||^2
    error: Tensor  # ||x - x_hat||^2
    error_of_other: Tensor  # ||x - x_hat'||^2
    is_same: Tensor  # bool: whether the same latents fire in both
    n_fired: Tensor
    n_near: Tensor
    n_different: Tensor


@torch.inference_mode()
def compare(sae: SAE, other: Codec, x: Tensor) -> Comparison:
    """Compares an SAE with the float64 `encode` and `decode` of another.

    x: [n, d_model], in the units of the data. Latents whose decoder row is zero are ignored,
    because they do not change the reconstruction.
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
        fvu=(float(sums.error.sum() / variance), float(sums.error_of_other.sum() / variance)),
    )


def _sums(sae: SAE, other: Codec, x: Tensor) -> Sums:
    """The sums for inputs x [n, d_model]; `sae` is in float64."""
    has_direction = sae.W_dec.norm(dim=1) > 0  # [n_latents]
    acts, theirs = sae.encode(x), other[0](x)  # [n, n_latents]
    fired = (acts > 0) & has_direction
    differs = (fired != (theirs > 0)) & has_direction
    near = differs & (decision_margin(sae, x) <= NEAR) if differs.any() else differs
    x_hat, their_x_hat = sae.decode(acts), other[1](theirs)
    return Sums(
        x_hat=squared_norms(x_hat),
        difference=squared_norms(x_hat - their_x_hat),
        error=squared_norms(x - x_hat),
        error_of_other=squared_norms(x - their_x_hat),
        is_same=~differs.any(1),
        n_fired=fired.sum(1),
        n_near=near.sum(1),
        n_different=(differs & ~near).sum(1),
    )


def relative_errors(squares: Tensor, differences: Tensor) -> Tensor:
    """sqrt(differences_i / max(squares_i, mean of squares)): [n].

    squares: ||x_hat_i||^2; differences: ||x_hat_i - x_hat_i'||^2; both [n]. The mean is there for
    inputs on which latents hardly fire: their activations are small differences of large numbers.
    """
    at_least = max(float(squares.mean()), torch.finfo(squares.dtype).tiny)
    errors: Tensor = (differences / squares.clamp(min=at_least)).sqrt()
    return errors


def decision_margin(sae: SAE, x: Tensor) -> Tensor:
    """How far each pre-activation is from the value at which the latent begins to fire.

    It is [n, n_latents], relative to the input's largest pre-activation. x: [n, d_model]; x and the
    SAE are in float64.
    """
    preacts = x * sae.scale @ sae.W_enc + sae.b_enc
    decided_at = torch.zeros_like(preacts)
    if sae.activation == "topk":
        preacts = preacts * sae.W_dec.norm(dim=1)
        decided_at = preacts.topk(int(sae.k or 1)).values[:, -1:].clamp(min=0)
    elif sae.threshold is not None:
        decided_at = sae.threshold
    return (preacts - decided_at).abs() / preacts.abs().amax(1, keepdim=True).clamp(min=1e-300)


def require_same(comparison: Comparison, what: str) -> None:
    """Raises `UserError` if two SAEs differ by more than rounding."""
    if not comparison.is_same:
        raise UserError(f"{what} is not the same SAE: {comparison}")
