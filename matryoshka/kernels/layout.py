"""What the kernels work on: parameters, activations, the objective of a step, and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae import ACTIVATIONS, Gate, Sparsity

MatmulDtype = Literal["float32", "bfloat16"]
# The cost of an active latent, which its price multiplies. "l0", for jumprelu, is a cost of 1.
Cost = Sparsity | Literal["l0"]

WITHOUT_NORMS = ("relu", "jumprelu")  # activation functions that do not use ||d_j||

# The least norm of a decoder row that is divided by. A row of zeros then gets gradient 0 from the
# sparsity loss, as with autograd, and not NaN.
MIN_NORM = 1e-12


class Params(NamedTuple):
    """The parameters of a stack of SAEs, or their gradient: views of one flat tensor
    [n_saes, n_params]. W_enc is the transpose of `SAE.W_enc`."""

    W_enc: Tensor  # [n_saes, n_latents, d_model]: a row a latent, as in W_dec
    b_enc: Tensor  # [n_saes, 1, n_latents]
    W_dec: Tensor  # [n_saes, n_latents, d_model]
    b_dec: Tensor  # [n_saes, 1, d_model]
    log_threshold: Tensor  # [n_saes, 1, n_latents] of jumprelu; [n_saes, 1, 0] of others

    @classmethod
    def of(cls, flat: Tensor, d_model: int, n_latents: int) -> "Params":
        """Views of `flat`, so that writing into one of them writes into `flat`."""
        shapes = [(n_latents, d_model), (1, n_latents), (n_latents, d_model), (1, d_model)]
        shapes.append((1, flat.shape[1] - sum(map(math.prod, shapes))))
        parts = torch.split(flat, [math.prod(shape) for shape in shapes], dim=1)
        shaped = zip(parts, shapes, strict=True)
        return cls(*(torch.unflatten(part, 1, shape) for part, shape in shaped))

    def slice(self, which: slice) -> "Params":
        """The parameters of some of the SAEs, as a stack."""
        return Params(*(tensor[which] for tensor in self))

    def one(self, i: int) -> "Params":
        """The parameters of SAE i, without the leading dimension."""
        return Params(*(tensor[i] for tensor in self))


class SparseActs(NamedTuple):
    """The activations that are not 0 as a list, sorted by latent. For jumprelu it also has the
    zeros just below their threshold, since the threshold's gradient depends on them."""

    latent: Tensor  # int64 [n_active]
    sample: Tensor  # int64 [n_active]
    a: Tensor  # [n_active]


@dataclass(frozen=True)
class Acts:
    """The activations of one SAE on a batch, either as a matrix or as a list."""

    shape: torch.Size  # [n_latents, batch]
    dense: Tensor | None  # [n_latents, batch]
    sparse: SparseActs | None
    near: Tensor | None = None  # for jumprelu, bool: is within half a bandwidth of the threshold
    least_kept: Tensor | None = None  # for batchtopk, []: the smallest a_j ||d_j|| that it kept


class Stats(NamedTuple):
    """Statistics of the batch that computing the gradient gives as well."""

    l0: Tensor  # [n_saes], active latents a sample
    mean_square: Tensor  # [n_saes, n_latents], of a_j ||d_j||
    kernels: tuple[str, ...] = ()  # for each SAE, the kernel that computed its gradient
    least_kept: Tensor | None = None  # for batchtopk, [n_saes]: the smallest a_j ||d_j|| it kept
    # The activations, if the stack is one SAE and they are at hand; valid until the next step. The
    # SAEs of a larger stack overwrite each other's.
    acts: Acts | None = None


class Workspace:
    """Memory for large intermediate tensors, which calls use again.

    On a CPU, the fresh pages of a large tensor can cost more than the arithmetic on it. On a GPU
    each tensor is a new one, since PyTorch's allocator, or the CUDA graph, already reuses memory.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, valid until `name` is next asked for."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        n, held = math.prod(shape), self._held.get(name, like[:0].flatten())
        if held.numel() < n or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._held[name] = like.new_empty(n + n // 8)
        return held[:n].view(shape)


@dataclass(frozen=True)
class Objective:
    """The loss of a stack of SAEs on one batch, as kernels/__init__.py writes it."""

    x: Tensor  # [n_saes, batch, d_model], scaled
    # [n_saes, n_latents]: the total weight of the prefixes that contain latent j, in the order in
    # which latents are stored. If the largest is below 1, the rest is the weight of b_dec alone.
    reach: Tensor
    price: Tensor  # [n_saes, n_latents]: sparsity_weight * reach
    # For each SAE, int64 [n_reaches]: how many latents have the highest reach, one of the two
    # highest, and so on. These are the prefix lengths. None: counted, which makes a GPU wait.
    ends: Sequence[Tensor] | None = None
    sparsity: Cost = "l1"
    activation: str = "relu"
    k: float = 0.0  # active latents a sample, for topk and batchtopk
    bandwidth: float = 0.0  # for jumprelu, in scaled activations
    unhedged: bool = False  # the decoder learns from the full reconstruction; see unhedged.py

    @property
    def of_decoder(self) -> "Objective":
        """The loss that the decoder learns from: this one, or that of one prefix if unhedged."""
        if not self.unhedged:
            return self
        sparsity_weight = self.price / self.reach  # [n_saes, n_latents]
        reach = torch.ones_like(sparsity_weight)
        return replace(self, reach=reach, price=sparsity_weight, ends=None, unhedged=False)

    def slice(self, i: int) -> "Objective":
        """The objective of SAE i, as a stack of one."""
        one = slice(i, i + 1)
        ends = None if self.ends is None else self.ends[one]
        x, reach, price = self.x[one], self.reach[one], self.price[one]
        return replace(self, x=x, reach=reach, price=price, ends=ends)

    def copied(self) -> "Objective":
        """This objective with copies of its tensors."""
        ends = None if self.ends is None else [end.clone() for end in self.ends]
        x, reach, price = self.x.clone(), self.reach.clone(), self.price.clone()
        return replace(self, x=x, reach=reach, price=price, ends=ends)

    def gate(self, params: Params) -> Gate:
        """What the activation function needs in training. Tensors are [n_saes, 1, n_latents] for
        the parameters of a stack, [1, n_latents] for those of one SAE."""
        needs_norms = self.activation not in WITHOUT_NORMS
        norms = params.W_dec.norm(dim=-1)[..., None, :] if needs_norms else None
        threshold = params.log_threshold.exp() if self.activation == "jumprelu" else None
        return Gate(norms, self.k, threshold)

    def acts(self, params: Params, preacts: Tensor, gate: Gate | None = None) -> Tensor:
        """Activations [..., batch, n_latents] of `preacts`, which may be overwritten. `gate` is
        that of `params`, if the caller has it already."""
        return ACTIVATIONS[self.activation](preacts, gate or self.gate(params))

    def ends_of(self, i: int) -> Tensor:
        """The ends of SAE i, int64 [n_reaches]; counted if they were not given."""
        return count_ends(self.reach[i]) if self.ends is None else self.ends[i]


@dataclass(frozen=True)
class Task:
    """The part of an objective that belongs to one SAE, with its activations. No tensor has the
    leading dimension of a stack."""

    grads: Params  # what a kernel writes
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
        """The price in the decoder's gradient, [n_latents]: that of reach 1 if unhedged."""
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
        """The activations as a list; see `SparseActs`."""
        if self.acts.sparse is not None:
            return self.acts.sparse
        acts = self.dense_acts()
        listed = acts if self.acts.near is None else self.acts.near | (acts != 0)
        latent, sample = listed.nonzero(as_tuple=True)
        return SparseActs(latent, sample, acts[latent, sample])


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index] of a vector, in half the time that indexing takes on a CPU."""
    return values.index_select(0, index)


def count_ends(reach: Tensor) -> Tensor:
    """For each distinct reach, from the highest down, how many latents have it or a higher one:
    int64 [n_reaches]."""
    sorted_reach = reach.sort(descending=True).values
    counts: Tensor = torch.unique_consecutive(sorted_reach, return_counts=True)[1]
    return counts.cumsum(0)


def sparsity_slopes(acts: Tensor, norms: Tensor, sparsity: Cost) -> tuple[Tensor, Tensor]:
    """The slopes of the cost f(c) of a contribution c = a ||d||: f'(c), and a f'(c), which is the
    slope in the decoder row's norm ||d||. Shapes broadcast.

    Both are 0 for "l0", whose cost enters the gradient of the thresholds alone.
    """
    if sparsity == "l0":
        return torch.zeros_like(norms), norms.new_zeros(()).expand_as(acts)
    if sparsity == "l1":
        return torch.ones_like(norms), acts
    slope = 1 / (acts * norms + 0.1)
    return slope, acts * slope


def zero_where_silent(g_acts: Tensor, acts: Tensor) -> None:
    """Sets g_acts, the gradient of the activations, to 0 where an activation is 0, in place."""
    torch.ops.aten.threshold_backward.grad_input(g_acts, acts, 0, grad_input=g_acts)
