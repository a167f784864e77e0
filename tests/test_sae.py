"""sae.py: the SAE against its equations, its file, and the loss against a loop in float64."""

import ast
import itertools
import json
import math
import os
import stat
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from core_cases import BATCH, D_MODEL, N_LATENTS, rand, states_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_factory import die_with_parent, fresh_processes
from torch.testing import assert_close

import sae as sae_module
from sae import (
    ACTIVATIONS,
    SAE,
    matryoshka_loss,
    prefix_probabilities,
    sample_prefixes,
    seeded_generator,
)


def test_the_method_is_imported_without_the_rest_of_the_project():
    body = ast.parse(Path(sae_module.__file__).read_text()).body
    imported = {a.name.split(".")[0] for n in body if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in body if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}


# ------------------------------------------------------------------------------- random numbers


def test_streams_of_random_numbers_differ():
    assert sae_module.STREAM_INIT != sae_module.STREAM_PREFIXES
    a, b = (torch.rand(4, generator=seeded_generator(0, stream)) for stream in (0, 1))
    assert not torch.equal(a, b)


def test_no_two_seeds_or_streams_share_a_generator():
    big = 2**32
    keys = [(5,), (5, 0), (5, 1), (5, 1, 0), (5, 0, 1), (51, 0), (big, 5), (-5,)]
    keys += [(5 + 10 * big, 11), (5, 10, 11)]
    drawn = [tuple(torch.rand(2, generator=seeded_generator(*key)).tolist()) for key in keys]
    assert len(set(drawn)) == len(keys)


def test_a_seeds_numbers_are_what_they_were():
    """Results that were published name their seeds."""
    drawn = torch.randint(2**31, (3,), generator=seeded_generator(0, 0)).tolist()
    assert drawn == [313127284, 2069366618, 466853511]


# ------------------------------------------------------------------------------------- prefixes


def test_prefix_probabilities_are_the_formula():
    p = prefix_probabilities(50)
    weights = [math.sqrt(m) - math.sqrt(m - 1) for m in range(1, 50)]
    assert_close(p, torch.tensor(weights, dtype=torch.float64) / sum(weights))


def test_prefixes_are_drawn_by_the_formula_without_replacement():
    """Against every ordered draw of two lengths, enumerated."""
    n_latents, n_draws = 6, 200_000
    p = prefix_probabilities(n_latents).tolist()
    drawn = sample_prefixes(n_latents, 3, seeded_generator(0), n_draws)
    assert (drawn[:, -1] == n_latents).all()
    assert (drawn.diff(dim=1) > 0).all()
    for low, high in itertools.combinations(range(1, n_latents), 2):
        a, b = p[low - 1], p[high - 1]
        exact = a * b / (1 - a) + b * a / (1 - b)
        seen = ((drawn[:, 0] == low) & (drawn[:, 1] == high)).double().mean().item()
        assert abs(seen - exact) < 5 * math.sqrt(exact * (1 - exact) / n_draws)


def test_one_draw_is_a_row():
    assert sample_prefixes(6, 3, seeded_generator(0)).shape == (3,)
    assert sample_prefixes(6, 6, seeded_generator(0)).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("n_draws", [None, 4])
@pytest.mark.parametrize("n_prefixes", [0, -1, 6])
def test_impossible_prefixes_are_refused(n_prefixes, n_draws):
    with pytest.raises(ValueError, match=f"within 1 and 5, got {n_prefixes}"):
        sample_prefixes(5, n_prefixes, seeded_generator(0), n_draws)


# ------------------------------------------------------------------------------------------- SAE


def test_sae_is_its_equations():
    sae = SAE(D_MODEL, N_LATENTS, seed=1).with_tensors(
        mean_norm=torch.tensor(3.0), b_enc=rand(N_LATENTS, seed=2), b_dec=rand(D_MODEL, seed=3)
    )
    x = rand(BATCH, D_MODEL)
    scale = math.sqrt(D_MODEL) / 3.0
    acts = torch.relu(scale * x @ sae.W_enc + sae.b_enc)
    assert_close(sae.encode(x), acts)
    assert_close(sae(x), (acts @ sae.W_dec + sae.b_dec) / scale)
    two = (acts[:, :2] @ sae.W_dec[:2] + sae.b_dec) / scale
    assert_close(sae.decode(acts, prefix=2), two)


def test_an_sae_begins_as_the_original_does():
    sae = SAE(400, 300, seed=1)
    assert abs(sae.W_enc.std().item() * math.sqrt(400) - 1) < 0.02
    assert_close(sae.W_dec.norm(dim=1), torch.full((300,), 0.1))
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec)
    assert_close(cosines, torch.ones(300))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert (float(sae.mean_norm), sae.activation, sae.about) == (1.0, "relu", {})
    assert torch.equal(SAE(400, 300, seed=1).W_enc, sae.W_enc)
    assert not torch.equal(SAE(400, 300, seed=2).W_enc, sae.W_enc)
    assert torch.equal(SAE(400, 300).W_enc, SAE(400, 300, seed=0).W_enc)


def test_a_decoded_prefix_is_of_all_latents_up_to_it():
    """The original would have scored a block's output by itself (defect 4)."""
    sae, x = SAE(D_MODEL, N_LATENTS), rand(BATCH, D_MODEL)
    acts = sae.encode(x)
    for m in range(N_LATENTS + 1):
        parts = [acts[:, j, None] * sae.W_dec[j] for j in range(m)]
        assert_close(sae.decode(acts, prefix=m), sum(parts, torch.zeros_like(x)) / sae.scale)


@pytest.mark.parametrize("prefix", [-1, N_LATENTS + 1])
def test_a_prefix_that_is_none_is_refused(prefix):
    sae = SAE(D_MODEL, N_LATENTS)
    with pytest.raises(ValueError, match=f"prefix must be within 0 and 7, got {prefix}"):
        sae.decode(torch.ones(1, N_LATENTS), prefix=prefix)


@pytest.mark.parametrize("shape", [(), (BATCH,), (2, BATCH), (2, 3, BATCH)])
def test_inputs_may_have_any_leading_shape(shape):
    sae, x = SAE(D_MODEL, N_LATENTS), rand(*shape, D_MODEL)
    flat = x.reshape(-1, D_MODEL)
    acts, x_hat = sae.encode(x), sae(x)
    assert acts.shape == (*shape, N_LATENTS)
    assert x_hat.shape == x.shape
    assert_close(acts.reshape(-1, N_LATENTS), sae.encode(flat))
    assert_close(x_hat.reshape(-1, D_MODEL), sae(flat))


FLOATS = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-6, torch.float64: 1e-6}


@pytest.mark.parametrize("of_input", FLOATS)
@pytest.mark.parametrize("of_sae", FLOATS)
def test_inputs_and_saes_may_be_of_any_float(of_sae, of_input):
    """What comes out has the SAE's dtype, and is right to the coarser one's rounding."""
    exact = SAE(D_MODEL, N_LATENTS).with_tensors(mean_norm=torch.tensor(2.0)).double()
    sae, x = SAE.from_tensors(exact.state_dict()).to(of_sae), rand(BATCH, D_MODEL)
    acts = sae.encode(x.to(of_input))
    x_hat = sae.decode(acts.to(of_input))
    assert (acts.dtype, x_hat.dtype, sae(x.to(of_input)).dtype) == (of_sae,) * 3
    error = 5 * max(FLOATS[of_sae], FLOATS[of_input])
    assert_close(acts.double(), exact.encode(x), rtol=error, atol=error)
    assert_close(x_hat.double(), exact(x), rtol=error, atol=error)


def test_an_sae_of_tensors_has_its_own():
    first = SAE(D_MODEL, N_LATENTS)
    second, third = SAE.from_tensors(first.state_dict()), first.with_tensors()
    with torch.no_grad():
        first.W_enc.zero_()
    assert second.W_enc.any()
    assert third.W_enc.any()


def test_another_sae_with_other_tensors_keeps_the_rest(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "double", lambda preacts, gate: 2 * preacts.relu_())
    sae = SAE.from_tensors(SAE(D_MODEL, N_LATENTS).state_dict(), "double", {"seed": 3})
    other = sae.with_tensors(b_dec=torch.ones(D_MODEL))
    assert (other.activation, other.about) == ("double", {"seed": 3})
    assert (other.b_dec == 1).all()
    assert torch.equal(other.W_dec, sae.W_dec)
    other.about["seed"] = 4
    assert sae.about == {"seed": 3}


def test_an_activation_is_looked_up_by_name(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "softplus", lambda z, _: torch.nn.functional.softplus(z))
    relu, soft = (SAE(D_MODEL, N_LATENTS, activation=name) for name in ("relu", "softplus"))
    x = rand(BATCH, D_MODEL)
    preacts = x * relu.scale @ relu.W_enc
    assert_close(relu.encode(x), preacts.clamp(min=0))
    assert_close(soft.encode(x), (1 + preacts.exp()).log())
    with pytest.raises(
        ValueError,
        match="one of relu, topk, batchtopk, jumprelu, softplus, got 'tanh'",
    ):
        SAE(D_MODEL, N_LATENTS, activation="tanh")


# -------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize("dtype", FLOATS)
def test_save_and_load(tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(ACTIVATIONS, "double", lambda preacts, gate: 2 * preacts.relu_())
    sae = SAE(D_MODEL, N_LATENTS, seed=4, activation="double").to(dtype)
    sae.mean_norm.fill_(2.5)
    sae.about = {"data": "toy", "lr": 0.1}
    sae.save(tmp_path / "sae.safetensors")
    loaded = SAE.load(tmp_path / "sae.safetensors")
    assert states_equal(sae.state_dict(), loaded.state_dict())
    assert (loaded.d_model, loaded.n_latents) == (D_MODEL, N_LATENTS)
    assert (loaded.activation, loaded.about) == ("double", sae.about)
    assert [path.name for path in tmp_path.iterdir()] == ["sae.safetensors"]


def test_a_file_says_what_it_is(tmp_path):
    sae = SAE(D_MODEL, N_LATENTS)
    sae.about = {"seed": 1}
    sae.save(tmp_path / "sae.safetensors")
    with safetensors.safe_open(tmp_path / "sae.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == {"W_enc", "b_enc", "W_dec", "b_dec", "mean_norm"}
    assert metadata.keys() == {"sae"}
    assert json.loads(metadata["sae"]) == {
        "format": 2,
        "activation": "relu",
        "k": None,
        "d_model": D_MODEL,
        "n_latents": N_LATENTS,
        "about": {"seed": 1},
    }


@pytest.mark.parametrize("metadata", [None, {"sae": '{"d_model": 5, "n_latents": 7}'}])
def test_a_file_of_an_earlier_version_is_read(tmp_path, metadata):
    sae = SAE(D_MODEL, N_LATENTS, seed=3)
    save_file(dict(sae.state_dict()), tmp_path / "old.safetensors", metadata=metadata)
    loaded = SAE.load(tmp_path / "old.safetensors")
    assert states_equal(sae.state_dict(), loaded.state_dict())
    assert (loaded.activation, loaded.about) == ("relu", {})


def nan_in(name):
    return lambda t: t | {name: torch.full_like(t[name], torch.nan)}


NOT_SAES = {
    "transposed W_dec": (lambda t: t | {"W_dec": t["W_dec"].T}, r"W_dec must be \[7, 5\], got \[5"),
    "transposed W_enc": (lambda t: t | {"W_enc": t["W_enc"].T}, r"b_enc must be \[5\], got \[7\]"),
    "a short b_dec": (lambda t: t | {"b_dec": t["b_dec"][1:]}, r"b_dec must be \[5\], got \[4\]"),
    "a stack": (
        lambda t: {k: v[None] for k, v in t.items()},
        r"W_enc must be \[d_model, n_latents",
    ),
    "several norms": (lambda t: t | {"mean_norm": torch.ones(1)}, r"mean_norm must be \[\], got"),
    "NaN in W_enc": (nan_in("W_enc"), "W_enc holds values that are not finite"),
    "NaN in b_enc": (nan_in("b_enc"), "b_enc holds values that are not finite"),
    "NaN in W_dec": (nan_in("W_dec"), "W_dec holds values that are not finite"),
    "NaN in b_dec": (nan_in("b_dec"), "b_dec holds values that are not finite"),
    "NaN in the norm": (nan_in("mean_norm"), "mean_norm holds values that are not finite"),
    "infinity": (lambda t: t | {"b_dec": t["b_dec"] + math.inf}, "b_dec holds values that are not"),
    "no norm": (lambda t: t | {"mean_norm": torch.zeros(())}, "mean_norm must be above 0, got 0.0"),
    "integers": (
        lambda t: t | {"b_enc": t["b_enc"].long()},
        "b_enc must hold floats, got torch.int",
    ),
    "a missing tensor": (lambda t: {"W_enc": t["W_enc"]}, "b_enc, W_dec, b_dec, mean_norm missing"),
    "no tensors": (lambda t: {"W": torch.zeros(2)}, "mean_norm missing among W$"),
}


@pytest.mark.parametrize("what", NOT_SAES)
def test_a_file_that_is_no_sae_is_refused_in_one_line(tmp_path, what):
    change, message = NOT_SAES[what]
    path = tmp_path / "sae.safetensors"
    tensors = change(dict(SAE(D_MODEL, N_LATENTS).state_dict()))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=f"is not an SAE's file: .*{message}") as error:
        SAE.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"format": 3}', "format must be at most 2, got 3"),
        ('{"format": "new"}', "format must be at most 2, got 'new'"),
        ('{"format": null}', "format must be at most 2, got None"),
        ('{"activation": "tanh"}', "activation must be one of relu, .*, got 'tanh'"),
        ('{"activation": ["relu"]}', ""),
        ("[1]", "metadata is of another program"),
        ('{"about": [1]}', "metadata is of another program"),
        ("{", ""),
    ],
)
def test_a_file_that_says_what_is_not_known_is_refused_in_one_line(tmp_path, metadata, message):
    path = tmp_path / "sae.safetensors"
    save_file(dict(SAE(D_MODEL, N_LATENTS).state_dict()), path, metadata={"sae": metadata})
    with pytest.raises(ValueError, match=f"is not an SAE's file: .*{message}") as error:
        SAE.load(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        SAE.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        SAE.load(tmp_path / "none")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_files_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        SAE(2, 3).save(tmp_path / "sae.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "sae.safetensors").stat().st_mode) == 0o666 & ~umask


def test_what_cannot_be_saved_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path, sae = tmp_path / "sae.safetensors", SAE(2, 3)
    sae.save(path)
    before = path.read_bytes()
    sae.about = {"no JSON": object()}
    with pytest.raises(TypeError):
        sae.save(path)
    sae.about = {}

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        sae.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sae.safetensors"]


def save_again_and_again(path, ready):
    """In a process of its own, until it is killed."""
    die_with_parent()
    saes = [SAE(200, 3000, seed) for seed in (0, 1)]
    ready.set()
    while True:
        for sae in saes:
            sae.save(path)


@pytest.mark.processes
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "sae.safetensors"
    possible = [SAE(200, 3000, seed).W_enc for seed in (0, 1)]
    SAE(200, 3000, 0).save(path)
    context = fresh_processes()
    for attempt in range(3):
        ready = context.Event()
        process = context.Process(target=save_again_and_again, args=(path, ready))
        process.start()
        assert ready.wait(300)
        time.sleep(0.05 + 0.037 * attempt)
        process.kill()
        process.join()
        assert any(torch.equal(SAE.load(path).W_enc, W_enc) for W_enc in possible)


# ------------------------------------------------------------------------------------------ loss


def loop_loss(x, acts, W_dec, b_dec, lengths, weights, sparsity_weight, sparsity):
    """The loss as the paper writes it down: one reconstruction a prefix, sample by sample."""
    total = 0.0
    for sample in range(len(x)):
        for m, weight in zip(lengths, weights, strict=True):
            x_hat, paid = b_dec.clone(), 0.0
            for j in range(m):
                x_hat = x_hat + acts[sample, j] * W_dec[j]
                c = float(acts[sample, j]) * math.sqrt(float((W_dec[j] ** 2).sum()))
                paid += c if sparsity == "l1" else math.log((c + 0.1) / 0.1)
            error = float(((x[sample] - x_hat) ** 2).sum())
            total += weight * (error + sparsity_weight * paid) / len(x)
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, N_LATENTS), min_size=1, unique=True).map(sorted),
    sparsity_weight=st.floats(0, 3),
    sparsity=st.sampled_from(["l1", "log"]),
    data=st.data(),
)
def test_the_loss_is_the_loop(seed, lengths, sparsity_weight, sparsity, data):
    n = len(lengths)
    weights = data.draw(st.none() | st.lists(st.floats(0, 2), min_size=n, max_size=n))
    x, W_dec, b_dec = (
        rand(*shape, seed=seed + i, dtype=torch.float64)
        for i, shape in enumerate([(4, D_MODEL), (N_LATENTS, D_MODEL), (D_MODEL,)])
    )
    acts = rand(4, N_LATENTS, seed=seed + 9, dtype=torch.float64).relu()
    looped = loop_loss(
        x, acts, W_dec, b_dec, lengths, weights or [1 / n] * n, sparsity_weight, sparsity
    )
    loss = matryoshka_loss(
        x, acts, W_dec, b_dec, torch.tensor(lengths), weights, sparsity_weight, sparsity
    )
    assert loss.shape == ()
    assert float(loss) == pytest.approx(looped, rel=1e-9)


def test_the_loss_has_no_sparsity_unless_asked_and_then_l1():
    x, W_dec, b_dec = rand(4, 5), rand(7, 5, seed=1), rand(5, seed=2)
    acts = rand(4, 7, seed=3).relu()
    plain = matryoshka_loss(x, acts, W_dec, b_dec, [7])
    assert_close(plain, (x - b_dec - acts @ W_dec).square().sum(1).mean())
    priced = matryoshka_loss(x, acts, W_dec, b_dec, [7], sparsity_weight=0.5)
    assert_close(priced - plain, 0.5 * (acts * W_dec.norm(dim=1)).sum(1).mean())


def test_lengths_and_weights_must_be_as_many():
    x, acts, W_dec = rand(4, 5), rand(4, 7), rand(7, 5)
    with pytest.raises(ValueError, match="zip"):
        matryoshka_loss(x, acts, W_dec, torch.zeros(5), [2, 7], [1.0])


def test_one_length_makes_a_vanilla_sae():
    """The mean squared error and L1, with PyTorch's own."""
    x, W_dec, b_dec = rand(4, 5), rand(7, 5, seed=1), rand(5, seed=2)
    acts = rand(4, 7, seed=3).relu()
    loss = matryoshka_loss(x, acts, W_dec, b_dec, [7], sparsity_weight=0.3)
    error = 5 * torch.nn.functional.mse_loss(acts @ W_dec + b_dec, x)
    assert_close(loss, error + 0.3 * (acts @ W_dec.norm(dim=1)).mean())


def test_the_kernels_form_of_the_loss_is_the_loss():
    x, W_dec, b_dec = (
        rand(*shape, seed=i, dtype=torch.float64)
        for i, shape in enumerate([(BATCH, D_MODEL), (N_LATENTS, D_MODEL), (D_MODEL,)])
    )
    acts = rand(BATCH, N_LATENTS, seed=7, dtype=torch.float64).relu()
    lengths, weights = [1, 3, 6, 7], [0.3, 0.1, 0.4, 0.2]
    s = torch.tensor(
        [sum(w for m, w in zip(lengths, weights, strict=True) if m > j) for j in range(N_LATENTS)],
        dtype=torch.float64,
    )
    centred = x - b_dec
    closed = (centred**2).sum(1) - 2 * (s * acts * (centred @ W_dec.T)).sum(1)
    quadratic = torch.minimum(s[:, None], s) * (W_dec @ W_dec.T)
    closed = closed + torch.einsum("bi,bj,ij->b", acts, acts, quadratic)
    closed = closed + 0.3 * (s * acts * W_dec.norm(dim=1)).sum(1)
    assert_close(closed.mean(), matryoshka_loss(x, acts, W_dec, b_dec, lengths, weights, 0.3))
