"""The gradient by dense products, with one residual for each block of latents of equal reach.

Latents are sorted by reach, so that a block is a slice and the first m blocks are a prefix. The
residual of a block is the weighted sum of x_hat - x over the prefixes that contain it.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from matryoshka.kernels import jumprelu
from matryoshka.kernels.layout import MIN_NORM, Task, sparsity_slopes, zero_where_silent


def write(task: Task, dtype: torch.dtype, grouped: bool) -> Tensor:
    """Writes one SAE's gradient. -> mean square of a_j ||d_j|| [n_latents].

    The operands of products are rounded to `dtype`. `grouped`: the products of all blocks are one
    grouped product, for which a GPU does not have to report the blocks' sizes to the host.
    """
    grads, x, acts, price, batch = task.grads, task.x, task.dense_acts(), task.price, len(task.x)
    near = task.acts.near
    sorted_reach, order = task.reach.sort(descending=True, stable=True)
    W_dec, decoder_price = task.params.W_dec, task.decoder_price
    latents: slice | Tensor = slice(None)  # the latent of each row, from here on
    if len(task.ends) > 1:
        acts = torch.index_select(
            acts, 0, order, out=task.workspace.empty("sorted", acts, *acts.shape)
        )  # [n_latents, batch]
        W_dec, price, latents = W_dec[order], price[order], order
        decoder_price = decoder_price[order]
        near = None if near is None else near[order]

    norms = W_dec.norm(dim=1)
    slope, length_slope = sparsity_slopes(acts, norms[:, None], task.sparsity)
    slope = slope * (price * norms / batch)[:, None]  # [n_latents, batch], or [n_latents, 1]
    g_acts = task.workspace.empty("g_acts", x, *acts.shape).copy_(slope)
    shrink = length_slope.sum(1) * decoder_price / norms.clamp_min(MIN_NORM) / batch
    g_W_dec = W_dec * shrink[:, None]
    blocks = Blocks(acts.to(dtype), W_dec.to(dtype), sorted_reach, task)
    add = blocks.add_grouped if grouped else blocks.add_sliced
    g_b_dec = add(g_acts, g_W_dec)  # adds to both in place
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
    sums = torch.linalg.vector_norm(acts, dim=1).square()  # not in place: acts may be the caller's
    mean_square[latents] = sums / batch * norms.square()
    return mean_square


class Blocks:
    """Latents sorted by reach, and the products of each block with its residual r.

    `add_sliced` and `add_grouped` add 2 <d_j, r> / batch to g_acts [n_latents, batch], and the sum
    over the batch of 2 a_j r / batch to g_W_dec [n_latents, d_model]. They return the gradient of
    b_dec [d_model]: the sum over the batch of 2 r / batch, with r that of the first block, which is
    in every prefix, and of a prefix of length 0 if there is one. If unhedged, the gradients of
    W_dec and b_dec have the residual of the full reconstruction instead.
    """

    def __init__(self, acts: Tensor, W_dec: Tensor, sorted_reach: Tensor, task: Task):
        """acts [n_latents, batch], W_dec [n_latents, d_model] and the reaches [n_latents], all
        sorted by falling reach. If the first reach is below 1, the rest is b_dec alone's weight."""
        self.acts, self.W_dec, self.sorted_reach = acts, W_dec, sorted_reach
        self.ends, self.workspace, self.unhedged = task.ends, task.workspace, task.unhedged
        self.bias_residual = task.params.b_dec - task.x  # [batch, d_model], of prefix length 0

    def add_sliced(self, g_acts: Tensor, g_W_dec: Tensor) -> Tensor:
        """Block by block: x_hat - x of each prefix first, then the blocks' weighted sums of them
        from the longest prefix down, then the products."""
        error, ends = self.bias_residual, self.ends  # x_hat - x of the prefix so far
        batch, sizes = len(error), ends.diff(prepend=ends.new_zeros(1)).tolist()
        # [n_blocks] each; the reaches are read one by one, since an index is copied to a GPU first
        reaches = torch.stack([self.sorted_reach[end - 1] for end in ends.tolist()])
        weights = -reaches.diff(append=reaches.new_zeros(1))  # of the prefix that each block ends
        residuals = self.workspace.empty("residuals", error, len(sizes), *error.shape)
        acts, W_dec = torch.split(self.acts, sizes), torch.split(self.W_dec, sizes)
        blocks = list(zip(residuals, acts, W_dec, strict=True))
        for residual, a, d in blocks:
            error = torch.addmm(error, a.T, d, out=residual)
        # `residuals` has each prefix's x_hat - x by now; it gets each block's residual * 2 / batch
        full = error * (2 / batch) if self.unhedged else None
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
        """All blocks at once. With D_q what block q decodes to, the residual of block k is
        sum_q min(s_k, s_q) D_q. Adding b_dec - x to D_0 alone suffices, as min(s_k, s_0) = s_k."""
        batch, n_blocks = len(self.bias_residual), len(self.ends)
        ends = self.ends.to(self.acts.device, torch.int32)
        # D_q of each block at first: [n_blocks, batch, d_model]
        residuals = grouped_mm(self.acts.T, self.W_dec, offs=ends)
        residuals[0] += self.bias_residual
        full = residuals.sum(0) if self.unhedged else None
        if n_blocks > 1:
            # If all prefixes have equal weights, and none is of length 0, the reaches times their
            # number are small whole numbers, which bfloat16 holds exactly.
            counts = self.sorted_reach[ends - 1] * n_blocks
            shared = torch.minimum(counts, counts[:, None]).to(self.acts.dtype)
            mixed = self.workspace.empty("mixed", self.acts, *residuals.shape)
            torch.mm(shared, residuals.flatten(1), out=mixed.flatten(1))
            residuals = mixed
        else:
            residuals *= self.sorted_reach[0].to(residuals.dtype)
        scale = 2 / (batch * n_blocks)
        g_acts.add_(grouped_mm(self.W_dec, residuals.mT, offs=ends), alpha=scale)
        if full is not None:
            g_W_dec.add_(self.acts @ full, alpha=2 / batch)
            return full.sum(0, dtype=g_acts.dtype) * (2 / batch)
        g_W_dec.add_(grouped_mm(self.acts, residuals, offs=ends), alpha=scale)
        return residuals[0].sum(0, dtype=g_acts.dtype) * scale + self.of_bias_alone()

    def of_bias_alone(self) -> Tensor:
        """The part of the prefix of length 0 in the gradient of b_dec: [d_model]."""
        batch = len(self.bias_residual)
        return self.bias_residual.sum(0) * ((1 - self.sorted_reach[0]) * (2 / batch))
