"""Counts repeats: latents with nearly the same direction that fire on the same token.

    python -m studies.repeats --cache cache/standin/validation \\
        --saes runs/sign/*/[mv]*.safetensors --out runs/repeats.json

An L1 penalty depends on the length that latents add, not on their number, so splitting an
activation over several latents with the same direction costs nothing. At a fixed L0 it does cost:
each of them takes the place of another latent. A firing counts as a repeat if another latent fires
on the same token, adds more, and has a decoder row whose cosine with this one's is over `--cosine`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, require_positive, setting, table
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.top_examples import strengths
from sae import SAE
from studies.score_files import load_saes, score_files

BATCH_SIZE = 4096  # activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAEs, on which activations, and which directions count as the same."""

    saes: tuple[str, ...] = setting(help="SAEs: files of this project, or folders of other tools")
    cache: str = setting("cache/validation", "activations that they fire on")
    cosine: float = setting(0.5, "cosine of two decoder rows over which they count as the same")
    out: str = setting("runs/repeats.json", "file to write")


def repeated(added: Tensor, W_dec: Tensor, cosine: float) -> Tensor:
    """Which firings are repeats: bool [n, n_latents].

    added: [n, n_latents], the length that each latent adds, 0 where it is silent. If two latents
    add exactly the same length, neither is a repeat of the other.
    """
    rows = normalize(W_dec)
    alike = (rows @ rows.T).fill_diagonal_(-1) > cosine  # [n_latents, n_latents]
    repeats = torch.zeros_like(added, dtype=torch.bool)
    for latent in alike.any(1).nonzero()[:, 0].tolist():
        largest = added[:, alike[latent]].amax(1)
        repeats[:, latent] = (added[:, latent] > 0) & (added[:, latent] < largest)
    return repeats


@torch.inference_mode()
def score(sae: SAE, cache: ActivationCache, cosine: float) -> dict[str, float]:
    """Over the cache: the mean L0, the mean repeats a token, and what share of firings repeat."""
    n_firings = n_repeats = 0
    for batch in cache.sequential(BATCH_SIZE):
        added = strengths(sae, batch.acts)
        n_firings += int((added > 0).sum())
        n_repeats += int(repeated(added, sae.W_dec, cosine).sum())
    return {
        "l0": n_firings / cache.n_tokens,
        "repeats": n_repeats / cache.n_tokens,
        "share": n_repeats / max(1, n_firings),
    }


def run(config: Config) -> dict[str, Any]:
    """Writes `config.out`, and returns what it holds. Raises `UserError`."""
    require_positive(config, "cosine")
    cache = ActivationCache(config.cache)
    saes = load_saes(config.saes)
    for path, sae in saes.items():
        if sae.d_model != cache.d_model:
            raise UserError(
                f"{path} has d_model {sae.d_model}, but {config.cache} has {cache.d_model}"
            )
    settings = {"cosine": config.cosine, "cache": Path(config.cache).name}
    made = {"config": settings, "environment": environment(torch.device("cpu"))}

    def score_one(sae: SAE) -> dict[str, float]:
        return score(sae, cache, config.cosine)

    return score_files(saes, score_one, {"source": "repeats", **made}, Path(config.out))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__ or "", argv))
        rows = [
            [f"{r['run']}/{r['sae']}", f"{r['l0']:.2f}", f"{r['repeats']:.2f}", f"{r['share']:.1%}"]
            for r in results["runs"]
        ]
        print(table(["SAE", "L0", "repeats a token", "share"], rows))


if __name__ == "__main__":
    main()
