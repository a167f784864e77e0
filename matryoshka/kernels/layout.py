"""What the kernels work on: parameters as views of one tensor, an objective, and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae import ACTIVATIONS, Sparsity

MatmulDtype = Literal["float32", "bfloat16"]

# The least length that a decoder row is divided by. A row of zeros has no direction: its part of
# the sparsity loss then has gradient 0, as autograd has it, and not NaN.
MIN_NORM = 1e-12


class Params(NamedTuple):
    """What is learnt, or its gradient: views of one flat tensor [n_saes, n_params]."""

    W_enc: Tensor  # [n_saes, n_latents, d_model]: a row a latent, as in W_dec
    b_enc: Tensor  # [n_saes, 1, n_latents]
    W_dec: Tensor  # [n_saes, n_latents, d_model]
    b_dec: Tensor  # [n_saes, 1, d_model]

    @classmethod
    def of(cls, flat: Tensor, d_model: int, n_latents: int) -> "Params":
        """The views of `flat`; what is written into them is written into it."""
        shapes = [(n_latents, d_model), (1, n_latents), (n_latents, d_model), (1, d_model)]
        parts = torch.split(flat, [math.prod(shape) for shape in shapes], dim=1)
        shaped = zip(parts, shapes, strict=True)
        return cls(*(torch.unflatten(part, 1, shape) for part, shape in shaped))

    def slice(self, which: slice) -> "Params":
        """Some of the SAEs, still as a stack."""
        return Params(*(tensor[which] for tensor in self))

    def one(self, i: int) -> "Params":
        """SAE i by itself: tensors without the leading dimension."""
        return Params(*(tensor[i] for tensor in self))


class Stats(NamedTuple):
    """What a step learns of the activations on its way."""

    l0: Tensor  # [n_saes], active latents a sample
    mean_square: Tensor  # [n_saes, n_latents], of a_j ||d_j||
    kernels: tuple[str, ...] = ()  # an SAE each: how its gradient was computed


class Workspace:
    """Memory that is used again from call to call.

    On a CPU, the fresh pages of large tensors can cost more than the arithmetic on them. A GPU's
    allocator keeps its pages, and a CUDA graph its own memory: there, every tensor is a fresh one.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of that shape, uninitialised, valid until `name` is asked for again."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        n, held = math.prod(shape), self._held.get(name, like[:0].flatten())
        if held.numel() < n or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._held[name] = like.new_empty(n + n // 8)
        return held[:n].view(shape)


@dataclass(frozen=True)
class Objective:
    """What a stack of SAEs is asked for on one batch."""

    x: Tensor  # [n_saes, batch, d_model], scaled
    reach: Tensor  # [n_saes, n_latents], of the latents as they are stored; its maximum is 1
    price: Tensor  # [n_saes, n_latents]: sparsity_weight * reach
    # Of each SAE, how many latents have each reach or a higher one, from the highest down: int64
    # [n_reaches]. None counts them, for which a GPU has to be waited for.
    ends: Sequence[Tensor] | None = None
    sparsity: Sparsity = "l1"
    activation: str = "relu"

    def slice(self, i: int) -> "Objective":
        """That of SAE i, still as a stack."""
        one = slice(i, i + 1)
        ends = None if self.ends is None else self.ends[one]
        return Objective(
            self.x[one], self.reach[one], self.price[one], ends, self.sparsity, self.activation
        )

    def copied(self) -> "Objective":
        """The same, of copies of the tensors."""
        ends = None if self.ends is None else [end.clone() for end in self.ends]
        x, reach, price = self.x.clone(), self.reach.clone(), self.price.clone()
        return Objective(x, reach, price, ends, self.sparsity, self.activation)

    def ends_of(self, i: int) -> Tensor:
        """The ends of SAE i, counted where they are not given."""
        return count_ends(self.reach[i]) if self.ends is None else self.ends[i]


@dataclass(frozen=True)
class Task:
    """One SAE's part of an objective, with its activations: tensors have no leading dimension."""

    grads: Params  # written
    params: Params
    acts: Tensor  # [n_latents, batch]: a row a latent
    x: Tensor  # [batch, d_model]
    reach: Tensor  # [n_latents]
    price: Tensor  # [n_latents]
    ends: Tensor  # [n_reaches]
    sparsity: Sparsity
    workspace: Workspace


def count_ends(reach: Tensor) -> Tensor:
    """How many latents have each reach or a higher one, from the highest down: [n_reaches]."""
    ranked = reach.sort(descending=True).values
    counts: Tensor = torch.unique_consecutive(ranked, return_counts=True)[1]
    return counts.cumsum(0)


def encode(
    params: Params, x: Tensor, activation: str, matmul_dtype: MatmulDtype, workspace: Workspace
) -> Tensor:
    """acts [n_latents, batch] in x's dtype, from x [batch, d_model] of one SAE.

    A row a latent: what belongs to one lies together, and can be read out of order.
    """
    W_enc, b_enc = params.W_enc, params.b_enc.T
    preacts = workspace.empty("acts", x, len(W_enc), len(x))
    if matmul_dtype == "float32":
        torch.addmm(b_enc, W_enc, x.T, out=preacts)
    else:
        rounded = workspace.empty("W_enc", x.bfloat16(), *W_enc.shape).copy_(W_enc)
        product = workspace.empty("product", rounded, *preacts.shape)
        preacts.copy_(torch.mm(rounded, x.bfloat16().T, out=product)).add_(b_enc)
    acts: Tensor = ACTIVATIONS[activation](preacts.T).T
    return acts


def sparsity_slopes(acts: Tensor, norms: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """f'(a ||d||) and a f'(a ||d||), for f the identity or the logarithm; shapes broadcast."""
    if sparsity == "l1":
        return torch.ones_like(norms), acts
    slope = 1 / (acts * norms + 0.1)
    return slope, acts * slope


def zero_where_silent(g_acts: Tensor, acts: Tensor) -> None:
    """Sets the gradient of activations to 0 where those are 0, in place."""
    torch.ops.aten.threshold_backward.grad_input(g_acts, acts, 0, grad_input=g_acts)
