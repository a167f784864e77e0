"""Chooses the kernel that computes a gradient, and calls it."""

from typing import Literal

import torch
from torch import Tensor

from matryoshka.kernels import all_pairs, autograd, by_prefix, sparse
from matryoshka.kernels.encode import encode
from matryoshka.kernels.layout import Acts, MatmulDtype, Objective, Params, Stats, Task, Workspace

Kernel = Literal["autograd", "all_pairs", "by_prefix", "grouped", "sparse"]
# "auto" is the fastest kernel for the device; "dense" is the one that a GPU takes, on any device.
Gradient = Literal["auto", "dense", "autograd"]

MAX_LATENTS_OF_ALL_PAIRS = 256  # SAEs up to this size always take `all_pairs`
# `by_prefix` holds a residual for each reach. Beyond this many reaches (those of expected prefixes)
# `all_pairs` replaces it.
MAX_REACHES_OF_BY_PREFIX = 128
# `sparse` is faster up to these shares of active latents: the first with at most FEW_REACHES
# reaches, the other with more, or if dense products are in bfloat16.
SPARSE_SHARE, FEW_REACHES, SPARSE_SHARE_OF_MANY = 0.1, 32, 0.04
MAX_PAIRS_OF_RUNS = 2**26  # in a batch, for `sparse`: their indices take a GiB


def write_gradient(
    grads: Params,
    params: Params,
    objective: Objective,
    gradient: Gradient | Kernel = "auto",
    matmul_dtype: MatmulDtype = "float32",
    workspace: Workspace | None = None,
) -> Stats:
    """Writes the gradient of the objective's loss, averaged over the batch, into `grads`.

    `gradient` may also name a kernel, for tests. Kernels differ only in rounding. Passing the same
    workspace to each call saves a CPU from allocating large intermediate tensors anew. With
    bfloat16, the operands and results of dense products are rounded to it: all of `by_prefix`, the
    encoder's of `sparse`, none of `all_pairs`. RuntimeError is raised where d_model or the batch is
    then not a multiple of 8.
    """
    if gradient == "autograd":
        return autograd.write(grads, params, objective)
    n_saes, n_latents = objective.reach.shape
    is_small = gradient in ("auto", "dense") and n_latents <= MAX_LATENTS_OF_ALL_PAIRS
    if gradient == "all_pairs" or is_small:
        return all_pairs.write(grads, params, objective)
    l0s, mean_squares, least_kept, kernels = [], [], [], list[str]()
    for i in range(n_saes):
        task = task_of(i, grads, params, objective, matmul_dtype, workspace or Workspace())
        n_active = count_active(task.acts, task.workspace)
        kernel = choose(gradient, n_active, task, matmul_dtype)
        if kernel == "all_pairs":
            one = slice(i, i + 1)
            stats = all_pairs.write(grads.slice(one), params.slice(one), objective.slice(i))
            l0, mean_square = stats.l0[0], stats.mean_square[0]
        else:
            l0 = (n_active / task.x.shape[0]).to(task.x.dtype)
            mean_square = write_one(kernel, task, matmul_dtype)
        l0s.append(l0)
        mean_squares.append(mean_square)
        if task.acts.least_kept is not None:
            least_kept.append(task.acts.least_kept)
        kernels.append(kernel)
    return Stats(
        l0=torch.stack(l0s),
        mean_square=torch.stack(mean_squares),
        kernels=tuple(kernels),
        least_kept=torch.stack(least_kept) if least_kept else None,
        acts=task.acts if n_saes == 1 else None,
    )


def losses(params: Params, objective: Objective) -> Tensor:
    """Each SAE's loss, averaged over the batch: [n_saes]. It is `sae.matryoshka_loss`, or with more
    than MAX_REACHES_OF_BY_PREFIX reaches the equal sum over pairs of latents, which is faster."""
    found = []
    for i, x in enumerate(objective.x):
        if len(objective.ends_of(i)) > MAX_REACHES_OF_BY_PREFIX:
            found.append(all_pairs.loss_of(params.one(i), x, i, objective))
        else:
            found.append(autograd.loss_of(params.one(i), x, i, objective)[0])
    return torch.stack(found)


def write_one(kernel: Kernel, task: Task, matmul_dtype: MatmulDtype) -> Tensor:
    """Writes one SAE's gradient. -> mean square of a_j ||d_j|| [n_latents]."""
    if kernel == "sparse":
        return sparse.write(task)
    is_bfloat16 = matmul_dtype == "bfloat16"
    dtype = torch.bfloat16 if is_bfloat16 else task.x.dtype
    return by_prefix.write(task, dtype, grouped=is_bfloat16 or kernel == "grouped")


def task_of(
    i: int,
    grads: Params,
    params: Params,
    objective: Objective,
    matmul_dtype: MatmulDtype,
    workspace: Workspace,
) -> Task:
    """SAE i's part of the objective. This computes its activations."""
    own_params, x = params.one(i), objective.x[i]
    return Task(
        grads=grads.one(i),
        params=own_params,
        acts=encode(own_params, x, objective, matmul_dtype, workspace),
        x=x,
        reach=objective.reach[i],
        price=objective.price[i],
        ends=objective.ends_of(i),
        sparsity=objective.sparsity,
        bandwidth=objective.bandwidth,
        workspace=workspace,
        unhedged=objective.unhedged,
    )


def count_active(acts: Acts, workspace: Workspace) -> Tensor:
    """How many activations are not 0: a float64 tensor []."""
    if acts.dense is None:
        assert acts.sparse is not None
        return acts.sparse.a.new_tensor(len(acts.sparse.a), dtype=torch.float64)
    signs = torch.sign(acts.dense, out=workspace.empty("signs", acts.dense, *acts.shape))
    return signs.sum(dim=1).sum(dtype=torch.float64)


def choose(
    gradient: Gradient | Kernel, n_active: Tensor, task: Task, matmul_dtype: MatmulDtype
) -> Kernel:
    """The kernel that `gradient` names, or else the fastest for an SAE with more latents than
    MAX_LATENTS_OF_ALL_PAIRS. n_active []: how many activations of the batch are not 0."""
    if gradient != "auto" and gradient != "dense":
        return gradient
    n_reaches = len(task.ends)
    if gradient == "auto" and _is_sparse(n_active, task, n_reaches, matmul_dtype):
        return "sparse"
    if n_reaches > MAX_REACHES_OF_BY_PREFIX:
        return "all_pairs"
    return "grouped" if matmul_dtype == "bfloat16" else "by_prefix"


def _is_sparse(n_active: Tensor, task: Task, n_reaches: int, matmul_dtype: MatmulDtype) -> bool:
    """Whether few enough activations are not 0 for `sparse` to be the fastest.

    On a GPU it never is: reading n_active back would cost more than it saves.
    """
    if task.x.device.type != "cpu":
        return False
    n_latents, batch = task.acts.shape
    l0 = float(n_active) / batch
    n_pairs = batch * min(l0, n_reaches) ** 2  # of runs, about; see sparse.py
    has_few_reaches = n_reaches <= FEW_REACHES and matmul_dtype == "float32"
    share = SPARSE_SHARE if has_few_reaches else SPARSE_SHARE_OF_MANY
    return l0 <= share * n_latents and n_pairs <= MAX_PAIRS_OF_RUNS
