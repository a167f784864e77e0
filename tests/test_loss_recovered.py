"""What a language model loses by reconstructions, against a loop over rows and tokens."""

import json
import math

import numpy as np
import pytest
import torch
from run_factory import D_MODEL, LAYER, SEQ, randn, random_sae, write_cache
from tiny_factory import make_rows, make_state, write_dataset, write_model
from transformers_factory import make_model

from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.loss_recovered import (
    ROWS_AT_ONCE,
    cached_rows,
    next_token_loss,
    rows_at_once,
    splice_losses,
)
from matryoshka.sources import IdRows, TokenBlock
from matryoshka.tiny_model import BEGIN, PAD, TinyModel
from matryoshka.token_rows import TokenRows, kept_positions
from matryoshka.transformers_model import TransformersModel
from sae import SAE


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.from_state_dict(make_state(d_model=D_MODEL, d_mlp=24))


def block_of(rows, keep_begin=False):
    """The rows as a cache of them has them."""
    tok_ids = np.array(rows)
    return TokenBlock(0, tok_ids, kept_positions(tok_ids, keep_begin))


def loss_by_loop(model, rows, replace, left_alone=(PAD, BEGIN)):
    """Mean loss in nats, a row and a token at a time; `replace` makes of a position's residual
    what takes its place, where the token is not one that is `left_alone`."""
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        residual = model.residual(ids, LAYER)
        for t, token in enumerate(row):
            if token not in left_alone:
                residual[0, t] = replace(residual[0, t])
        log_probs = model.forward_from(residual, LAYER)[0].double()
        losses += [-log_probs[t, row[t + 1]].item() for t in range(SEQ - 1) if row[t + 1] != PAD]
    return math.fsum(losses) / len(losses), len(losses)


def identity_sae() -> SAE:
    """x = relu(x) - relu(-x): reconstructs everything."""
    eye = torch.eye(D_MODEL)
    pair = torch.cat([eye, -eye])  # [2 d_model, d_model]
    tensors = {"W_enc": pair.T, "b_enc": torch.zeros(2 * D_MODEL), "W_dec": pair}
    norm = torch.tensor(math.sqrt(D_MODEL))
    return SAE.from_tensors({**tensors, "b_dec": torch.zeros(D_MODEL), "mean_norm": norm})


def constant_sae(value: torch.Tensor) -> SAE:
    """Reconstructs everything as `value`."""
    sae = random_sae()
    sae.W_dec.zero_()
    sae.b_dec.copy_(value * sae.scale)
    return sae


def test_splicing_is_the_plain_loop(model):
    rows = make_rows(7, seq=SEQ, seed=5)
    assert {BEGIN, PAD} <= {token for row in rows for token in row}
    mean, sae = 9 * randn(D_MODEL, seed=8), random_sae()
    saes = [identity_sae(), constant_sae(mean), sae]
    batches = iter([block_of(rows[:4]), block_of(rows[4:])])
    found = splice_losses(model, saes, mean, batches, LAYER)
    assert found["mean"] > found["clean"], "there is something to recover"

    clean, n = loss_by_loop(model, rows, lambda x: x)
    assert found["predictions"] == n
    assert found["replaced"] == sum(token not in (PAD, BEGIN) for row in rows for token in row)
    assert found["clean"] == pytest.approx(clean, rel=1e-6)
    assert found["mean"] == pytest.approx(loss_by_loop(model, rows, lambda x: mean)[0], rel=1e-6)
    spliced, _ = loss_by_loop(model, rows, lambda x: sae(x[None])[0])
    assert found["saes"][2] == pytest.approx(spliced, rel=1e-6)
    assert found["saes"][0] == found["clean"]  # exactly: the same numbers go in
    assert found["recovered"][0] == 1
    assert found["recovered"][1] == pytest.approx(0, abs=1e-6)
    expected = (found["mean"] - spliced) / (found["mean"] - clean)
    assert found["recovered"][2] == pytest.approx(expected, rel=1e-5)


def test_positions_of_begin_are_replaced_where_the_cache_has_them(model):
    rows = make_rows(5, seq=SEQ, seed=5)
    mean = randn(D_MODEL, seed=8)
    found = splice_losses(model, [], mean, [block_of(rows, keep_begin=True)], LAYER)
    with_begin, _ = loss_by_loop(model, rows, lambda x: mean, left_alone=(PAD,))
    assert found["mean"] == pytest.approx(with_begin, rel=1e-6)
    assert found["replaced"] == sum(token != PAD for row in rows for token in row)
    without = splice_losses(model, [], mean, [block_of(rows)], LAYER)
    assert found["replaced"] == without["replaced"] + 5
    assert found["mean"] != pytest.approx(without["mean"], rel=1e-4)


def test_nothing_is_recovered_where_the_mean_costs_nothing():
    model = TinyModel.from_state_dict(make_state(d_model=D_MODEL, d_mlp=24))
    last = model.n_layers  # of a head that is silent, whatever the residual stream is
    model.lm_head.weight.zero_()
    found = splice_losses(
        model, [random_sae()], torch.zeros(D_MODEL), [block_of(make_rows(2, seq=SEQ))], last
    )
    assert found["mean"] == found["clean"]
    assert found["recovered"] == [None]


def test_nothing_is_recovered_where_the_mean_is_better_than_what_it_replaces(model):
    """As in a model that was never trained: its predictions are worse than chance."""
    blocks = [block_of(make_rows(7, seq=SEQ, seed=5))]
    found = splice_losses(model, [random_sae()], torch.zeros(D_MODEL), blocks, LAYER)
    assert found["mean"] < found["clean"]
    assert found["recovered"] == [None]


def test_clean_loss_is_the_models_own(model):
    rows = make_rows(5, seq=SEQ, seed=6)
    found = splice_losses(model, [], torch.zeros(D_MODEL), iter([block_of(rows)]), LAYER)
    tok_ids = torch.tensor(rows)
    loss, n = next_token_loss(model(tok_ids), tok_ids, tok_ids != PAD)
    assert found["clean"] == pytest.approx(loss.item() / n, rel=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of 61 rows, with the files that it was made of beside it."""
    folder = tmp_path_factory.mktemp("rows")
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    write_dataset(folder, 61, split="validation", seq=SEQ, seed=1)
    return ActivationCache(write_cache(folder, "validation"))


def rows_at(folder):
    return IdRows(TokenRows(str(folder), "validation"), 10_000)


def rows_in(folder):
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["tok_ids"] for line in lines]


def test_cached_rows_are_whole_batches_up_to_the_number_of_tokens(cache):
    folder = cache.folder.parent
    every = [block.tok_ids for block in cached_rows(cache, rows_at(folder), 10**9)]
    assert np.concatenate(every).tolist() == rows_in(folder)
    assert [len(rows) for rows in every] == [ROWS_AT_ONCE] * 3 + [61 - 3 * ROWS_AT_ONCE]
    first = sum(token not in (BEGIN, PAD) for row in every[0].tolist() for token in row)
    for n_tokens, n_batches in ((1, 1), (first, 1), (first + 1, 2)):
        assert len(list(cached_rows(cache, rows_at(folder), n_tokens))) == n_batches


def test_a_cache_that_ends_within_a_row_has_that_row(cache, tmp_path):
    folder = cache.folder.parent
    short = ActivationCache(
        write_cache(folder, "validation", tokens=30, out=str(tmp_path / "short"))
    )
    [block] = cached_rows(short, rows_at(folder), 10**9)
    assert block.tok_ids.tolist() == rows_in(folder)[: short.manifest.n_rows]


def test_rows_that_the_cache_was_not_made_of_are_refused(cache, tmp_path):
    other = write_dataset(tmp_path / "other", 61, split="validation", seq=SEQ, seed=2)
    with pytest.raises(UserError, match="tokens differ after the first 0; give its --dataset"):
        list(cached_rows(cache, rows_at(other), 10**9))
    lines = (cache.folder.parent / "validation.jsonl").read_text().splitlines(keepends=True)
    for n, named in ((20, "it ends after"), (60, "it ends after")):
        (other / "validation.jsonl").write_text("".join(lines[:n]))
        with pytest.raises(UserError, match=named):
            list(cached_rows(cache, rows_at(other), 10**9))
    changed = [*lines[:40], lines[0], *lines[41:]]
    (other / "validation.jsonl").write_text("".join(changed))
    with pytest.raises(UserError, match=r"tokens differ after the first \d{3}"):
        list(cached_rows(cache, rows_at(other), 10**9))


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("resid_pre", "transformer.h.1"),
        ("resid_post", "transformer.h.1"),
        ("attn_out", "transformer.h.1.attn"),
        ("mlp_out", "transformer.h.1.mlp"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_any_site_of_any_model_is_spliced_as_by_a_hook_in_each_row_alone(site, name, padded):
    """Of GPT-2, row by row, against its own forward pass and the loss by hand."""
    gpt2 = make_model("gpt2")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, 96, (3, 12), generator=generator)
    n_real = [12, 9, 5] if padded else [12, 12, 12]
    is_real = torch.arange(12) < torch.tensor(n_real)[:, None]
    is_kept = is_real.clone()
    is_kept[:, 0] = False
    sae, mean = random_sae(d_model=16), randn(16, seed=8)

    def by_hand(instead):
        losses = []
        for row, n in zip(rows, n_real, strict=True):

            def spliced(acts):
                return torch.cat([acts[:, :1], instead(acts[0, 1:])[None]], dim=1)

            def before(module, args, kwargs):
                return (spliced(args[0]), *args[1:]), kwargs

            def after(module, args, output):
                if isinstance(output, tuple):
                    return (spliced(output[0]), *output[1:])
                return spliced(output)

            module = gpt2.get_submodule(name)
            if site == "resid_pre":
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                hook = module.register_forward_hook(after)
            log_probs = gpt2(row[None, :n]).logits[0].double().log_softmax(-1)
            hook.remove()
            losses += [-log_probs[t, row[t + 1]].item() for t in range(n - 1)]
        return math.fsum(losses) / len(losses)

    block = TokenBlock(0, rows.numpy(), is_kept.numpy(), is_real.numpy() if padded else None)
    model = TransformersModel(gpt2)
    with torch.no_grad():
        found = splice_losses(model, [identity_sae(), sae], mean, [block], 1, site)
        assert found["clean"] == pytest.approx(by_hand(lambda x: x), rel=1e-5)
        assert found["mean"] == pytest.approx(by_hand(lambda x: mean.expand_as(x)), rel=1e-5)
        assert found["saes"][1] == pytest.approx(by_hand(sae), rel=1e-5)
    assert found["saes"][0] == pytest.approx(found["clean"], rel=1e-5)
    assert found["predictions"] == sum(n_real) - 3
    assert found["replaced"] == sum(n_real) - 3


def test_as_many_rows_go_through_the_model_as_log_probabilities_fit():
    assert rows_at_once(128, 10_000) == ROWS_AT_ONCE  # the published figures'
    assert rows_at_once(128, 50_257) == 5
    assert rows_at_once(8192, 262_144) == 1
