"""A trained SAE refitted by least squares: its decoder, or its encoder as well.

    python refit.py --sae runs/tinystories/matryoshka.safetensors --cache cache/train

In short prefixes a parent's direction takes in the mean of its children (feature hedging). That
costs reconstruction, and the full SAE has no more need of it. With the activations fixed, the
decoder that minimizes the full reconstruction error is a least-squares problem:

    min over W, b of  sum_i ||x_i - a_i W - b||^2 + ridge ||W - W_dec||^2

The same latents fire, so L0 and what is dead do not change. What does is every prefix but the last.
A scale for each latent's activation is in this, too: it is its decoder row's length.

What no decoder can mend is an encoder that makes a parent fire stronger where a child does.
`--encoder` fits that anew, too (`refit_both`); then not quite the same latents fire.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import script
from cache_activations import ActivationCache
from evaluate import Moments
from sae import SAE
from script import UserError, setting

SAMPLES_AT_ONCE = 512  # whose firing directions are held: [n, most that fire, d_model]
RIDGE = 1e-6  # of the mean square activation: keeps the rows of latents that never fire


@dataclasses.dataclass(frozen=True)
class Config:
    """Which SAE is refitted, on which activations."""

    sae: str = setting("runs/tinystories/matryoshka.safetensors", "a saved SAE")
    cache: str = setting("cache/train", "cache of the activations to fit: those it was trained on")
    n_tokens: int = setting(0, "how many of the cache's activations; 0: all")
    batch_size: int = setting(4096, "activations at a time")
    encoder: bool = setting(False, "refit the encoder as well; it moves which latents fire")
    ridge: float = setting(
        RIDGE, "pull towards the old decoder, of the encoder towards 0; a share of the mean square"
    )
    out: str = setting("", "file for the result; default: NAME_refit.safetensors beside the SAE")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


class LeastSquares:
    """min over W, b of  sum_i ||y_i - u_i W - b||^2 + ridge ||W - prior||^2, of streamed u and y.

    What is held are the normal equations, [n, n] for u_i [n], in float64, of u and y less the means
    of the first batch. ridge is a share of the mean square of u.
    """

    def __init__(self, prior: Tensor):
        """prior: [n, n_targets]"""
        n, n_targets = prior.shape
        self.prior, self.count = prior.double(), 0
        self.gram = self.prior.new_zeros(n, n)
        self.cross = self.prior.new_zeros(n, n_targets)
        self.u_sum, self.y_sum = self.prior.new_zeros(n), self.prior.new_zeros(n_targets)

    def add(self, u: Tensor, y: Tensor) -> None:
        """u [batch, n], y [batch, n_targets]"""
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
        """W [n, n_targets], b [n_targets] in float64.

        Raises ValueError where nothing was added, or where that does not settle W and b.
        """
        if self.count == 0:
            raise ValueError("there are no activations to fit")
        u_mean, y_mean = self.u_sum / self.count, self.y_sum / self.count
        gram = self.gram - torch.outer(self.u_sum, u_mean)  # about the means: b is eliminated
        cross = self.cross - torch.outer(self.u_sum, y_mean)
        squares = gram.diagonal() + self.count * (self.u_about + u_mean).square()  # about 0
        mean_square = squares.sum() / len(self.prior)
        pull = ridge * torch.where(mean_square > 0, mean_square, 1.0)  # u may be 0 throughout
        gram.diagonal().add_(pull)
        W = solve_gram(gram, cross + pull * self.prior, squares + pull)
        return W, self.y_about + y_mean - (self.u_about + u_mean) @ W


def solve_gram(gram: Tensor, cross: Tensor, squares: Tensor) -> Tensor:
    """The X [n, n_targets] of gram @ X = cross, for a Gram matrix [n, n]; all float64.

    squares: [n], the diagonal if it were about 0. Rows and columns are divided by its root, so that
    no unit of u matters. Then a pivot of the Cholesky factor, squared, is the share of a u that b
    and those before it do not explain. Raises ValueError where that is no more than rounding:
    another machine would find another X.
    """
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError("the fit is not finite: the SAE, the activations or the ridge are not")
    scale = squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[:, None]
    factor, failed = torch.linalg.cholesky_ex(gram * scale * scale.T)
    rounding = len(gram) * torch.finfo(torch.float64).eps
    if failed or factor.diagonal().square().min() <= rounding:
        raise ValueError("least squares has no one solution: it needs a larger ridge")
    return scale * torch.cholesky_solve(scale * cross, factor)


def _replace(sae: SAE, **tensors: Tensor) -> SAE:
    """A copy of `sae` with other tensors, in the number format of those that they replace."""
    state = sae.state_dict()
    return SAE.from_tensors({**state, **{k: v.to(state[k].dtype) for k, v in tensors.items()}})


def _wide(sae: SAE) -> SAE:
    """`sae`, or a float32 copy of one in a 16-bit format."""
    half = sae.W_enc.dtype in (torch.float16, torch.bfloat16)
    return SAE.from_tensors(sae.state_dict()).float() if half else sae


def _rows(batches: Iterable[Tensor], sae: SAE) -> Iterator[Tensor]:
    """Tensors [..., d_model] as [n, d_model] in the format of `sae`. Raises ValueError."""
    for x in batches:
        if x.shape[-1:] != (sae.d_model,):
            raise ValueError(f"activations are {list(x.shape)}: the SAE's d_model is {sae.d_model}")
        yield x.reshape(-1, sae.d_model).to(sae.W_enc.dtype)


@torch.no_grad()
def refit_decoder(sae: SAE, batches: Iterable[Tensor], ridge: float = RIDGE) -> SAE:
    """A copy of `sae` with the W_dec and b_dec that reconstruct `batches` best.

    batches: tensors [..., d_model], seen once. A 16-bit SAE is fitted in float32, and rounded to
    its format in the end. Raises ValueError as `LeastSquares.solve`, or where d_model differs.
    """
    wide = _wide(sae)
    problem = LeastSquares(wide.W_dec)
    for x in _rows(batches, wide):
        problem.add(wide.encode(x), x * wide.scale)
    W_dec, b_dec = problem.solve(ridge)
    return _replace(sae, W_dec=W_dec, b_dec=b_dec)


@torch.no_grad()
def refit_both(sae: SAE, read: Callable[[], Iterable[Tensor]], ridge: float = RIDGE) -> SAE:
    """A copy of `sae` with another encoder and decoder; all that is kept is where latents fire.

    A hedged parent fires stronger where a child does, so no decoder row for the child can be right.
    Here each latent stands for what x gains on average where it fires, whatever else does:

    1. directions: least squares of x on whether each latent fires, 0 or 1;
    2. on each sample, the strengths of the latents that fire there which fit x best, not negative;
       they are about 1;
    3. the encoder: least squares of those strengths on x. Where a latent is silent, it is asked for
       its old pre-activation in units of its mean activation, but within -1/2 and 0: that is silent
       enough, and latents that inhibit each other for no good reason stop doing so;
    4. the decoder of the new activations (`refit_decoder`).

    The new encoder is affine and a ReLU, as the old one, so the third step holds as far as what
    fires is a half-space of x: nearly exactly in the toy, not in a language model (README.md). FVU
    need not fall.
    `read()` gives the same tensors [..., d_model] each time. Formats and errors: as
    `refit_decoder`.
    """
    narrow, sae = sae, _wide(sae)
    problem = LeastSquares(torch.zeros_like(sae.W_dec))
    total, n_fired = torch.zeros(2, sae.n_latents, dtype=torch.float64, device=sae.W_enc.device)
    for x in _rows(read(), sae):
        acts = sae.encode(x)
        total += acts.sum(dim=0)
        n_fired += (acts > 0).sum(dim=0)
        problem.add(acts > 0, x * sae.scale)
    directions, b_dec = problem.solve(ridge)
    unit = (total / n_fired.clamp_min(1)).clamp_min(1e-12).float()  # mean activation where it fires

    problem = LeastSquares(torch.zeros_like(sae.W_enc))
    for x in _rows(read(), sae):
        for scaled in (x * sae.scale).split(SAMPLES_AT_ONCE):
            preacts = (scaled @ sae.W_enc + sae.b_enc) / unit
            strengths = strengths_of(scaled - b_dec, preacts > 0, directions)
            problem.add(scaled, torch.where(preacts > 0, strengths, preacts.clamp(-0.5, 0)))
    W_enc, b_enc = problem.solve(ridge)
    both = refit_decoder(_replace(sae, W_enc=W_enc, b_enc=b_enc), read(), ridge)
    return _replace(narrow, **both.state_dict())


def strengths_of(x: Tensor, fires: Tensor, directions: Tensor, ridge: float = 1e-4) -> Tensor:
    """t [n, n_latents] >= 0, zero where `fires` is not, with t @ directions nearest to x [n, d].

    Least squares over the firing latents of each sample, clipped at 0 afterwards. The ridge, a
    share of the mean squared length of a direction that fires, pulls towards 1. Where latents can
    hardly be told apart the ridge alone decides between them, so what is solved for is t - 1, in
    float64: it is 0 where nothing tells them apart. t is float64. Without a ridge, directions that
    depend on each other raise torch.linalg.LinAlgError.
    """
    most = max(1, int(fires.sum(dim=1).max()))
    fired, latents = fires.double().topk(most, dim=1)  # [n, most]: 1 or 0, and which
    rows = directions.double()[latents] * fired[..., None]  # [n, most, d]
    left = x.double() - rows.sum(dim=1)  # [n, d], what strengths of 1 leave
    gram = rows @ rows.mT
    pull = ridge * gram.diagonal(dim1=1, dim2=2).sum(dim=1) / fired.sum(dim=1).clamp_min(1)
    pull = torch.where(pull > 0, pull, ridge)[:, None]  # all that fires may have no direction
    gram.diagonal(dim1=1, dim2=2).add_(pull * fired + (1 - fired))
    t = (1 + torch.linalg.solve(gram, (rows @ left[..., None])[..., 0])).clamp_min(0) * fired
    return t.new_zeros(fires.shape).scatter_(1, latents, t)


def read_inputs(config: Config, device: torch.device) -> tuple[SAE, ActivationCache, Path]:
    """The SAE, the activations and the file to write. Raises `UserError`."""
    script.require_positive(config, "batch_size")
    script.require_not_negative(config, "n_tokens", "ridge")
    if Path(config.sae).is_dir():
        raise UserError(f"--sae {config.sae} is a folder: give the file in it")
    try:
        sae = SAE.load(config.sae, device)
    except (OSError, ValueError) as error:
        raise UserError(f"--sae {config.sae}: {error}") from None
    if sae.W_enc.dim() != 2:
        raise UserError(f"--sae {config.sae} is a stack of SAEs; save one of `unstack()`")
    cache = ActivationCache(config.cache, config.n_tokens or None)
    cache.require(d_model=sae.d_model)
    source = Path(config.sae)
    out = Path(config.out) if config.out else source.with_name(f"{source.stem}_refit.safetensors")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: the refitted SAE is a file")
    if out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is --sae itself: give another file")
    script.make_folder(out.parent)
    return sae, cache, out


def run(config: Config) -> dict[str, Any]:
    """Refits the SAE in `config.sae`; returns its FVU on the same activations, before and after.

    Raises `UserError` where the input is wrong or damaged, or settles no fit.
    """
    device = script.pick_device(config.device)
    sae, cache, out = read_inputs(config, device)
    cache.verify()
    started = time.perf_counter()

    def batches(what: str) -> Iterator[Tensor]:
        n_batches = -(-cache.n_tokens // config.batch_size)
        batches = cache.sequential(config.batch_size, device)
        for batch in tqdm(batches, what, n_batches, unit=" batches"):
            yield batch.acts

    try:
        before = streamed_fvu(sae, batches("score"))
        if config.encoder:
            refitted = refit_both(sae, lambda: batches("fit"), config.ridge)
        else:
            refitted = refit_decoder(sae, batches("fit"), config.ridge)
        after = streamed_fvu(refitted, batches("score"))
    except ValueError as error:
        raise UserError(f"--sae {config.sae} on --cache {config.cache}: {error}") from None
    script.write_atomically(out, refitted.to("cpu").save)
    return {
        "sae": config.sae,
        "out": str(out),
        "n_tokens": cache.n_tokens,
        "fvu_before": before,
        "fvu_after": after,
        "seconds": round(time.perf_counter() - started, 2),
    }


@torch.no_grad()
def streamed_fvu(sae: SAE, batches: Iterable[Tensor]) -> float:
    """FVU over all batches [..., d_model], against the variance of the same activations.

    Sums are in float64. Raises ValueError where FVU is not defined: where the activations are all
    the same, there are none, or something is not finite.
    """
    sae, moments, error = _wide(sae), Moments(), 0.0
    for x in _rows(batches, sae):
        moments.add(x)
        error += float((x.double() - sae(x).double()).square().sum())
    if not math.isfinite(error) or not math.isfinite(moments.variance):
        raise ValueError("the activations or their reconstructions are not finite")
    if moments.is_constant:
        raise ValueError("the activations are all the same: FVU is not defined")
    return error / moments.variance


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        result = run(script.parse(Config, __doc__, argv))
        print(
            script.table(
                [f"FVU on {result['n_tokens']:,} activations", "before", "after"],
                [[result["sae"], f"{result['fvu_before']:.4f}", f"{result['fvu_after']:.4f}"]],
            )
        )
        print(f"\n{result['seconds']:.0f} s; the refitted SAE is {result['out']}")


if __name__ == "__main__":
    main()
