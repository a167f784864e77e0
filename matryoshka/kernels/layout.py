"""What the kernels work on: parameters as views of one tensor, an objective, and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae import ACTIVATIONS, Gate, Sparsity

MatmulDtype = Literal["float32", "bfloat16"]
Cost = Sparsity | Literal["l0"]  # of an activation, times its latent's price; l0, of jumprelu: 1

WITHOUT_NORMS = ("relu", "jumprelu")  # activation functions that do not look at ||d_j||

# The least length that a decoder row is divided by. A row of zeros has no direction: its part of
# the sparsity loss then has gradient 0, as autograd has it, and not NaN.
MIN_NORM = 1e-12


class Params(NamedTuple):
    """What is learnt, or its gradient: views of one flat tensor [n_saes, n_params].

    W_enc is the transpose of the SAE's.
    """

    W_enc: Tensor  # [n_saes, n_latents, d_model]: a row a latent, as in W_dec
    b_enc: Tensor  # [n_saes, 1, n_latents]
    W_dec: Tensor  # [n_saes, n_latents, d_model]
    b_dec: Tensor  # [n_saes, 1, d_model]
    log_threshold: Tensor  # [n_saes, 1, n_latents] of jumprelu; [n_saes, 1, 0] of others

    @classmethod
    def of(cls, flat: Tensor, d_model: int, n_latents: int) -> "Params":
        """The views of `flat`; what is written into them is written into it."""
        shapes = [(n_latents, d_model), (1, n_latents), (n_latents, d_model), (1, d_model)]
        shapes.append((1, flat.shape[1] - sum(map(math.prod, shapes))))
        parts = torch.split(flat, [math.prod(shape) for shape in shapes], dim=1)
        shaped = zip(parts, shapes, strict=True)
        return cls(*(torch.unflatten(part, 1, shape) for part, shape in shaped))

    def slice(self, which: slice) -> "Params":
        """Some of the SAEs, still as a stack."""
        return Params(*(tensor[which] for tensor in self))

    def one(self, i: int) -> "Params":
        """SAE i by itself: tensors without the leading dimension."""
        return Params(*(tensor[i] for tensor in self))


class SparseActs(NamedTuple):
    """Activations as a list, sorted by latent: all that are not 0. For jumprelu also the zeros
    just below their threshold, since these move it."""

    latent: Tensor  # int64 [n]
    sample: Tensor  # int64 [n]
    a: Tensor  # [n]


@dataclass(frozen=True)
class Acts:
    """The activations of one SAE on a batch, [n_latents, batch]: a row a latent."""

    shape: torch.Size
    dense: Tensor | None  # None: they are in `sparse` alone
    sparse: SparseActs | None  # None: they are in `dense` alone
    near: Tensor | None = None  # bool: of jumprelu, less than half a bandwidth from the threshold
    least: Tensor | None = None  # []: the smallest a_j ||d_j|| that batchtopk let through


class Stats(NamedTuple):
    """What computing a gradient tells of the activations."""

    l0: Tensor  # [n_saes], active latents a sample
    mean_square: Tensor  # [n_saes, n_latents], of a_j ||d_j||
    kernels: tuple[str, ...] = ()  # an SAE each: how its gradient was computed
    least: Tensor | None = None  # [n_saes], of the a_j ||d_j|| that batchtopk let through
    # The activations of a stack of one SAE, where the kernel kept them; of several, each one's
    # overwrite those of the one before. Valid until the next step.
    acts: Acts | None = None


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
    # [n_saes, n_latents], of the latents as they are stored; at most 1, and what the largest lacks
    # of 1 is the weight of the bias alone
    reach: Tensor
    price: Tensor  # [n_saes, n_latents]: sparsity_weight * reach
    # For each SAE int64 [n_reaches]: how many latents have the highest reach, the highest two, and
    # so on. None: they are counted, which waits for a GPU.
    ends: Sequence[Tensor] | None = None
    sparsity: Cost = "l1"
    activation: str = "relu"
    k: float = 0.0  # active latents a sample, of topk and batchtopk
    bandwidth: float = 0.0  # of jumprelu's kernel, in scaled activations
    unhedged: bool = False  # the decoder learns from the full reconstruction; see unhedged.py

    @property
    def of_decoder(self) -> "Objective":
        """What the decoder learns from: this, or where it is unhedged, the full reconstruction."""
        if not self.unhedged:
            return self
        weight = self.price / self.reach
        return replace(self, reach=torch.ones_like(weight), price=weight, ends=None, unhedged=False)

    def slice(self, i: int) -> "Objective":
        """That of SAE i, still as a stack."""
        one = slice(i, i + 1)
        ends = None if self.ends is None else self.ends[one]
        x, reach, price = self.x[one], self.reach[one], self.price[one]
        return replace(self, x=x, reach=reach, price=price, ends=ends)

    def copied(self) -> "Objective":
        """The same, of copies of the tensors."""
        ends = None if self.ends is None else [end.clone() for end in self.ends]
        x, reach, price = self.x.clone(), self.reach.clone(), self.price.clone()
        return replace(self, x=x, reach=reach, price=price, ends=ends)

    def gate(self, params: Params) -> Gate:
        """What the activation function needs in training, of a stack, [n_saes, 1, n_latents] each,
        or of one SAE, [1, n_latents] each."""
        needs_norms = self.activation not in WITHOUT_NORMS
        norms = params.W_dec.norm(dim=-1)[..., None, :] if needs_norms else None
        threshold = params.log_threshold.exp() if self.activation == "jumprelu" else None
        return Gate(norms, self.k, threshold)

    def acts(self, params: Params, preacts: Tensor, gate: Gate | None = None) -> Tensor:
        """Activations of pre-activations [..., batch, n_latents], which may be overwritten; gate:
        that of `params`, where it is at hand."""
        return ACTIVATIONS[self.activation](preacts, gate or self.gate(params))

    def ends_of(self, i: int) -> Tensor:
        """The ends of SAE i, counted where they are not given."""
        return count_ends(self.reach[i]) if self.ends is None else self.ends[i]


@dataclass(frozen=True)
class Task:
    """One SAE's part of an objective, with its activations: tensors have no leading dimension."""

    grads: Params  # written
    params: Params
    acts: Acts
    x: Tensor  # [batch, d_model]
    reach: Tensor  # [n_latents]
    price: Tensor  # [n_latents]
    ends: Tensor  # [n_reaches]
    sparsity: Cost
    bandwidth: float
    workspace: Workspace
    unhedged: bool = False

    @property
    def decoder_price(self) -> Tensor:
        """The price as the decoder has it: [n_latents]."""
        return self.price / self.reach if self.unhedged else self.price

    def dense_acts(self) -> Tensor:
        """The activations as a matrix [n_latents, batch]."""
        if self.acts.dense is not None:
            return self.acts.dense
        assert self.acts.sparse is not None
        latent, sample, a = self.acts.sparse
        dense = self.workspace.empty("dense", a, *self.acts.shape).zero_()
        return dense.view(-1).index_copy_(0, latent * dense.shape[1] + sample, a).view_as(dense)

    def sparse_acts(self) -> SparseActs:
        """The activations as a list."""
        if self.acts.sparse is not None:
            return self.acts.sparse
        acts = self.dense_acts()
        listed = acts if self.acts.near is None else self.acts.near | (acts != 0)
        latent, sample = listed.nonzero(as_tuple=True)
        return SparseActs(latent, sample, acts[latent, sample])


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index], of a vector, in half of the time that a CPU takes for that."""
    return values.index_select(0, index)


def count_ends(reach: Tensor) -> Tensor:
    """How many latents have each reach or a higher one, from the highest down: [n_reaches]."""
    ranked = reach.sort(descending=True).values
    counts: Tensor = torch.unique_consecutive(ranked, return_counts=True)[1]
    return counts.cumsum(0)


def sparsity_slopes(acts: Tensor, norms: Tensor, sparsity: Cost) -> tuple[Tensor, Tensor]:
    """Of the cost f(c) of a contribution c = a ||d||: its slope f'(c), and its slope a f'(c) in the
    row's length ||d||; shapes broadcast.

    Both are 0 for "l0", which only the threshold's gradient has a part of.
    """
    if sparsity == "l0":
        return torch.zeros_like(norms), norms.new_zeros(()).expand_as(acts)
    if sparsity == "l1":
        return torch.ones_like(norms), acts
    slope = 1 / (acts * norms + 0.1)
    return slope, acts * slope


def zero_where_silent(g_acts: Tensor, acts: Tensor) -> None:
    """Sets the gradient of activations to 0 where those are 0, in place."""
    torch.ops.aten.threshold_backward.grad_input(g_acts, acts, 0, grad_input=g_acts)
