"""How the thresholds of JumpReLU learn.

With z the pre-activations, t_j the threshold of latent j and H the step function, neither
a_j = z_j H(z_j - t_j) nor the number of active latents, sum_j H(z_j - t_j), has a useful slope in
t_j. Rajamanoharan et al. 2024 (arXiv 2407.14435, eq. 11 and 12) replace the slopes by kernel
estimates. With K the rectangle of height 1 and width 1, and bandwidth b, these are

    d a_j / d t_j = -(t_j / b) K((z_j - t_j) / b),    d H / d t_j = -(1 / b) K((z_j - t_j) / b)

Let G_j = d loss / d a_j and p_j the price of an active latent, both divided by the batch size. Then

    d loss / d t_j = -(1 / b) sum over samples with |z_j - t_j| < b / 2 of (t_j G_j + p_j)

What is trained is log t_j, so that t_j stays positive. For autograd, `jump` and `count` are the two
functions with these slopes.
"""

from typing import Any

import torch
from torch import Tensor


def near(preacts: Tensor, threshold: Tensor | None, bandwidth: float) -> Tensor | None:
    """Where K is 1, that is |z_j - t_j| < b / 2: bool, shaped as preacts, to which the threshold
    broadcasts. None if the activation function has no threshold."""
    return None if threshold is None else _near(preacts, threshold, bandwidth)


def _near(preacts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (preacts - threshold).abs_() < bandwidth / 2


def log_threshold_gradient(slopes: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """d loss / d log t_j, from `slopes`, the sum over samples in the equation above. All tensors
    have the same shape."""
    return slopes * threshold / -bandwidth


def jump(preacts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """z_j H(z_j - t_j), of preacts [batch, n_latents] and threshold [n_latents]."""
    acts: Tensor = _Jump.apply(preacts, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return acts


def count(preacts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """H(z_j - t_j), of preacts [batch, n_latents] and threshold [n_latents]."""
    fires: Tensor = _Count.apply(preacts, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return fires


class _Jump(torch.autograd.Function):
    """See `jump`."""

    @staticmethod
    def forward(ctx: Any, preacts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(preacts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(preacts > threshold, preacts, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (preacts, threshold) = grads, ctx.saved_tensors
        is_near = _near(preacts, threshold, ctx.bandwidth)
        slope = -(grad * is_near).sum(0) * threshold / ctx.bandwidth
        return torch.where(preacts > threshold, grad, 0), slope, None


class _Count(torch.autograd.Function):
    """See `count`."""

    @staticmethod
    def forward(ctx: Any, preacts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(preacts, threshold)
        ctx.bandwidth = bandwidth
        return (preacts > threshold).to(preacts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,), (preacts, threshold) = grads, ctx.saved_tensors
        is_near = _near(preacts, threshold, ctx.bandwidth)
        return None, -(grad * is_near).sum(0) / ctx.bandwidth, None
