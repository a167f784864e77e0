"""Refits a trained SAE by least squares: its decoder, or its encoder as well.

    python refit.py --sae runs/tinystories/matryoshka.safetensors --cache cache/train

The decoder that reconstructs best with all latents is not the one that reconstructs best with each
prefix. Refitting it for all latents regains what the prefixes cost, but the prefixes then no longer
reconstruct on their own. The same latents fire as before. `--encoder` refits the encoder as well,
which corrects latents that fire too strongly together; then slightly different latents fire. See
matryoshka/refit.py.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import (
    main_guard,
    parse,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
    table,
)
from matryoshka.errors import UserError
from matryoshka.files import file_sha256, make_folder
from matryoshka.refit import RIDGE, refit_both, refit_decoder, streamed_fvu
from matryoshka.saved_runs import checksums_used
from sae import SAE


@dataclasses.dataclass(frozen=True)
class Config:
    """Which SAE is refitted, on which activations."""

    sae: str = setting("runs/tinystories/matryoshka.safetensors", "a saved SAE")
    cache: str = setting("cache/train", "cache of the activations to fit: those it was trained on")
    n_tokens: int = setting(0, "how many of the cache's activations; 0: all")
    batch_size: int = setting(4096, "activations at a time")
    encoder: bool = setting(False, "refit the encoder as well, which changes which latents fire")
    ridge: float = setting(
        RIDGE,
        "penalty on the decoder's change and on the encoder's size, as a share of the mean square "
        "of what they are fitted on",
    )
    out: str = setting("", "file for the result; default: NAME_refit.safetensors beside the SAE")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")

    @property
    def out_file(self) -> Path:
        source = Path(self.sae)
        default = source.with_name(f"{source.stem}_refit.safetensors")
        return Path(self.out) if self.out else default


def read_inputs(config: Config, device: torch.device) -> tuple[SAE, ActivationCache]:
    """The SAE and the activations. Raises `UserError`, also if `--out` cannot be written."""
    require_positive(config, "batch_size")
    require_not_negative(config, "n_tokens", "ridge")
    source, out = Path(config.sae), config.out_file
    if source.is_dir():
        raise UserError(f"--sae {source} is a folder: give the file in it")
    try:
        sae = SAE.load(source, device)
    except (OSError, ValueError) as error:
        raise UserError(f"--sae {source}: {error}") from None
    cache = ActivationCache(config.cache, config.n_tokens or None)
    cache.require(d_model=sae.d_model)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: the refitted SAE is a file")
    if out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is --sae itself: give another file")
    make_folder(out.parent)
    cache.verify()
    return sae, cache


def run(config: Config) -> dict[str, Any]:
    """Refits the SAE in `config.sae`; returns its FVU on the same activations, before and after.

    `about` in the file that it writes says which SAE was refitted, and on which activations. Raises
    `UserError` if the input is wrong or damaged, or does not determine a fit.
    """
    device = pick_device(config.device)
    sae, cache = read_inputs(config, device)
    started = time.perf_counter()
    try:
        refitted, fvu_before, fvu_after = fit(config, sae, cache, device)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--sae {config.sae} on --cache {config.cache}: {error}") from None
    refitted.about = {**sae.about, "refit": description(config, cache)}
    refitted.save(config.out_file)
    return {
        "sae": config.sae,
        "out": str(config.out_file),
        "n_tokens": cache.n_tokens,
        "fvu_before": fvu_before,
        "fvu_after": fvu_after,
        "seconds": round(time.perf_counter() - started, 2),
    }


def fit(
    config: Config, sae: SAE, cache: ActivationCache, device: torch.device
) -> tuple[SAE, float, float]:
    """The refitted SAE, and FVU before and after. Raises ValueError if there is no fit."""

    def batches(what: str) -> Iterator[Tensor]:
        n_batches = -(-cache.n_tokens // config.batch_size)
        batches = cache.sequential(config.batch_size, device)
        for batch in tqdm(batches, what, n_batches, unit=" batches"):
            yield batch.acts

    fvu_before = streamed_fvu(sae, batches("score"))
    if config.encoder:
        refitted = refit_both(sae, lambda: batches("fit"), config.ridge)
    else:
        refitted = refit_decoder(sae, batches("fit"), config.ridge)
    return refitted, fvu_before, streamed_fvu(refitted, batches("score"))


def description(config: Config, cache: ActivationCache) -> dict[str, Any]:
    """What the file says about the refit: which SAE, how, and on which activations."""
    return {
        "file_sha256": file_sha256(Path(config.sae)),
        "encoder": config.encoder,
        "ridge": config.ridge,
        "n_tokens": cache.n_tokens,
        "acts_sha256": checksums_used(cache),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        result = run(parse(Config, __doc__, argv))
        print(
            table(
                [f"FVU on {result['n_tokens']:,} activations", "before", "after"],
                [[result["sae"], f"{result['fvu_before']:.4f}", f"{result['fvu_after']:.4f}"]],
            )
        )
        print(f"\n{result['seconds']:.0f} s; the refitted SAE is {result['out']}")


if __name__ == "__main__":
    main()
