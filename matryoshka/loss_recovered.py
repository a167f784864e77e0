"""What a language model loses when an SAE's reconstructions take its activations' place."""

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

ROWS_AT_ONCE = 16  # through the model, at most
LOG_PROBS_AT_ONCE = 2**25  # 134 MB: 16 rows of 128 tokens, of a vocabulary of 10,000, are 82 MB


def next_token_loss(log_probs: Tensor, tok_ids: Tensor, is_target: Tensor) -> tuple[Tensor, int]:
    """The summed loss of predicting each next token, in nats, and how many were predicted.

    log_probs: [n, seq, d_vocab]; tok_ids: [n, seq]; is_target: bool [n, seq], which of them count,
    [PAD] not. Position t predicts the token at t + 1. A row's first token, which [BEGIN] predicts,
    counts, and so does the token that ends a story.
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
    """The model's loss as it is, with each SAE's reconstruction in place of the activations at a
    site of `layer`, and with `mean`, [d_model], in their place.

    Replaced are the positions that the cache holds: all but [PAD] and, by default, special ones
    such as [BEGIN], where every row has the same activation. The loss is the mean over all targets
    that are not [PAD]. Those predicted from positions that are not replaced are among them: these
    cost the same in each case, and do not change the share recovered

        (CE_mean - CE_sae) / (CE_mean - CE_clean)

    which is 1 where nothing is lost, 0 where the SAE does no better than the mean. Returns "clean",
    "mean" and "saes" in nats a token, "recovered" for each SAE (None where the mean costs nothing,
    as in a model that was never trained), and two counts, "predictions" and "replaced".
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
    """The activations at a site of `layer`, [n, seq, d_model], and what makes of others in their
    place the log-probabilities [n, seq, d_vocab]."""
    acts = model.activations(tok_ids, layer, site, is_real)
    if site == "resid_pre" and model.stream_is_all:
        return acts, lambda spliced: model.forward_from(spliced, layer, is_real)
    return acts, lambda spliced: model.log_probs_with(
        tok_ids, layer, site, lambda _: spliced, is_real
    )


def real_in(block: TokenBlock, device: torch.device) -> Tensor | None:
    """`is_real` of the block's rows, as a `LanguageModel` takes it."""
    return None if block.is_real is None else torch.from_numpy(block.is_real).to(device)


def targets_in(block: TokenBlock, model: LanguageModel) -> Any:
    """Which of the block's tokens are no padding: bool [n, seq]."""
    if isinstance(model, TinyModel):  # its rows come padded, with an id of their own for it
        return block.tok_ids != PAD
    return np.ones_like(block.is_kept) if block.is_real is None else block.is_real


def rows_at_once(seq: int, d_vocab: int) -> int:
    """How many rows of `seq` tokens go through the model at once."""
    return max(1, min(ROWS_AT_ONCE, LOG_PROBS_AT_ONCE // (seq * d_vocab)))


def cached_rows(
    cache: ActivationCache, rows: Rows, n_tokens: int, at_once: int = ROWS_AT_ONCE
) -> Iterator[TokenBlock]:
    """The first of the rows that the cache was made of, up to `n_tokens` activations.

    Yields them `at_once`, in whole batches. Raises `UserError` where a row is not what the cache
    was made of.
    """
    n_done = 0
    for block in rows.blocks(0, cache.manifest.n_rows, at_once):
        kept = torch.from_numpy(block.tokens).long()  # [n, 3]
        cached = torch.stack(cache.tokens(n_done, n_done + len(kept)), dim=1)  # the last may be few
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
