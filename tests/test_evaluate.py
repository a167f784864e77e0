"""The metrics against closed forms, and against loops in float64 written here."""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_factory import BEGIN, END, PAD, make_rows, make_state, write_dataset, write_model

import cache_activations
import evaluate
import train_tinystories
from cache_activations import ActivationCache
from evaluate import (
    absorption_rate,
    best_cosine,
    clean_features,
    dead_share,
    decoder_cosines,
    fvu,
    l0,
    match_latents,
)
from sae import SAE
from script import UserError
from tiny_model import TinyModel


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fvu_by_loop(x, x_hat):
    n, d = len(x), len(x[0])
    mean = [math.fsum(row[k] for row in x) / n for k in range(d)]
    residual = math.fsum(
        (a - b) ** 2 for p, q in zip(x, x_hat, strict=True) for a, b in zip(p, q, strict=True)
    )
    return residual / math.fsum((row[k] - mean[k]) ** 2 for row in x for k in range(d))


def test_fvu_is_the_loops():
    x, x_hat = randn(50, 7) + 3, randn(2, 3, 50, 7, seed=1)
    found = fvu(x, x_hat)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    for a, b in itertools.product(range(2), range(3)):
        expected = fvu_by_loop(x.tolist(), x_hat[a, b].tolist())
        assert found[a, b].item() == pytest.approx(expected, rel=1e-6)
    own = randn(2, 3, 50, 7, seed=2)  # each SAE against the variance of its own samples
    expected = fvu_by_loop(own[1, 2].tolist(), x_hat[1, 2].tolist())
    assert fvu(own, x_hat)[1, 2].item() == pytest.approx(expected, rel=1e-6)


def test_fvu_closed_forms():
    x = randn(100, 5) + 10  # far from 0: the mean is taken off
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1, abs=1e-6)
    assert fvu(x, x - 0.1 * (x - x.mean(0))).item() == pytest.approx(0.01, rel=1e-4)
    assert fvu(x * 7, x * 7 + 7).item() == pytest.approx(fvu(x, x + 1).item(), rel=1e-5)


def test_fvu_sums_in_float64():
    n = 2**15 + 1
    x = torch.tensor([1.1, -1.1]).repeat_interleave(n)[:, None]
    # The residual is x / 1000 to float64's precision, so that only the sums could round.
    assert fvu(x, 1.001 * x.double()).item() == pytest.approx(1e-6, rel=1e-9)


def test_fvu_of_constant_samples_and_of_wrong_shapes():
    ones = torch.ones(10, 3)
    assert fvu(ones, ones + 1) == math.inf
    assert fvu(ones, ones).isnan()
    tenths = torch.full((10, 3), 0.1)  # their sum rounds, and so does their mean
    assert fvu(tenths, tenths + 1) == math.inf
    assert fvu(tenths, tenths).isnan()
    assert fvu(ones[:0], ones[:0]).isnan()
    for wrong in (torch.ones(10, 1), torch.ones(1, 3), torch.ones(3)):  # would broadcast
        with pytest.raises(ValueError, match="must be equal"):
            fvu(ones, wrong)


@given(st.integers(0, 2**32), st.floats(-1, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_l0_and_dead_share_are_the_loops(seed, bias):
    acts = (randn(2, 3, 11, 5, seed=seed) - bias).relu()
    for a, b in itertools.product(range(2), range(3)):
        one = acts[a, b].tolist()
        fired = [[value > 0 for value in row] for row in one]
        assert l0(acts)[a, b].item() == pytest.approx(sum(map(sum, fired)) / 11)
        dead = sum(not any(row[j] for row in fired) for j in range(5))
        assert dead_share(acts)[a, b].item() == pytest.approx(dead / 5)


def test_negative_activations_do_not_fire():
    acts = torch.tensor([[-1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])
    assert l0(acts) == 0.5
    assert dead_share(acts).item() == pytest.approx(2 / 3)


def test_decoder_cosines_are_the_loops():
    W_dec, directions = randn(2, 4, 6) * 5, randn(3, 6, seed=1) * 0.1
    found = decoder_cosines(W_dec, directions)
    assert found.shape == (2, 4, 3)
    for s, j, f in itertools.product(range(2), range(4), range(3)):
        u, v = W_dec[s, j].tolist(), directions[f].tolist()
        dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
        assert found[s, j, f].item() == pytest.approx(dot / (math.hypot(*u) * math.hypot(*v)))


def test_cosines_of_zero_and_tiny_rows():
    W_dec = torch.tensor([[0.0, 0.0], [3e-30, 4e-30]])
    cosines = decoder_cosines(W_dec, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(cosines, torch.tensor([[0.0, 0.0], [0.6, 0.0]]).double())
    with pytest.raises(ValueError, match="last dimension"):
        decoder_cosines(W_dec, torch.ones(2, 1))


def test_best_cosine_and_clean_features():
    cosines = torch.tensor([[0.95, -0.99, 0.2], [0.1, 0.3, 0.9]], dtype=torch.float64)
    best = best_cosine(cosines)
    assert best.tolist() == [0.95, 0.3, 0.9]  # the best is signed
    assert clean_features(best) == 1  # over the threshold, not at it
    assert clean_features(best, 0.85) == 2
    assert clean_features(torch.stack([best, best + 0.05]), 0.94).tolist() == [1, 2]


def best_total(cosines: torch.Tensor) -> float:
    """The highest total cosine over all one-to-one matchings, by trying each."""
    n_latents, n_features = cosines.shape
    if n_latents < n_features:
        return best_total(cosines.T)
    table = cosines.tolist()
    return max(
        sum(table[j][f] for f, j in enumerate(latents))
        for latents in itertools.permutations(range(n_latents), n_features)
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_matching_is_one_to_one_and_the_best(n_latents, n_features, seed):
    cosines = randn(2, n_latents, n_features, seed=seed, dtype=torch.float64)
    matched = match_latents(cosines)
    assert matched.shape == (2, n_features)
    for one, latents in zip(cosines, matched.tolist(), strict=True):
        pairs = [(j, f) for f, j in enumerate(latents) if j >= 0]
        assert len(pairs) == min(n_latents, n_features)
        assert len({j for j, _ in pairs}) == len(pairs)
        assert sum(one[j, f].item() for j, f in pairs) == pytest.approx(best_total(one))


def test_matching_gives_up_a_best_cosine_for_the_total():
    # Both features like latent 0 best; the second can do without it, the first cannot.
    cosines = torch.tensor([[0.9, 0.95], [0.0, 0.9]])
    assert match_latents(cosines).tolist() == [0, 1]


def test_absorption_by_hand():
    #           feature: parent, child, child, alone
    features = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [1.0, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    )
    matched = torch.tensor([2, 0, 1, -1])
    acts = torch.zeros(4, 3)
    acts[:, 2] = torch.tensor([0.5, 0.0, 0.0, 0.0])  # the last is no child's sample: not counted
    rates = absorption_rate(acts, features, [None, 0, 0, None], matched)
    assert rates[1].item() == pytest.approx(2 / 3)
    assert rates.isnan().tolist() == [True, False, True, True]  # feature 2 was never active
    without = absorption_rate(acts, features, [None, 3, 0, None], matched)
    assert without[1].isnan()  # its parent has no latent


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_absorption_is_the_loops(seed, own_samples):
    parent_of = [None, 0, 0, 1, None, 4]
    features = (randn(*([2, 3] if own_samples else []), 9, 6, seed=seed) - 0.8).relu()
    acts = (randn(2, 3, 9, 4, seed=seed + 1) - 0.2).relu()
    matched = match_latents(randn(2, 3, 4, 6, seed=seed + 2))  # two features have no latent
    found = absorption_rate(acts, features, parent_of, matched)
    assert found.shape == (2, 3, 6)
    for a, b, child in itertools.product(range(2), range(3), range(6)):
        rows = (features[a, b] if own_samples else features).tolist()
        parent = parent_of[child]
        latent = -1 if parent is None else int(matched[a, b, parent])
        on = [i for i in range(9) if rows[i][child] > 0]
        if latent < 0 or not on:
            assert found[a, b, child].isnan()
        else:
            silent = sum(acts[a, b, i, latent].item() <= 0 for i in on)
            assert found[a, b, child].item() == pytest.approx(silent / len(on))


def test_absorption_refuses_what_does_not_fit():
    acts, features, matched = torch.ones(5, 2), torch.ones(5, 3), torch.tensor([0, 1, -1])
    with pytest.raises(ValueError, match="samples"):
        absorption_rate(acts[:1], features, [None, 0, 0], matched)
    with pytest.raises(ValueError, match="features"):
        absorption_rate(acts, features, [None, 0], matched)


# -------------------------------------------------- the language-model half: pieces, by brute force

SEQ, D_MODEL, LAYER = 24, 16, 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_sae(n_latents: int = 13, d_model: int = D_MODEL, seed: int = 0) -> SAE:
    """An SAE with nothing at zero: biases, scale and decoder norms included."""
    sae = SAE(d_model, n_latents, seed)
    with torch.no_grad():
        sae.W_dec.copy_(randn(n_latents, d_model, seed=seed + 1))
        sae.b_enc.copy_(randn(n_latents, seed=seed + 2) - 0.5)
        sae.b_dec.copy_(randn(d_model, seed=seed + 3))
        sae.mean_norm.fill_(5.0)
    return sae.requires_grad_(False)


def test_prefix_lengths():
    assert evaluate.prefix_lengths(1) == [1]
    assert evaluate.prefix_lengths(2) == [1, 2]
    assert evaluate.prefix_lengths(8) == [1, 2, 4, 8]
    assert evaluate.prefix_lengths(13) == [1, 2, 4, 8, 13]


def test_fvu_by_prefix_is_each_prefixs_own_decode():
    sae, x = random_sae(), randn(60, D_MODEL, seed=9) + 2
    acts = sae.encode(x)
    found = evaluate.prefix_errors(sae, x, acts, [1, 2, 4, 8, 13])
    assert found.dtype == torch.float64
    assert found.shape == (5, 60)
    for error, prefix in zip(found.sum(1).tolist(), [1, 2, 4, 8, 13], strict=True):
        decoded = sae.decode(acts, prefix)
        by_loop = fvu_by_loop(x.tolist(), decoded.tolist())
        variance = (x.double() - x.double().mean(0)).square().sum().item()
        assert error / variance == pytest.approx(by_loop, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_highest_cosines_are_the_loops(chunk):
    W_dec = randn(7, 5)
    W_dec[3] = 2 * W_dec[1]
    found = evaluate.highest_cosines(W_dec, chunk).tolist()
    for j in range(7):
        cosines = [
            torch.nn.functional.cosine_similarity(W_dec[j].double(), W_dec[k].double(), dim=0)
            for k in range(7)
            if k != j
        ]
        assert found[j] == pytest.approx(max(cosines).item(), abs=1e-12)
    assert found[3] == pytest.approx(1)


def counts_on(fires, is_member):
    """`choose_detectors`' first three arguments, from bool [n, n_latents], [n_concepts, n]."""
    hits = is_member.double() @ fires.double()
    return {"fired": fires.sum(0), "hits": hits, "n_members": is_member.sum(1)}


def test_absorption_of_a_made_up_case():
    # Ten tokens, the first six of the concept. Latent 0 fires on five of them and nowhere else but
    # on one: its F1 is the best. 1 takes the sixth, and is the concept's alone. 2 fires on two of
    # the concept and two others: not specific. 3 is specific, but fires once. 4 covers as much as
    # 0, and is on everything.
    first = torch.tensor(
        [
            # 0, 1, 2, 3, 4
            [1, 0, 1, 0, 1],
            [1, 0, 1, 0, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 0, 0, 1],
            [1, 1, 0, 0, 1],
            [0, 1, 0, 1, 1],
            [1, 0, 1, 0, 1],
            [0, 0, 1, 0, 1],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 1],
        ]
    ).bool()
    member = torch.tensor([[1] * 6 + [0] * 4]).bool()
    chosen = evaluate.choose_detectors(**counts_on(first, member), min_precision=0.8, min_fires=2)
    assert chosen.latent.tolist() == [0]
    assert chosen.precision.item() == pytest.approx(5 / 6)
    assert chosen.recall.item() == pytest.approx(5 / 6)
    assert chosen.specific.tolist() == [[False, True, False, False, False]]

    # Of eight tokens of the concept: on two the detector fires, on three only latent 1 does
    # (absorbed, one of them with 2), on two only what is not specific, on one nothing.
    second = torch.tensor(
        [
            [1, 1, 0, 0, 1],
            [1, 0, 0, 0, 1],
            [0, 1, 0, 0, 1],
            [0, 1, 1, 0, 1],
            [0, 1, 0, 0, 0],
            [0, 0, 1, 0, 1],
            [0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0],
            [0, 1, 0, 0, 1],  # not of the concept: does not count
        ]
    ).bool()
    member = torch.tensor([[1] * 8 + [0]]).bool()
    counts = evaluate.count_absorbed(second, member, chosen)
    assert [int(c) for c in counts] == [8, 6, 3]


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_concept_absorption_is_the_loops(seed):
    n, n_latents, n_concepts, min_precision, min_fires = 40, 6, 3, 0.5, 4
    fires = randn(2, n, n_latents, seed=seed) > 0.6
    member = randn(2, n_concepts, n, seed=seed + 1) > 0.2
    chosen = evaluate.choose_detectors(
        **counts_on(fires[0], member[0]), min_precision=min_precision, min_fires=min_fires
    )
    found = evaluate.count_absorbed(fires[1], member[1], chosen)
    for c in range(n_concepts):
        on = [{i for i in range(n) if fires[0, i, j]} for j in range(n_latents)]
        of = {i for i in range(n) if member[0, c, i]}
        f1 = [2 * len(s & of) / (len(s) + len(of)) for s in on]
        best = f1.index(max(f1))
        assert chosen.latent[c] == best
        assert chosen.precision[c].item() == pytest.approx(len(on[best] & of) / len(on[best]))
        assert chosen.recall[c].item() == pytest.approx(len(on[best] & of) / len(of))
        specific = [
            j
            for j, s in enumerate(on)
            if len(s) >= min_fires
            and len(s & of) / len(s) >= min_precision
            and len(s & of) < len(on[best] & of)
        ]
        assert chosen.specific[c].nonzero()[:, 0].tolist() == specific
        tokens = [i for i in range(n) if member[1, c, i]]
        missed = [i for i in tokens if not fires[1, i, best]]
        absorbed = [i for i in missed if any(fires[1, i, j] for j in specific)]
        assert [int(f[c]) for f in found] == [len(tokens), len(missed), len(absorbed)]


def test_a_concept_that_never_occurs_has_no_rates():
    fires = torch.zeros(4, 3).bool()
    member = torch.zeros(1, 4).bool()
    chosen = evaluate.choose_detectors(**counts_on(fires, member), min_precision=0.8)
    result = evaluate.concept_result("none", 0, chosen, 0, [0, 0, 0])
    assert [result[k] for k in ("detector", "precision", "recall", "miss_rate", "absorption")] == (
        [None] * 5
    )


def test_halves_are_halves_and_repeat():
    first = evaluate.halves(11, seed=3)
    assert first.sum() == 5
    assert first.equal(evaluate.halves(11, seed=3))
    assert not first.equal(evaluate.halves(11, seed=4))


# ----------------------------------------------------------------------------- the model's own loss


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.from_state_dict(make_state(d_model=D_MODEL, d_mlp=24))


def loss_by_loop(model, rows, replace):
    """Mean loss in nats, a row and a token at a time; `replace` makes of a position's residual
    what takes its place, where it is neither [PAD] nor [BEGIN]."""
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        residual = model.residual(ids, LAYER)
        for t, token in enumerate(row):
            if token not in (PAD, BEGIN):
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
    sae.b_dec.copy_(value * sae.scale[0, 0])
    return sae


def test_splicing_is_the_plain_loop(model):
    rows = make_rows(7, seq=SEQ, seed=5)
    assert {BEGIN, PAD} <= {token for row in rows for token in row}
    mean, sae = randn(D_MODEL, seed=8), random_sae()
    saes = [identity_sae(), constant_sae(mean), sae]
    batches = iter([torch.tensor(rows[:4]), torch.tensor(rows[4:])])
    found = evaluate.splice_losses(model, saes, mean, batches, LAYER)

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


def test_clean_loss_is_the_models_own(model):
    rows = torch.tensor(make_rows(5, seq=SEQ, seed=6))
    found = evaluate.splice_losses(model, [], torch.zeros(D_MODEL), iter([rows]), LAYER)
    loss, n = evaluate.next_token_loss(model(rows), rows)
    assert found["clean"] == pytest.approx(loss.item() / n, rel=1e-6)


# ---------------------------------------------------------------------------------- from end to end

AT_ONCE = 100  # activations: several batches, the last one short
CONCEPTS = {"frequent": list(range(20, 60)), "end": [END], "absent": [9000]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt, token ids, caches "train" and "validation", and a trained "run"."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    for split, n_rows, seed in (("train", 150, 0), ("validation", 61, 1)):
        write_dataset(folder, n_rows, split=split, seq=SEQ, seed=seed)
        cache_activations.run(
            cache_activations.Config(
                model=str(folder / "model.pt"),
                dataset=str(folder),
                split=split,
                layer=LAYER,
                rows_per_shard=40,
                out=str(folder / split),
                device="cpu",
            )
        )
    train_tinystories.run(
        train_tinystories.Config(
            cache=str(folder / "train"),
            n_latents=40,
            n_prefixes=4,
            target_l0=5.0,
            n_steps=60,
            batch_size=256,
            out=str(folder / "run"),
            device="cpu",
        )
    )
    content = {"concepts": {name: {"words": [], "ids": ids} for name, ids in CONCEPTS.items()}}
    (folder / "concepts.json").write_text(json.dumps(content))
    return folder


def config_for(made: Path, to: Path, **changed: Any) -> evaluate.Config:
    usual: dict[str, Any] = {
        "run": str(made / "run"),
        "cache": str(made / "validation"),
        "concepts": str(made / "concepts.json"),
        "min_precision": 0.3,  # low enough that something is absorbed
        "out": str(to),
        "device": "cpu",
    }
    return evaluate.Config(**{**usual, **changed})


@pytest.fixture(scope="module")
def scored(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `run` returned; its files are in the folder that its config names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BATCH", AT_ONCE)
        return evaluate.run(config_for(made, tmp_path_factory.mktemp("scored")))


def encoded(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """In the batches of a run: what is just above 0 in another is not the same on every CPU."""
    return torch.cat([sae.encode(part) for part in x.split(AT_ONCE)]).detach()


def test_a_run_scores_as_the_pure_functions_do(made, scored):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    assert len(x) == scored["cache"]["n_tokens"] > 500
    assert [r["sae"] for r in scored["runs"]] == ["matryoshka", "vanilla"]
    for result in scored["runs"]:
        sae = SAE.load(made / "run" / f"{result['sae']}.safetensors").requires_grad_(False)
        acts = encoded(sae, x)
        assert result["fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-5)
        assert result["l0"] == pytest.approx(l0(acts).item())
        assert result["dead_share"] == pytest.approx(dead_share(acts).item())
        assert result["fired"] == (acts > 0).sum(0).tolist()
        by_prefix = result["fvu_by_prefix"]
        assert by_prefix["prefix"] == [1, 2, 4, 8, 16, 32, 40]
        for prefix, value in zip(*by_prefix.values(), strict=True):
            assert value == pytest.approx(fvu(x, sae.decode(acts, prefix)).item(), rel=1e-5)
        cosines = decoder_cosines(sae.W_dec, sae.W_dec).fill_diagonal_(-1).amax(1)
        assert result["mean_highest_cosine"] == pytest.approx(cosines.mean().item())
        assert result["highest_cosine_quantiles"]["0.5"] == pytest.approx(
            cosines.quantile(0.5).item()
        )


def test_a_runs_absorption_is_of_the_other_half(made, scored):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    tok_ids, rows, _ = cache.tokens(0, cache.n_tokens)
    first = evaluate.halves(61, seed=0)[rows]
    member = torch.stack([torch.isin(tok_ids, torch.tensor(ids)) for ids in CONCEPTS.values()])
    for result in scored["runs"]:
        sae = SAE.load(made / "run" / f"{result['sae']}.safetensors")
        fires = encoded(sae, x) > 0
        chosen = evaluate.choose_detectors(
            **counts_on(fires[first], member[:, first]), min_precision=0.3
        )
        counts = evaluate.count_absorbed(fires[~first], member[:, ~first], chosen)
        frequent, end, absent = result["concepts"]
        for i, concept in enumerate((frequent, end)):
            n, missed, absorbed = (int(c[i]) for c in counts)
            assert concept["tokens"] == n > 0
            assert concept["tokens_chosen_on"] == int(member[i, first].sum())
            assert concept["detector"] == int(chosen.latent[i])
            assert concept["miss_rate"] == pytest.approx(missed / n)
            assert concept["absorption"] == pytest.approx(absorbed / n)
        assert absent["tokens"] == 0
        assert absent["absorption"] is None
        mean = (frequent["absorption"] + end["absorption"]) / 2
        assert result["absorption"] == pytest.approx(mean)
    # There was something to get wrong: tokens that are missed, and of those some absorbed.
    assert 0 < frequent["absorption"] < frequent["miss_rate"] < 1


def test_a_runs_cross_entropy_is_the_plain_loop(made, scored, model):
    lines = (made / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line)["tok_ids"] for line in lines]
    cache = ActivationCache(made / "validation")
    mean = cache.acts(0, cache.n_tokens).double().mean(0).float()
    ce = scored["cross_entropy"]
    clean, n = loss_by_loop(model, rows, lambda x: x)
    of_mean, _ = loss_by_loop(model, rows, lambda x: mean)
    assert ce["predictions"] == n
    assert ce["replaced"] == cache.n_tokens
    assert ce["clean"] == pytest.approx(clean, rel=1e-6)
    assert ce["mean"] == pytest.approx(of_mean, rel=1e-6)
    for result in scored["runs"]:
        sae = SAE.load(made / "run" / f"{result['sae']}.safetensors").requires_grad_(False)
        spliced, _ = loss_by_loop(model, rows, lambda x, sae=sae: sae(x[None])[0])
        assert result["cross_entropy"] == pytest.approx(spliced, rel=1e-6)


def test_what_a_run_writes_and_prints(scored):
    out = Path(scored["config"]["out"])
    figures = {"fvu_by_prefix.png", "density_histograms.png", "training_curves.png"}
    assert {path.name for path in out.iterdir()} == {"evaluation.json", *figures}
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(scored))
    assert scored["cache"]["held_out"] is True
    assert scored["seconds"] > 0
    printed = evaluate.summary(scored)
    for result in scored["runs"]:
        row = next(line for line in printed.splitlines() if f"| {result['sae']}" in line)
        assert f"{result['fvu']:.4f}" in row
        assert f"{result['loss_recovered']:.1%}" in row
    assert "not trained on" in printed
    assert evaluate.concept_table(scored).count("\n") == 1 + 2 * len(CONCEPTS)


def test_a_run_without_training_records_and_on_its_own_split(made, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(made / "run" / "vanilla.safetensors", tmp_path / "run")
    flags = {"run": tmp_path / "run", "cache": made / "train", "concepts": made / "concepts.json"}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    evaluate.main([*argv, "--device=cpu", "--n-tokens=100"])
    printed = capsys.readouterr().out
    assert "whether trained on is not known" in printed
    assert "| vanilla" in printed
    assert "| matryoshka" not in printed
    written = {path.name for path in (tmp_path / "run").iterdir()}
    figures = {"fvu_by_prefix.png", "density_histograms.png"}
    assert written == {"vanilla.safetensors", "evaluation.json", *figures}
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # Whole batches of rows: the first that holds 100 tokens is the first.
    lines = (made / "train.jsonl").read_text().splitlines()[: evaluate.ROWS_AT_ONCE]
    rows = [json.loads(line)["tok_ids"] for line in lines]
    kept = sum(token not in (BEGIN, PAD) for row in rows for token in row)
    assert results["cross_entropy"]["replaced"] == kept

    again = evaluate.run(config_for(made, tmp_path, cache=str(made / "train"), n_tokens=1))
    assert again["cache"]["held_out"] is False
    assert "TRAINED ON" in evaluate.summary(again)


# ------------------------------------------------------------------------------------- bad input


def refused(config: evaluate.Config) -> str:
    with pytest.raises(UserError) as error:
        evaluate.run(config)
    return str(error.value)


def test_bad_settings_and_paths_are_refused(made, tmp_path):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"run": str(tmp_path)}, "run train_tinystories.py"),
        ({"cache": str(tmp_path)}, "holds no finished cache"),
        ({"n_tokens": 0}, "--n-tokens is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"min_precision": 1.1}, "--min-precision must be between 0 and 1, got 1.1"),
        ({"min_precision": float("nan")}, "--min-precision must be between 0 and 1, got nan"),
        ({"model": "nowhere.pt"}, "nowhere.pt"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"concepts": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"device": "toaster"}, "--device toaster"),
        ({"out": "/dev/null/x"}, "--out /dev/null/x"),
    ]
    for changed, named in bad:
        assert named in refused(config_for(made, tmp_path / "out", **changed))
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        ('{"concepts": {"a": [1]}}', "expected"),
        ('{"concepts": {"a": {"words": []}}}', "expected"),
        ('{"concepts": {}}', "no concepts"),
        ('{"concepts": {"a": {"ids": []}}}', "'a' needs a list"),
        ('{"concepts": {"a": {"ids": ["x"]}}}', "'a' needs a list"),
        ('{"concepts": {"a": {"ids": [3, 10000]}}}', "token id 10000 is out of the vocabulary"),
        ('{"concepts": {"a": {"ids": [-1]}}}', "token id -1 is out of the vocabulary"),
    ],
)
def test_bad_concepts_are_refused(made, tmp_path, text, named):
    (tmp_path / "concepts.json").write_text(text)
    config = config_for(made, tmp_path / "out", concepts=str(tmp_path / "concepts.json"))
    assert named in refused(config)


def test_a_cache_that_does_not_fit_is_refused(made, tmp_path):
    write_model(tmp_path / "other.pt", d_model=D_MODEL, d_mlp=24, seed=9)
    other = config_for(made, tmp_path / "out", model=str(tmp_path / "other.pt"))
    assert "weights_hash" in refused(other)

    def cache(name: str, **changed: Any) -> str:
        settings = {
            "model": str(made / "model.pt"),
            "dataset": str(made),
            "split": "validation",
            "layer": LAYER,
            "device": "cpu",
            "out": str(tmp_path / name),
        }
        cache_activations.run(cache_activations.Config(**{**settings, **changed}))
        return str(tmp_path / name)

    def refusal(folder: str) -> str:
        return refused(config_for(made, tmp_path / "out", cache=folder))

    assert "its layer is 0, expected 1" in refusal(cache("layer", layer=0))
    assert "its weights_hash" in refusal(cache("model", model=str(tmp_path / "other.pt")))
    assert "1 rows: too few" in refusal(cache("small", tokens=3))
    write_model(tmp_path / "wide.pt", d_model=32, d_mlp=24)
    wide = refusal(cache("wide", model=str(tmp_path / "wide.pt")))
    assert "d_model is 16" in wide
    assert "32" in wide


def test_another_dataset_is_refused(made, tmp_path):
    write_dataset(tmp_path / "other", 61, split="validation", seq=SEQ, seed=2)
    named = refused(config_for(made, tmp_path / "out", dataset=str(tmp_path / "other")))
    assert "tokens differ after the first 0" in named
    lines = (made / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "validation.jsonl").write_text("".join(lines[:20]))
    named = refused(config_for(made, tmp_path / "out", dataset=str(tmp_path / "short")))
    assert "it ends after" in named


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "vanilla.safetensors"])
def test_a_damaged_run_is_refused(made, tmp_path, name):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_text('{"step"')
    assert name in refused(config_for(made, tmp_path / "out", run=str(tmp_path / "run")))


def cache_of(made: Path, to: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the validation cache whose activations, [n, d_model], are `change`d."""
    shutil.copytree(made / "validation", to)
    cache = ActivationCache(to)
    acts = change(cache.acts(0, cache.n_tokens)).to(cache.dtype).contiguous()
    manifest = json.loads((to / "manifest.json").read_text())
    for shard in manifest["shards"]:
        mine, acts = acts[: shard["n_tokens"]], acts[shard["n_tokens"] :]
        (to / f"{shard['name']}.acts").write_bytes(mine.view(torch.uint8).numpy().tobytes())
        shard["acts_sha256"] = hashlib.sha256(mine.view(torch.uint8).numpy()).hexdigest()
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_identical_activations_are_refused(made, tmp_path, value):
    cache = cache_of(made, tmp_path / "cache", lambda acts: torch.full_like(acts, value))
    named = refused(config_for(made, tmp_path, cache=str(cache)))
    assert "all the same: FVU is not defined" in named
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused(made, tmp_path, value):
    def broken(acts: torch.Tensor) -> torch.Tensor:
        acts[123, 4] = value
        return acts

    cache = cache_of(made, tmp_path / "cache", broken)
    named = refused(config_for(made, tmp_path, cache=str(cache)))
    assert "activation 123 is not finite" in named


def test_reconstructions_that_are_not_finite_are_refused(made, tmp_path):
    sae = SAE.load(made / "run" / "vanilla.safetensors").requires_grad_(False)
    sae.W_dec.fill_(3e38)
    (tmp_path / "run").mkdir()
    sae.save(tmp_path / "run" / "vanilla.safetensors")
    named = refused(config_for(made, tmp_path / "out", run=str(tmp_path / "run")))
    assert "reconstructions" in named
    assert "not finite" in named


def test_a_damaged_shard_is_refused(made, tmp_path):
    shutil.copytree(made / "validation", tmp_path / "cache")
    path = sorted((tmp_path / "cache").glob("*.acts"))[1]
    raw = bytearray(path.read_bytes())
    raw[77] ^= 1
    path.write_bytes(raw)
    named = refused(config_for(made, tmp_path / "out", cache=str(tmp_path / "cache")))
    assert f"shard {path.stem} is damaged" in named


def test_moments_of_activations_far_from_0_are_those_of_float64():
    x = 1e4 + 1e-2 * randn(500, 3)
    moments = evaluate.Moments()
    for part in x.split(120):
        moments.add(part)
        moments.add(part[:0])
    exact = x.double()
    assert moments.n == 500
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-15, atol=0)
    expected = (exact - exact.mean(0)).square().sum().item()
    assert moments.variance == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("spread", "constant"), [(1e-8, True), (1e-4, False), (1.0, False)])
def test_moments_are_constant_where_float32_tells_nothing_apart(spread, constant):
    """By the variance's share of the mean square, whatever the units: 1e-16, 1e-8, 0.5."""
    for unit in (1e-20, 1.0, 1e20):
        moments = evaluate.Moments()
        moments.add(unit * (1 + spread * randn(500, 3, dtype=torch.float64)))
        assert moments.is_constant is constant
    assert evaluate.Moments().is_constant


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_norms_spread_is_the_sorted_lists(seed, n):
    norms = randn(n, seed=seed, dtype=torch.float64).exp()
    norms[0] *= 1000
    found = evaluate.norm_spread(norms)
    ordered = sorted(norms.tolist())
    at = [0.5 * (n - 1), 0.999 * (n - 1)]
    median, high = (
        ordered[int(i)] + (i % 1) * (ordered[min(int(i) + 1, n - 1)] - ordered[int(i)]) for i in at
    )
    assert found["median"] == pytest.approx(median)
    assert found["p99_9_over_median"] == pytest.approx(high / median)
    assert found["max_over_median"] == pytest.approx(ordered[-1] / median)
    assert found["outliers"] == sum(norm > 10 * median for norm in ordered)


def test_the_spread_of_norms_that_are_mostly_0():
    found = evaluate.norm_spread(torch.tensor([0.0, 0.0, 0.0, 5.0]).double())
    assert found == {
        "median": 0.0,
        "p99_9_over_median": None,
        "max_over_median": None,
        "outliers": 0,
    }


def test_fvu_without_the_tokens_that_decide_it_is_said(made, tmp_path):
    """Five tokens of 300 times the norm: they are reconstructed ill, and nothing else counts."""

    def heavy(acts: torch.Tensor) -> torch.Tensor:
        acts[100:105] *= -300
        return acts

    cache_path = cache_of(made, tmp_path / "cache", heavy)
    results = evaluate.run(config_for(made, tmp_path / "out", cache=str(cache_path)))
    cache = ActivationCache(cache_path)
    x = cache.acts(0, cache.n_tokens).float()
    norms = x.double().norm(dim=1)
    keep = norms <= 10 * norms.quantile(0.5)
    assert results["norms"]["outliers"] == int((~keep).sum()) == 5
    assert results["norms"]["max_over_median"] == pytest.approx(
        (norms.max() / norms.quantile(0.5)).item()
    )
    printed = evaluate.summary(results)
    assert f"FVU IS DECIDED BY 5 OF {len(x):,} TOKENS" in printed
    for result in results["runs"]:
        sae = SAE.load(made / "run" / f"{result['sae']}.safetensors").requires_grad_(False)
        alone = fvu(x[keep], sae(x[keep])).item()
        assert result["fvu_without_outliers"] == pytest.approx(alone, rel=1e-4)
        assert result["fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-4)
        assert result["fvu"] != pytest.approx(alone, rel=0.1)
        assert f"{alone:.4f} {result['sae']}" in printed


def test_where_no_token_decides_fvu_only_the_norms_are_said(scored):
    assert scored["norms"]["outliers"] == 0
    for result in scored["runs"]:
        assert result["fvu_without_outliers"] == result["fvu"]
    last = evaluate.summary(scored).splitlines()[-1]
    assert last.startswith("Norms: the 99.9th percentile is ")
    assert f"{scored['norms']['max_over_median']:.2f} times." in last
    few = {**scored, "norms": {**scored["norms"], "outliers": 1}}
    assert "DECIDED" not in evaluate.norm_line(few)  # it makes no difference
    few["runs"] = [{**run, "fvu_without_outliers": 1.2 * run["fvu"]} for run in few["runs"]]
    assert "DECIDED" in evaluate.norm_line(few)
    few["runs"] = [{**run, "fvu_without_outliers": None} for run in few["runs"]]
    assert "not defined vanilla" in evaluate.norm_line(few)
    zero = {**scored["norms"], "p99_9_over_median": None}
    assert "is 0" in evaluate.norm_line({**scored, "norms": zero})


# ------------------------------------------------------------------------ what was trained on


def test_a_cache_was_trained_on_by_its_content_however_its_path_is_spelled(made, tmp_path):
    trained = evaluate.training_results(made / "run")

    def held_out(folder: Path, **make: Any) -> bool | None:
        cache = ActivationCache(folder)
        cache.make.update(make)
        return evaluate.is_held_out(cache, trained)

    assert held_out(made / "validation") is True
    assert held_out(made / "train") is False
    assert held_out(made / "train", dataset="elsewhere", split="other") is False  # by checksums
    spelled = str(made / "train" / ".." / ".." / made.name)
    assert held_out(made / "validation", dataset=spelled, split="train") is False
    (tmp_path / "link").symlink_to(made)
    assert held_out(made / "validation", dataset=str(tmp_path / "link"), split="train") is False
    assert held_out(made / "validation", dataset="elsewhere") is True  # no checksum in common

    trained["config"]["cache"] = "gone"
    assert held_out(made / "train", dataset=spelled) is False
    assert held_out(made / "validation") is True  # another split of the same dataset
    assert held_out(made / "train", dataset="elsewhere") is None  # it might be a copy
    acts = [shard.acts_sha256 for shard in ActivationCache(made / "train").shards]
    trained["cache"]["acts_sha256"] = acts[-1:]
    assert held_out(made / "train", dataset="elsewhere") is False
    assert held_out(made / "validation", dataset="elsewhere") is True
    assert evaluate.is_held_out(ActivationCache(made / "train"), {}) is None


def test_a_training_cache_that_was_made_anew_since_says_nothing(made):
    trained = evaluate.training_results(made / "run")
    assert evaluate.trained_shards(trained)
    trained["cache"]["make"]["layer"] = 7
    assert evaluate.trained_shards(trained) == set()


def test_an_older_runs_file_is_left_out_and_another_file_is_refused(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    results = json.loads((run / "results.json").read_text())

    def scored_names() -> list[str]:
        (run / "results.json").write_text(json.dumps(results))
        trained = evaluate.training_results(run)
        return list(evaluate.load_saes(run, torch.device("cpu"), trained))

    for one in results["runs"]:
        path = run / f"{one['sae']}.safetensors"
        one["file_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert scored_names() == ["matryoshka", "vanilla"]
    assert capsys.readouterr().err == ""
    whole, results["runs"] = results["runs"], results["runs"][:1]
    left_out = {"matryoshka": "vanilla", "vanilla": "matryoshka"}[results["runs"][0]["sae"]]
    assert scored_names() == [results["runs"][0]["sae"]]
    error = capsys.readouterr().err
    assert f"not scored: {run / left_out}.safetensors is not of this run" in error

    results["runs"] = whole
    whole[0]["file_sha256"] = "0" * 64
    with pytest.raises(UserError, match="its checksum is another"):
        scored_names()
    (run / f"{whole[0]['sae']}.safetensors").unlink()
    assert scored_names() == [whole[1]["sae"]]
    assert "is missing" in capsys.readouterr().err
    results["runs"] = whole[:1]
    with pytest.raises(UserError, match="no SAE of the run"):
        scored_names()


# ------------------------------------------------------------------------------ files, full disks


@pytest.mark.parametrize(
    "name",
    ["results.json", "metrics.jsonl", "matryoshka.safetensors", "evaluation.json", "concepts.json"],
)
def test_a_folder_where_a_file_should_be_is_refused(made, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    changed = {"concepts": str(run / name)} if name == "concepts.json" else {}
    assert str(run / name) in refused(config_for(made, run, run=str(run), **changed))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "[]"),
        ("results.json", "null"),
        ("results.json", "[" * 100_000),
        ("results.json", '{"config": {"target_l0": 1}, "cache": {"make": {}}, "runs": []}'),
        (
            "results.json",
            '{"config": {"target_l0": 1, "cache": ""}, "cache": {"make": {}}, "runs": [3]}',
        ),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", "[1, 2]\n"),
        ("metrics.jsonl", "\xff"),
        ("metrics.jsonl", '{"sae": "vanilla", "step": 1, "l0": "a", "fvu": 1}\n'),
        (
            "metrics.jsonl",
            '{"sae": "other", "step": 1, "l0": 1, "fvu": 1, "sparsity_weight": 1}\n',
        ),
    ],
)
def test_a_foreign_file_is_refused(made, tmp_path, name, text):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / name).write_bytes(text.encode("latin-1"))
    named = refused(config_for(made, tmp_path / "out", run=str(run)))
    assert str(run / name) in named
    assert "\n" not in named


def test_metrics_that_lack_a_line_are_refused(made, tmp_path):
    lines = (made / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="a line an SAE"):
        evaluate.training_curves(path)
    path.write_text("".join(lines[:-2]))
    steps, curves = evaluate.training_curves(path)
    assert len(steps) == len(curves["vanilla"]["fvu"]) == len(lines) // 2 - 1


def test_a_full_disk_is_one_line_and_loses_no_results(made, tmp_path, monkeypatch, capsys):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = [f"--run={made / 'run'}", f"--cache={made / 'validation'}", f"--out={tmp_path}"]
    argv += [f"--concepts={made / 'concepts.json'}", "--device=cpu", "--n-tokens=1"]
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(argv)
    printed, error = capsys.readouterr()
    assert stopped.value.code == 2
    expected = f"error: cannot write {tmp_path / 'evaluation.json'} (No space left on device)"
    assert error.splitlines()[-1] == expected
    assert "| matryoshka" in printed
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_of_other_formats_are_those_of_their_numbers_in_float64(dtype):
    x, x_hat = (3 + randn(40, 6)).to(dtype), (3 + randn(40, 6, seed=1)).to(dtype)
    expected = fvu_by_loop(x.double().tolist(), x_hat.double().tolist())
    assert fvu(x, x_hat).item() == pytest.approx(expected, rel=1e-12)
    assert fvu(x, x_hat.float()).item() == pytest.approx(expected, rel=1e-12)
    assert fvu(x, x_hat).dtype == l0(x).dtype == dead_share(x).dtype == torch.float64
    cosines = decoder_cosines(x, x_hat)
    torch.testing.assert_close(cosines, decoder_cosines(x.double(), x_hat.double()))
    moments, doubled = evaluate.Moments(), evaluate.Moments()
    moments.add(x)
    doubled.add(x.double())
    assert moments.variance == doubled.variance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saes_of_other_formats_are_scored_in_float32(made, tmp_path, dtype):
    sae = SAE.load(made / "run" / "vanilla.safetensors").to(dtype)
    (tmp_path / "run").mkdir()
    sae.save(tmp_path / "run" / "vanilla.safetensors")
    [found] = evaluate.run(config_for(made, tmp_path, run=str(tmp_path / "run")))["runs"]
    x = ActivationCache(made / "validation").acts(0, 10**9).float()
    assert found["fvu"] == pytest.approx(fvu(x, sae.float()(x)).item(), rel=1e-5)


def test_samples_without_a_dimension_for_them_are_refused():
    with pytest.raises(ValueError, match="must be equal"):
        fvu(torch.ones(3), torch.ones(3))


def test_cosines_of_rows_whose_square_underflows():
    tiny = torch.tensor([[3e-200, 4e-200]], dtype=torch.float64)
    assert decoder_cosines(tiny, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.6)


# ---------------------------------------------------------------------------------------- concepts


def test_ids_of_words_are_looked_up(tmp_path):
    texts = ["\u0120dog", "dog", "\u0120Dog", "Dog", "\u0120dogs", ".", "\u0120.", "\u0120cat"]
    (tmp_path / "encoder.json").write_text(json.dumps({t: 10 * i for i, t in enumerate(texts)}))
    to_gpt2 = [30, 70, 10, 40, 0, 50, 60, 20, 99_999]  # [PAD] and the like have none
    path = tmp_path / "concepts.json"
    content: dict[str, Any] = {
        "note": "a note",
        "concepts": {"dog": {"words": ["dog"]}, "more": {"words": [".", "cat"], "ids": [7]}},
    }
    path.write_text(json.dumps(content))
    evaluate.write_concept_ids(path, tmp_path / "encoder.json", to_gpt2)
    assert evaluate.load_concepts(path) == {"dog": [0, 4, 7], "more": [1, 5, 6]}
    written = json.loads(path.read_text())
    assert written["note"] == "a note"
    assert written["concepts"]["dog"]["words"] == ["dog"]
    content["concepts"]["dog"]["words"] = ["zebra"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="'zebra' is not one token"):
        evaluate.write_concept_ids(path, tmp_path / "encoder.json", to_gpt2)


def test_the_repositorys_concepts_are_of_tiny_models_vocabulary():
    concepts = evaluate.load_concepts(Path(evaluate.__file__).with_name("concepts.json"))
    members = evaluate.membership(concepts, 10_000)
    assert members.sum(1).tolist() == [len(ids) for ids in concepts.values()]  # none twice
    assert not members[:, BEGIN:].any()
    names = list(concepts)
    female, male = names.index("female names"), names.index("male names")
    assert not (members[female] & members[male]).any()
