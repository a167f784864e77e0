"""Refits a trained SAE by least squares: its decoder, or its encoder as well.

In short prefixes, a parent's decoder row contains a part of the mean of its children (feature
hedging). The full SAE does not need this, and it costs reconstruction. With the activations fixed,
the decoder with the lowest reconstruction error of the full SAE is a least-squares problem:

    min over W, b of  sum_i ||x_i - a_i W - b||^2 + ridge ||W - W_dec||^2

The same latents fire, so L0 and the dead share do not change; the reconstructions of shorter
prefixes do change. The fit also scales each latent's activation, by the length of its decoder row.

If an encoder makes a parent fire more strongly where a child fires, no decoder can correct it.
`refit_both` fits the encoder, too; then not quite the same latents fire.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from matryoshka.reconstruction import Moments
from sae import SAE

SAMPLES_AT_ONCE = 512  # samples n in a tensor of firing directions [n, most latents, d_model]
RIDGE = 1e-6  # as a share of the mean square activation; rows of latents that never fire are kept
STRENGTH_RIDGE = 1e-4  # as a share of the mean squared length of a firing direction


class LeastSquares:
    """Solves min over W, b of  sum_i ||y_i - u_i W - b||^2 + ridge ||W - prior||^2.

    u and y are added in batches. Only the normal equations are kept, [n, n] for u_i [n], in
    float64. The first batch's means are subtracted from u and y. ridge is given as a share of the
    mean square of u.
    """

    def __init__(self, prior: Tensor):
        """prior: [n, n_targets], the W that the ridge draws the solution to."""
        n, n_targets = prior.shape
        self.prior, self.count = prior.double(), 0
        self.gram = self.prior.new_zeros(n, n)
        self.cross = self.prior.new_zeros(n, n_targets)
        self.u_sum, self.y_sum = self.prior.new_zeros(n), self.prior.new_zeros(n_targets)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Adds u [batch, n] and y [batch, n_targets]."""
        u, y = u.double(), y.double()
        if self.count == 0 and len(u):
            self.u_about, self.y_about = u.mean(dim=0), y.mean(dim=0)
        if len(u):
            u, y = u - self.u_about, y - self.y_about
            self.gram.addmm_(u.T, u)
            self.cross.addmm_(u.T, y)
            self.u_sum += u.sum(dim=0)
            self.y_sum += y.sum(dim=0)
            self.count += len(u)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Returns W [n, n_targets] and b [n_targets] in float64.

        Raises ValueError if nothing was added, or the solution is not unique.
        """
        if self.count == 0:
            raise ValueError("there are no activations to fit")
        u_mean, y_mean = self.u_sum / self.count, self.y_sum / self.count
        gram = self.gram - torch.outer(self.u_sum, u_mean)  # centred, which eliminates b
        cross = self.cross - torch.outer(self.u_sum, y_mean)
        squares = gram.diagonal() + self.count * (self.u_about + u_mean).square()  # not centred
        mean_square = squares.sum() / len(self.prior)
        weight = ridge * torch.where(mean_square > 0, mean_square, 1.0)  # all of u may be 0
        gram.diagonal().add_(weight)
        W = solve_gram(gram, cross + weight * self.prior, squares + weight)
        return W, self.y_about + y_mean - (self.u_about + u_mean) @ W


def solve_gram(gram: Tensor, cross: Tensor, squares: Tensor) -> Tensor:
    """Solves gram @ X = cross for X [n, n_targets]. gram: a Gram matrix [n, n]; all in float64.

    squares: [n], the Gram matrix's diagonal without centring. Rows and columns are divided by its
    root, so that the units of u do not matter. Then the square of a pivot of the Cholesky factor is
    the share of one u's square that b and the u before it do not explain. Raises ValueError if this
    is no more than rounding, because another machine would find another X.
    """
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError("the fit is not finite: the SAE, the activations or the ridge are not")
    scale = squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[:, None]
    factor, failed = torch.linalg.cholesky_ex(gram * scale * scale.T)
    rounding = len(gram) * torch.finfo(torch.float64).eps
    if failed or factor.diagonal().square().min() <= rounding:
        raise ValueError("least squares has no unique solution: it needs a larger ridge")
    return scale * torch.cholesky_solve(scale * cross, factor)


@torch.no_grad()
def refit_decoder(sae: SAE, batches: Iterable[Tensor], ridge: float = RIDGE) -> SAE:
    """A copy of `sae` with the W_dec and b_dec that reconstruct `batches` best.

    batches: tensors [..., d_model], read once. A 16-bit SAE is fitted in float32, and the result is
    rounded to its dtype. Raises ValueError as `LeastSquares.solve`, or if d_model differs.
    """
    wide = _at_least_float32(sae)
    problem = LeastSquares(wide.W_dec)
    for x in _samples(batches, wide):
        problem.add(wide.encode(x), x * wide.scale)
    W_dec, b_dec = problem.solve(ridge)
    return _with_values(sae, W_dec=W_dec, b_dec=b_dec)


@torch.no_grad()
def refit_both(sae: SAE, read: Callable[[], Iterable[Tensor]], ridge: float = RIDGE) -> SAE:
    """A copy of `sae` with a new encoder and decoder, fitted to where the old latents fire.

    If a hedged parent fires more strongly where its child fires, no decoder row of the child can be
    right. Therefore each latent is fitted to what it adds to x on average when it fires:

    1. directions: least squares of x on whether each latent fires, 0 or 1;
    2. strengths: on each sample, the strengths >= 0 of its firing latents with which the directions
       fit x best; they are about 1;
    3. the encoder: least squares of the strengths on x. Where a latent is silent, the target is its
       old pre-activation divided by its mean activation, clamped to -1/2 to 0. This is low enough,
       and latents stop inhibiting each other more than is needed;
    4. the decoder for the new activations (`refit_decoder`).

    The new encoder is affine with a ReLU, like the old one. So step 3 is accurate if the samples on
    which a latent fires form a half-space of x: nearly so in the toy, but not in a language model.
    FVU may rise. `read()` returns the same tensors [..., d_model] each time. Dtypes and errors are
    those of `refit_decoder`; also raises ValueError if the activation function is not ReLU.
    """
    if sae.activation != "relu":
        raise ValueError(f"the encoder can be refitted for relu alone, not for {sae.activation}")
    narrow, sae = sae, _at_least_float32(sae)
    directions, b_dec, unit = _directions(sae, read(), ridge)
    problem = LeastSquares(torch.zeros_like(sae.W_enc))
    for x in _samples(read(), sae):
        for scaled in torch.split(x * sae.scale, SAMPLES_AT_ONCE):
            preacts = (scaled @ sae.W_enc + sae.b_enc) / unit
            strengths = strengths_of(scaled - b_dec, preacts > 0, directions)
            problem.add(scaled, torch.where(preacts > 0, strengths, preacts.clamp(-0.5, 0)))
    W_enc, b_enc = problem.solve(ridge)
    both = refit_decoder(_with_values(sae, W_enc=W_enc, b_enc=b_enc), read(), ridge)
    return _with_values(narrow, **both.state_dict())


def _directions(sae: SAE, batches: Iterable[Tensor], ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """What each latent adds to x when it fires, what x is without any, and mean activations.

    Returns float64 [n_latents, d_model] and float64 [d_model] in scaled units, and each latent's
    mean activation when it fires, [n_latents].
    """
    problem = LeastSquares(torch.zeros_like(sae.W_dec))
    total, n_fired = torch.zeros(2, sae.n_latents, dtype=torch.float64, device=sae.W_enc.device)
    for x in _samples(batches, sae):
        acts = sae.encode(x)
        total += acts.sum(dim=0)
        n_fired += (acts > 0).sum(dim=0)
        problem.add(acts > 0, x * sae.scale)
    directions, b_dec = problem.solve(ridge)
    unit = (total / n_fired.clamp_min(1)).clamp_min(1e-12)
    return directions, b_dec, unit.to(sae.W_enc.dtype)


def strengths_of(
    x: Tensor, fires: Tensor, directions: Tensor, ridge: float = STRENGTH_RIDGE
) -> Tensor:
    """The strengths t >= 0 of firing latents with which t @ directions is nearest to x [n, d].

    Returns t, float64 [n, n_latents], 0 where `fires` is false. For each sample it is the
    least-squares solution over its firing latents, clipped at 0 afterwards. The ridge, a share of
    the mean squared length of a firing direction, draws strengths towards 1. For nearly parallel
    directions, the ridge alone decides between them; so that this is accurate, t - 1 is solved for,
    in float64. With ridge 0, linearly dependent directions raise torch.linalg.LinAlgError.
    """
    most = max(1, int(fires.sum(dim=1).max()))
    fired, latents = fires.double().topk(most, dim=1)  # [n, most]: 1 or 0, and the latents' indices
    rows = directions.double()[latents] * fired[..., None]  # [n, most, d]
    left = x.double() - rows.sum(dim=1)  # [n, d], the residual of strengths of 1
    gram = rows @ rows.mT
    weight = ridge * gram.diagonal(dim1=1, dim2=2).sum(dim=1) / fired.sum(dim=1).clamp_min(1)
    weight = torch.where(weight > 0, weight, ridge)[:, None]  # all firing directions may be 0
    gram.diagonal(dim1=1, dim2=2).add_(weight * fired + (1 - fired))
    change: Tensor = torch.linalg.solve(gram, (rows @ left[..., None])[..., 0])
    t = (1 + change).clamp_min(0) * fired
    return t.new_zeros(fires.shape).scatter_(1, latents, t)


@torch.no_grad()
def streamed_fvu(sae: SAE, batches: Iterable[Tensor]) -> float:
    """FVU over all batches [..., d_model], against the variance of the same activations.

    Sums are in float64. Raises ValueError if FVU is not defined: if all activations are the same,
    there are none, or something is not finite.
    """
    sae, moments, error = _at_least_float32(sae), Moments(), 0.0
    for x in _samples(batches, sae):
        moments.add(x)
        error += float((x.double() - sae(x).double()).square().sum())
    if not math.isfinite(error) or not math.isfinite(moments.variance):
        raise ValueError("the activations or their reconstructions are not finite")
    if moments.is_constant:
        raise ValueError("the activations are all the same: FVU is not defined")
    return error / moments.variance


def _at_least_float32(sae: SAE) -> SAE:
    """`sae`, or a float32 copy of it if its dtype has 16 bits."""
    is_16_bit = sae.W_enc.dtype in (torch.float16, torch.bfloat16)
    return sae.with_tensors().float() if is_16_bit else sae


def _with_values(sae: SAE, **tensors: Tensor) -> SAE:
    """A copy of `sae` with some tensors replaced; each gets the dtype of the replaced one."""
    state = sae.state_dict()
    return sae.with_tensors(**{name: t.to(state[name].dtype) for name, t in tensors.items()})


def _samples(batches: Iterable[Tensor], sae: SAE) -> Iterator[Tensor]:
    """Yields tensors [..., d_model] as [n, d_model] in the dtype of `sae`.

    Raises ValueError if d_model differs.
    """
    for x in batches:
        if x.shape[-1:] != (sae.d_model,):
            raise ValueError(f"activations are {list(x.shape)}: the SAE's d_model is {sae.d_model}")
        yield x.reshape(-1, sae.d_model).to(sae.W_enc.dtype)
