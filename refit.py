"""The decoder that reconstructs best, for a trained SAE whose encoder stays as it is.

    python refit.py --sae runs/tinystories/matryoshka.safetensors --cache cache/train

In short prefixes a parent's direction takes in the mean of its children (feature hedging). That
costs reconstruction, and the full SAE has no more need of it. With the activations fixed, the
decoder that minimizes the full reconstruction error is a least-squares problem:

    min over W, b of  sum_i ||x_i - a_i W - b||^2 + ridge ||W - W_dec||^2

The same latents fire, so L0 and what is dead do not change. What does is every prefix but the last.
A scale for each latent's activation is in this, too: it is its decoder row's length.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import script
from cache_activations import ActivationCache
from sae import SAE
from script import UserError, setting

RIDGE = 1e-6  # of the mean square activation: keeps the rows of latents that never fire


@dataclasses.dataclass(frozen=True)
class Config:
    """Which SAE is refitted, on which activations."""

    sae: str = setting("runs/tinystories/matryoshka.safetensors", "a saved SAE")
    cache: str = setting("cache/train", "cache of the activations to fit: those it was trained on")
    n_tokens: int = setting(0, "how many of the cache's activations; 0: all")
    batch_size: int = setting(4096, "activations at a time")
    ridge: float = setting(RIDGE, "pull towards the old decoder, as a share of the mean square")
    out: str = setting("", "file for the result; default: NAME_refit.safetensors beside the SAE")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


@torch.no_grad()
def refit_decoder(sae: SAE, batches: Iterable[Tensor], ridge: float = RIDGE) -> SAE:
    """A copy of `sae` with the W_dec and b_dec that reconstruct `batches` best.

    batches: tensors [n, d_model], seen once; what is held are the normal equations, n_latents^2
    numbers in float64. Raises ValueError where there is no batch.
    """
    n, device = sae.n_latents, sae.W_enc.device
    gram = torch.zeros(n + 1, n + 1, dtype=torch.float64, device=device)  # of [acts, 1]
    cross = torch.zeros(n + 1, sae.d_model, dtype=torch.float64, device=device)
    count = 0
    for x in batches:
        acts = sae.encode(x).double()
        inputs = torch.cat([acts, acts.new_ones(len(acts), 1)], dim=1)
        gram.addmm_(inputs.T, inputs)
        cross.addmm_(inputs.T, (x * sae.scale).double())
        count += len(x)
    if count == 0:
        raise ValueError("there are no activations to fit")
    pull = ridge * gram.diagonal()[:-1].sum() / n
    gram.diagonal()[:-1] += pull
    cross[:-1] += pull * sae.W_dec.double()
    solution = torch.linalg.solve(gram, cross).float()
    tensors = {**sae.state_dict(), "W_dec": solution[:-1], "b_dec": solution[-1]}
    return SAE.from_tensors(tensors)


def run(config: Config) -> dict[str, Any]:
    """Refits the SAE in `config.sae`; returns its FVU on the same activations, before and after."""
    script.require_positive(config, "batch_size")
    script.require_not_negative(config, "n_tokens", "ridge")
    device = script.pick_device(config.device)
    try:
        sae = SAE.load(config.sae, device)
    except (OSError, ValueError) as error:
        raise UserError(f"--sae {config.sae}: {error}") from None
    cache = ActivationCache(config.cache, config.n_tokens or None)
    cache.require(d_model=sae.d_model)
    source = Path(config.sae)
    out = Path(config.out) if config.out else source.with_name(f"{source.stem}_refit.safetensors")
    script.make_folder(out.parent)

    started = time.perf_counter()

    def batches(what: str) -> Iterable[Tensor]:
        n_batches = -(-cache.n_tokens // config.batch_size)
        for batch in tqdm(
            cache.sequential(config.batch_size, device), what, n_batches, unit=" batches"
        ):
            yield batch.acts

    refitted = refit_decoder(sae, batches("fit"), config.ridge)
    before, after = (float(streamed_fvu(one, batches("score"))) for one in (sae, refitted))
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
def streamed_fvu(sae: SAE, batches: Iterable[Tensor]) -> Tensor:
    """FVU over all batches, against the variance of the same activations; sums in float64."""
    error = squares = total = count = torch.zeros((), dtype=torch.float64)
    for x in batches:
        x = x.double()
        error = error + (x - sae(x.float()).double()).square().sum()
        squares, total = squares + x.square().sum(), total + x.sum(dim=0)
        count = count + len(x)
    return error / (squares - total.square().sum() / count)


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
