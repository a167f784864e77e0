"""How much a language model's loss rises if an SAE's reconstructions replace its activations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.language_models import LanguageModel
from matryoshka.sites import Site
from matryoshka.sources import Rows, TokenBlock
from matryoshka.tiny_model import PAD, TinyModel
from sae import SAE

ROWS_AT_ONCE = 16  # rows that go through the model at once, at most
LOG_PROBS_AT_ONCE = 2**25  # log-probabilities at once, at most: 134 MB in float32


def next_token_loss(log_probs: Tensor, tok_ids: Tensor, is_target: Tensor) -> tuple[Tensor, int]:
    """The summed loss of predicting each next token, in nats, and the number of predictions.

    log_probs: [n, seq, d_vocab]; tok_ids: [n, seq]; is_target: bool [n, seq], False for tokens that
    do not count, such as [PAD]. Position t predicts the token at t + 1. The first token after
    [BEGIN] counts, and so does the token that ends a story.
    """
    targets, counted = tok_ids[:, 1:], is_target[:, 1:]
    losses = -log_probs[:, :-1].gather(2, targets[..., None])[..., 0]
    return losses[counted].sum(dtype=torch.float64), int(counted.sum())


@torch.inference_mode()
def splice_losses(
    model: LanguageModel,
    saes: Sequence[SAE],
    mean: Tensor,
    blocks: Iterable[TokenBlock],
    layer: int,
    site: Site = "resid_pre",
) -> dict[str, Any]:
    """The model's loss without change, and if reconstructions or the mean replace activations.

    The activations at a site of `layer` are replaced, by each SAE's reconstruction or by `mean`
    [d_model], at the positions that the cache holds. These are all but padding and, by default,
    special ids such as [BEGIN], where every row has the same activation. The loss is the mean over
    all targets that are not padding. The share of the loss that an SAE recovers is

        (CE_mean - CE_sae) / (CE_mean - CE_clean)

    which is 1 if nothing is lost, and 0 if the SAE is no better than the mean. Returns "clean",
    "mean" and "saes" in nats a token, "recovered" for each SAE (None if the mean does not raise the
    loss, as in an untrained model), and the counts "predictions" and "replaced".
    """
    mean = mean.to(model.device, torch.float32)
    sums = torch.zeros(2 + len(saes), dtype=torch.float64, device=model.device)
    n = replaced = 0
    for block in blocks:
        tok_ids, is_kept, is_target = (
            torch.from_numpy(of).to(model.device)
            for of in (block.tok_ids, block.is_kept, targets_in(block, model))
        )
        acts, log_probs_with = read_site(model, tok_ids, layer, site, real_in(block, model.device))
        x = acts[is_kept].float()  # [n_kept, d_model]
        for i, instead in enumerate([x, mean.expand_as(x), *(sae(x) for sae in saes)]):
            spliced = acts.clone()
            spliced[is_kept] = instead.to(acts.dtype)
            loss, n_targets = next_token_loss(log_probs_with(spliced), tok_ids, is_target)
            sums[i] += loss
        n += n_targets
        replaced += len(x)
    clean, of_mean, *of_saes = (sums / n).tolist()
    gap = of_mean - clean
    return {
        "clean": clean,
        "mean": of_mean,
        "saes": of_saes,
        "recovered": [(of_mean - loss) / gap if gap > 0 else None for loss in of_saes],
        "predictions": n,
        "replaced": replaced,
    }


def read_site(
    model: LanguageModel, tok_ids: Tensor, layer: int, site: Site, is_real: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activations at a site of `layer`, [n, seq, d_model], and a function.

    The function takes activations to replace them with, and returns the model's log-probabilities
    [n, seq, d_vocab].
    """
    acts = model.activations(tok_ids, layer, site, is_real)
    if site == "resid_pre" and model.stream_is_all:
        return acts, lambda spliced: model.forward_from(spliced, layer, is_real)
    return acts, lambda spliced: model.log_probs_with(
        tok_ids, layer, site, lambda _: spliced, is_real
    )


def real_in(block: TokenBlock, device: torch.device) -> Tensor | None:
    """The block's `is_real` for a `LanguageModel`: bool [n, seq], or None without padding."""
    return None if block.is_real is None else torch.from_numpy(block.is_real).to(device)


def targets_in(block: TokenBlock, model: LanguageModel) -> Any:
    """Which of the block's tokens are not padding: bool [n, seq]."""
    if isinstance(model, TinyModel):  # its dataset has rows with padding, of the id PAD
        return block.tok_ids != PAD
    return np.ones_like(block.is_kept) if block.is_real is None else block.is_real


def rows_at_once(seq: int, d_vocab: int) -> int:
    """How many rows of `seq` tokens may go through the model at once."""
    return max(1, min(ROWS_AT_ONCE, LOG_PROBS_AT_ONCE // (seq * d_vocab)))


def cached_rows(
    cache: ActivationCache, rows: Rows, n_tokens: int, at_once: int = ROWS_AT_ONCE
) -> Iterator[TokenBlock]:
    """Yields the first rows that the cache was made from, until they have `n_tokens` activations.

    A block has `at_once` rows. Raises `UserError` if a row differs from what the cache holds.
    """
    n_done = 0
    for block in rows.blocks(0, cache.manifest.n_rows, at_once):
        kept = torch.from_numpy(block.tokens).long()  # [n, 3]
        cached = torch.stack(cache.tokens(n_done, n_done + len(kept)), dim=1)  # fewer at the end
        if not torch.equal(cached, kept[: len(cached)]):
            raise UserError(
                f"{rows.name} is not what {cache.folder} was made of: tokens differ after the "
                f"first {n_done}; give its --dataset"
            )
        yield block
        n_done += len(cached)
        if n_done >= n_tokens:
            return
    if n_done < cache.n_tokens:
        raise UserError(
            f"{rows.name} is not what {cache.folder} was made of: it ends after {n_done} tokens; "
            "give its --dataset"
        )
