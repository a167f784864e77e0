"""The gradient by dense products, one residual a block of latents of equal reach.

The residual of a block is the mean, over the prefixes that contain it, of what they decode to less
x. Latents are sorted by reach, so that a block is a slice.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from matryoshka.kernels import jumprelu
from matryoshka.kernels.layout import MIN_NORM, Task, sparsity_slopes, zero_where_silent


def write(task: Task, dtype: torch.dtype, grouped: bool) -> Tensor:
    """Writes one SAE's gradient. -> mean square of a_j ||d_j|| [n_latents].

    dtype: what the operands of products are rounded to. grouped: all products of a kind are one
    grouped product, for which no number is read back from a GPU.
    """
    grads, x, acts, price, batch = task.grads, task.x, task.dense_acts(), task.price, len(task.x)
    near = task.acts.near
    ranked, order = task.reach.sort(descending=True, stable=True)
    W_dec, decoder_price = task.params.W_dec, task.decoder_price
    latents: slice | Tensor = slice(None)  # in the order in which they are from here on
    if len(task.ends) > 1:
        acts = torch.index_select(
            acts, 0, order, out=task.workspace.empty("ranked", acts, *acts.shape)
        )
        W_dec, price, latents = W_dec[order], price[order], order
        decoder_price = decoder_price[order]
        near = None if near is None else near[order]

    norms = W_dec.norm(dim=1)
    slope, length_slope = sparsity_slopes(acts, norms[:, None], task.sparsity)
    slope = slope * (price * norms / batch)[:, None]  # [n_latents, batch], or [n_latents, 1]
    g_acts = task.workspace.empty("g_acts", x, *acts.shape).copy_(slope)
    shrink = length_slope.sum(1) * decoder_price / norms.clamp_min(MIN_NORM) / batch
    g_W_dec = W_dec * shrink[:, None]
    blocks = Blocks(acts.to(dtype), W_dec.to(dtype), ranked, task)
    add = blocks.add_grouped if grouped else blocks.add_sliced
    g_b_dec = add(g_acts, g_W_dec)
    if near is not None:
        threshold = task.params.log_threshold[0, latents].exp()
        slopes = threshold * (g_acts * near).sum(1) + price * near.sum(1) / batch
        grads.log_threshold[0, latents] = jumprelu.log_threshold_gradient(
            slopes, threshold, task.bandwidth
        )
    zero_where_silent(g_acts, acts)

    grads.W_enc[latents] = (g_acts.to(dtype) @ x.to(dtype)).to(x.dtype)
    grads.b_enc[0, latents] = g_acts.sum(1)
    grads.W_dec[latents] = g_W_dec
    grads.b_dec[0] = g_b_dec
    mean_square = torch.empty_like(task.reach)
    sums = torch.linalg.vector_norm(acts, dim=1).square()  # acts may be the caller's: not in place
    mean_square[latents] = sums / batch * norms.square()
    return mean_square


class Blocks:
    """Latents sorted by reach, and the products of each block with its residual.

    `add_*` adds 2 <d_j, r> / batch to g_acts [n_latents, batch] and the sum over the batch of
    2 a_j r / batch to g_W_dec [n_latents, d_model], and returns the first block's sum of
    2 r / batch: the gradient of b_dec, [d_model].
    """

    def __init__(self, acts: Tensor, W_dec: Tensor, ranked: Tensor, task: Task):
        """acts [n_latents, batch], W_dec and their reaches `ranked` [n_latents], which fall.

        Where the first is below 1, the rest of the weight is that of the bias alone.
        """
        self.acts, self.W_dec, self.ranked = acts, W_dec, ranked
        self.ends, self.workspace, self.unhedged = task.ends, task.workspace, task.unhedged
        self.bias_residual = task.params.b_dec - task.x  # of the length 0: no latents at all

    def add_sliced(self, g_acts: Tensor, g_W_dec: Tensor) -> Tensor:
        """Block by block: a block's residual is the weighted sum, over the prefixes that contain
        it, of what they decode to less x."""
        decoded, ends = self.bias_residual, self.ends  # less x, by the lengths so far
        batch, sizes = len(decoded), ends.diff(prepend=ends.new_zeros(1)).tolist()
        # of each prefix, [n_blocks]; read one by one: an index would be copied to a GPU first
        shares = torch.stack([self.ranked[end - 1] for end in ends.tolist()])
        weights = -shares.diff(append=shares.new_zeros(1))
        residuals = self.workspace.empty("residuals", decoded, len(sizes), *decoded.shape)
        acts, W_dec = torch.split(self.acts, sizes), torch.split(self.W_dec, sizes)
        blocks = list(zip(residuals, acts, W_dec, strict=True))
        for residual, a, d in blocks:
            decoded = torch.addmm(decoded, a.T, d, out=residual)
        full = decoded * (2 / batch) if self.unhedged else None
        residuals[-1].mul_(weights[-1] * (2 / batch))
        for k in reversed(range(len(sizes) - 1)):
            weight = weights[k] * (2 / batch)
            torch.addcmul(residuals[k + 1], residuals[k], weight, out=residuals[k])
        g_blocks = zip(blocks, torch.split(g_acts, sizes), torch.split(g_W_dec, sizes), strict=True)
        for (residual, a, d), g_a, g_d in g_blocks:
            g_a.addmm_(d, residual.T)
            g_d.addmm_(a, residual if full is None else full)
        return residuals[0].sum(0) + self.of_bias_alone() if full is None else full.sum(0)

    def add_grouped(self, g_acts: Tensor, g_W_dec: Tensor) -> Tensor:
        """All blocks at once. Residual k is sum_q min(s_k, s_q) D_q, with D_q what block q decodes
        to; x is taken off D_0 alone, which is enough since min(s_k, s_0) = s_k."""
        batch, n_blocks = len(self.bias_residual), len(self.ends)
        ends = self.ends.to(self.acts.device, torch.int32)
        residuals = grouped_mm(self.acts.T, self.W_dec, offs=ends)  # [n_blocks, batch, d_model]
        residuals[0] += self.bias_residual
        full = residuals.sum(0) if self.unhedged else None
        if n_blocks > 1:
            # Reaches times the number of prefixes: whole numbers for sampled prefixes, and for
            # equal widths, which bfloat16 holds exactly.
            counts = self.ranked[ends - 1] * n_blocks
            shared = torch.minimum(counts, counts[:, None]).to(self.acts.dtype)
            mixed = self.workspace.empty("mixed", self.acts, *residuals.shape)
            torch.mm(shared, residuals.flatten(1), out=mixed.flatten(1))
            residuals = mixed
        else:
            residuals *= self.ranked[0].to(residuals.dtype)
        scale = 2 / (batch * n_blocks)
        g_acts.add_(grouped_mm(self.W_dec, residuals.mT, offs=ends), alpha=scale)
        if full is not None:
            g_W_dec.add_(self.acts @ full, alpha=2 / batch)
            return full.sum(0, dtype=g_acts.dtype) * (2 / batch)
        g_W_dec.add_(grouped_mm(self.acts, residuals, offs=ends), alpha=scale)
        return residuals[0].sum(0, dtype=g_acts.dtype) * scale + self.of_bias_alone()

    def of_bias_alone(self) -> Tensor:
        """The gradient of b_dec from the length 0: [d_model]."""
        batch = len(self.bias_residual)
        return self.bias_residual.sum(0) * ((1 - self.ranked[0]) * (2 / batch))
