"""Firings that repeat others: latents of nearly one direction that fire on the same token.

    python -m studies.repeats --cache cache/standin/validation \\
        --saes runs/sign/*/[mv]*.safetensors --out runs/repeats.json

L1 charges an SAE for the length that its latents add, whatever their number: to share an activation
among several latents of one direction is free. Where L0 is held, it is not: each takes the place of
another latent. A firing counts as a repeat where another latent fires on the same token, adds
more, and has a decoder row whose cosine with this one's is over `--cosine`.
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
from matryoshka.files import make_folder, write_json
from matryoshka.saved_runs import load_sae
from matryoshka.top_examples import strengths
from sae import SAE

BATCH_SIZE = 4096  # activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAEs, on which activations, and what counts as one direction."""

    saes: tuple[str, ...] = setting(help="SAEs: files of this project, or folders of other tools")
    cache: str = setting("cache/validation", "activations that they fire on")
    cosine: float = setting(0.5, "of two decoder rows, over which they count as one direction")
    out: str = setting("runs/repeats.json", "file to write")


def repeated(added: Tensor, W_dec: Tensor, cosine: float) -> Tensor:
    """Which firings are repeats: bool [n, n_latents].

    added: [n, n_latents], the length that each latent adds, 0 where it is silent. Of two that add
    the same, neither repeats the other.
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
    """L0, and how many of a token's firings are repeats: means over the cache."""
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
    saes = {path: load_sae(Path(path), torch.device("cpu"))[0] for path in config.saes}
    for path, sae in saes.items():
        if sae.d_model != cache.d_model:
            raise UserError(
                f"{path} is of d_model {sae.d_model}, {config.cache} of {cache.d_model}"
            )
    make_folder(Path(config.out).parent)
    settings = {"cosine": config.cosine, "cache": Path(config.cache).name}
    made = {"config": settings, "environment": environment(torch.device("cpu"))}
    results: dict[str, Any] = {"sources": [{"source": "repeats", **made}], "runs": []}
    for path, sae in saes.items():
        name = Path(path).resolve()
        about = {"source": "repeats", "run": name.parent.name, "sae": name.stem}
        results["runs"].append(about | score(sae, cache, config.cosine))
    write_json(Path(config.out), results)
    return results


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
