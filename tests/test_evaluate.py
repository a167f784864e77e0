"""The metrics against closed forms, and against loops in float64 written here."""

import hashlib
import itertools
import json
import math
import shutil
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
    for error, prefix in zip(found.tolist(), [1, 2, 4, 8, 13], strict=True):
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
        patch.setattr(evaluate, "BATCH", 100)  # several batches, the last one short
        return evaluate.run(config_for(made, tmp_path_factory.mktemp("scored")))


def test_a_run_scores_as_the_pure_functions_do(made, scored):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    assert len(x) == scored["cache"]["n_tokens"] > 500
    assert [r["sae"] for r in scored["runs"]] == ["matryoshka", "vanilla"]
    for result in scored["runs"]:
        sae = SAE.load(made / "run" / f"{result['sae']}.safetensors").requires_grad_(False)
        acts = sae.encode(x)
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
        fires = sae.encode(x) > 0
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
        ({"min_precision": 1.1}, "--min-precision is 1.1"),
        ({"min_precision": float("nan")}, "--min-precision is nan"),
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


def test_identical_activations_are_refused(made, tmp_path):
    shutil.copytree(made / "validation", tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    for shard in manifest["shards"]:
        acts = tmp_path / "cache" / f"{shard['name']}.acts"
        acts.write_bytes(bytes(acts.stat().st_size))
        shard["acts_sha256"] = hashlib.sha256(acts.read_bytes()).hexdigest()
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    assert "all the same" in refused(config_for(made, tmp_path, cache=str(tmp_path / "cache")))


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
