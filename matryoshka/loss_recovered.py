"""What a language model loses when an SAE's reconstructions take the residual stream's place."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.tiny_model import PAD, TinyModel
from matryoshka.token_rows import TokenRows, kept_positions
from sae import SAE

ROWS_AT_ONCE = 16  # through the model: 16 x 128 x 10,000 log-probabilities are 82 MB


def next_token_loss(log_probs: Tensor, tok_ids: Tensor) -> tuple[Tensor, int]:
    """The summed loss of predicting each next token, in nats, and how many were predicted.

    log_probs: [n, seq, d_vocab]; tok_ids: [n, seq]. Position t predicts the token at t + 1. Targets
    that are [PAD] do not count. A row's first token, which [BEGIN] predicts, counts, and so does
    the token that ends a story.
    """
    targets = tok_ids[:, 1:]
    counted = targets != PAD
    losses = -log_probs[:, :-1].gather(2, targets[..., None])[..., 0]
    return losses[counted].sum(dtype=torch.float64), int(counted.sum())


@torch.inference_mode()
def splice_losses(
    model: TinyModel,
    saes: Sequence[SAE],
    mean: Tensor,
    rows: Iterable[Tensor],
    layer: int,
    keep_begin: bool = False,
) -> dict[str, Any]:
    """The model's loss as it is, with each SAE's reconstruction in place of the residual stream
    at `layer`, and with `mean`, [d_model], in its place.

    Replaced are the positions that a cache of `keep_begin` holds: all but [PAD] and, by default,
    [BEGIN], where every row has the same activation. The loss is the mean over all targets that
    are not [PAD]. Those predicted from positions that are not replaced are among them: these cost
    the same in each case, and do not change the share recovered

        (CE_mean - CE_sae) / (CE_mean - CE_clean)

    which is 1 where nothing is lost, 0 where the SAE does no better than the mean. rows: batches
    of token ids [n, seq]. Returns "clean", "mean" and "saes" in nats a token, "recovered" for each
    SAE (None where the mean costs nothing), and two counts, "predictions" and "replaced".
    """
    device = model.embed.weight.device
    mean = mean.to(device, torch.float32)
    sums = torch.zeros(2 + len(saes), dtype=torch.float64, device=device)
    n = replaced = 0
    for tok_ids in rows:
        is_kept = torch.from_numpy(kept_positions(tok_ids.cpu().numpy(), keep_begin)).to(device)
        tok_ids = tok_ids.to(device)
        residual = model.residual(tok_ids, layer)  # [n, seq, d_model]
        x = residual[is_kept]  # [n_kept, d_model]
        for i, instead in enumerate([x, mean.expand_as(x), *(sae(x) for sae in saes)]):
            spliced = residual.clone()
            spliced[is_kept] = instead
            loss, n_targets = next_token_loss(model.forward_from(spliced, layer), tok_ids)
            sums[i] += loss
        n += n_targets
        replaced += len(x)
    clean, of_mean, *of_saes = (sums / n).tolist()
    gap = of_mean - clean
    return {
        "clean": clean,
        "mean": of_mean,
        "saes": of_saes,
        "recovered": [(of_mean - loss) / gap if gap else None for loss in of_saes],
        "predictions": n,
        "replaced": replaced,
    }


def cached_rows(
    cache: ActivationCache, dataset: str, n_tokens: int, d_vocab: int
) -> Iterator[Tensor]:
    """The first rows of the dataset that the cache was made of, up to `n_tokens` activations.

    Yields token ids, int64 [at most ROWS_AT_ONCE, seq], in whole batches. `dataset`: where the rows
    are now. Raises `UserError` where a row is not what the cache was made of.
    """
    recipe = cache.recipe
    revision = recipe.get("dataset_revision") if dataset == recipe["dataset"] else None
    source, n_done = TokenRows(dataset, recipe["split"], revision), 0
    for rows in source.read(0, cache.manifest.n_rows, d_vocab, ROWS_AT_ONCE):
        kept = torch.from_numpy(rows[kept_positions(rows, recipe["keep_begin"])])
        cached = cache.tokens(n_done, n_done + len(kept))[0]  # the last row's may be fewer
        if not torch.equal(cached, kept[: len(cached)]):
            raise UserError(
                f"{source.file} is not what {cache.folder} was made of: tokens differ after the "
                f"first {n_done}; give its --dataset"
            )
        yield torch.from_numpy(rows)
        n_done += len(cached)
        if n_done >= n_tokens:
            return
    if n_done < cache.n_tokens:
        raise UserError(
            f"{source.file} is not what {cache.folder} was made of: it ends after {n_done} tokens; "
            "give its --dataset"
        )
