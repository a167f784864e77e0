"""The gradient from the active latents alone: every product but the encoder's is sparse. CPU only.

A *run* is all active latents of one sample that have the same reach. They have the same residual,
so one residual is computed for each run. In it, the input counts as one more run of its sample:
that run decodes to -x, and its reach is at least that of any other.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka.kernels import jumprelu
from matryoshka.kernels.layout import MIN_NORM, Task, pick, sparsity_slopes


def write(task: Task) -> Tensor:
    """Writes one SAE's gradient. -> mean square of a_j ||d_j|| [n_latents]."""
    active = Active.of(task)
    grads, W_dec, x, price = task.grads, task.params.W_dec, task.x, task.price
    batch, norms, x_centred = len(x), W_dec.norm(dim=1), x - task.params.b_dec
    latent, sample, a = active.latent, active.sample, active.a

    residuals, by_run = active.residuals(task, x_centred)
    slope, length_slope = sparsity_slopes(a, pick(norms, latent), task.sparsity)
    # <d_j, r> of each active latent, in the order of `active`: [n_active]
    g_a = torch.sparse.sampled_addmm(by_run, residuals, W_dec.T, beta=0).values()
    g_a = g_a.mul_(2).add_(pick(price * norms, latent) * slope).div_(batch)

    def total(values: Tensor) -> Tensor:
        """The sum over the batch: [n_active] -> [n_latents]."""
        return torch.zeros_like(task.reach).index_add_(0, latent, values)

    if task.acts.near is not None:
        threshold, is_near = task.params.log_threshold[0].exp(), task.acts.near[latent, sample]
        slopes = threshold * total(g_a * is_near) + price * total(is_near.to(a.dtype)) / batch
        grads.log_threshold[0] = jumprelu.log_threshold_gradient(slopes, threshold, task.bandwidth)
        g_a *= a != 0  # the list also has zeros near a threshold, which only move that
    shrink = total(length_slope) * task.decoder_price / norms.clamp_min(MIN_NORM) / batch
    torch.mul(W_dec, shrink[:, None], out=grads.W_dec)
    if task.unhedged:
        full = torch.addmm(x_centred, active.by_sample(), W_dec, beta=-1)  # [batch, d_model]
        grads.W_dec.addmm_(active.by_latent(active.sample, a, batch), full, alpha=2 / batch)
    else:
        acts_of_runs = active.by_latent(active.run, a, len(residuals))
        grads.W_dec.addmm_(acts_of_runs, residuals, alpha=2 / batch)
    g_acts = active.by_latent(active.sample, g_a, batch)
    torch.addmm(grads.W_enc, g_acts, x, beta=0, out=grads.W_enc)
    grads.b_enc[0] = total(g_a)
    sums = total(a) if task.unhedged else total(a) * task.reach
    grads.b_dec[0] = (sums @ W_dec - x_centred.sum(0)) * (2 / batch)
    mean_square: Tensor = total(a * a) / batch * norms.square()
    return mean_square


@dataclass(frozen=True)
class Active:
    """The active latents of a batch, sorted by sample, and within a sample by falling reach.

    Tensors are [n_active] unless a comment says otherwise.
    """

    latent: Tensor
    sample: Tensor
    run: Tensor  # the index of its run, counted over all samples
    a: Tensor  # activations
    s: Tensor  # reaches
    starts_run: Tensor  # bool: whether it is the first of its run
    rank_by_latent: Tensor  # entry k of the list sorted by latent is entry rank_by_latent[k] here
    latent_starts: Tensor  # [n_latents]: where each latent begins in the list sorted by latent
    n_samples: int

    @classmethod
    def of(cls, task: Task) -> "Active":
        """The active latents of a task."""
        latent, sample, a = task.sparse_acts()  # sorted by latent
        reach, (n_latents, batch) = task.reach, task.acts.shape
        rank = torch.empty_like(reach, dtype=torch.int64)  # [n_latents]: place by falling reach
        rank[reach.argsort(descending=True, stable=True)] = torch.arange(n_latents)
        keys = sample * n_latents + pick(rank, latent)
        by_rank = torch.from_numpy(np.argsort(keys.numpy()))  # half the time of torch.argsort
        rank_by_latent = torch.empty_like(by_rank)
        rank_by_latent[by_rank] = torch.arange(len(by_rank))
        latent_starts = starts_of(latent, n_latents)
        # from here on sorted by sample, and within it by reach
        latent, sample, a = (pick(part, by_rank) for part in (latent, sample, a))
        s = pick(reach, latent)
        first = torch.ones_like(sample, dtype=torch.bool)
        first[1:] = (sample[1:] != sample[:-1]) | (s[1:] != s[:-1])
        run = first.cumsum(0) - 1
        return cls(latent, sample, run, a, s, first, rank_by_latent, latent_starts, batch)

    @property
    def n_latents(self) -> int:
        return len(self.latent_starts)

    def by_sample(self) -> Tensor:
        """Activations as a sparse matrix [batch, n_latents]."""
        starts = starts_of(self.sample, self.n_samples)
        return csr(starts, self.latent, self.a, self.n_latents)

    def by_latent(self, columns: Tensor, values: Tensor, n_columns: int) -> Tensor:
        """A sparse matrix [n_latents, n_columns] with `values` in `columns`, [n_active] each."""
        ranks = self.rank_by_latent
        return csr(self.latent_starts, pick(columns, ranks), pick(values, ranks), n_columns)

    def residuals(self, task: Task, x_centred: Tensor) -> tuple[Tensor, Tensor]:
        """The residual of each run, [n_runs, d_model], and the activations of each run, a sparse
        matrix [n_runs, n_latents].

        With D_q what run q decodes to, the residual of run r is sum_q min(s_r, s_q) D_q - s_r x,
        over the runs q of the same sample.
        """
        first = self.starts_run.nonzero()[:, 0]
        run_sample, run_reach = pick(self.sample, first), pick(self.s, first)  # [n_runs] each
        n_runs, (batch, d_model) = len(first), x_centred.shape
        starts = starts_of(self.run, n_runs)
        by_run = csr(starts, self.latent, self.a, self.n_latents)
        # the reconstruction of each run, then -x of each sample
        decoded = task.workspace.empty("decoded", task.x, n_runs + batch, d_model)
        torch.addmm(decoded[:n_runs], by_run, task.params.W_dec, beta=0, out=decoded[:n_runs])
        torch.neg(x_centred, out=decoded[n_runs:])
        mixed = task.workspace.empty("mixed_runs", task.x, n_runs, d_model)
        shared = shared_reaches(run_sample, run_reach, batch)
        return torch.addmm(mixed, shared, decoded, beta=0, out=mixed), by_run


def shared_reaches(run_sample: Tensor, run_reach: Tensor, batch: int) -> Tensor:
    """The weights with which `residuals` mixes what is decoded: sparse [n_runs, n_runs + batch].

    Row r has min(s_r, s_q) for each run q of the same sample, and last s_r for that sample's -x.
    run_sample, run_reach: [n_runs] each, sorted by sample.
    """
    n_runs = len(run_sample)
    n_runs_of = torch.bincount(run_sample, minlength=batch)  # [batch]
    n_in_row = pick(n_runs_of, run_sample) + 1
    row_starts = n_in_row.cumsum(0) - n_in_row
    row = torch.repeat_interleave(n_in_row)  # [n_entries], as `column` and `weights`
    # from the index of an entry to its run: first run of the sample - first entry of the row
    shift = pick(n_runs_of.cumsum(0) - n_runs_of, run_sample) - row_starts
    column = torch.arange(len(row)) + pick(shift, row)
    weights = torch.minimum(pick(run_reach, row), pick(run_reach, column.clamp_max(n_runs - 1)))
    last = row_starts + n_in_row - 1  # the last entry of each row, for -x
    column[last] = n_runs + run_sample
    weights[last] = run_reach
    return csr(row_starts, column, weights, n_runs + batch)


def starts_of(index: Tensor, size: int) -> Tensor:
    """Where each of 0 .. size - 1 begins in `index` [n] when it is sorted: int64 [size]."""
    counts = torch.bincount(index, minlength=size)
    return counts.cumsum(0) - counts


def csr(row_starts: Tensor, columns: Tensor, values: Tensor, n_columns: int) -> Tensor:
    """A sparse matrix [len(row_starts), n_columns] in CSR form.

    Its indices are int32, which is half the bytes, and what MKL needs.
    """
    ends = torch.cat([row_starts, row_starts.new_tensor([len(columns)])])
    shape = (len(row_starts), n_columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            ends.int(), columns.int(), values, shape, check_invariants=False
        )
