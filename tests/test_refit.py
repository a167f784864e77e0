"""refit.py against NumPy's least squares, and against any other decoder."""

import numpy as np
import pytest
import torch
from tiny_factory import write_dataset, write_model

import cache_activations
import evaluate
import refit
from refit import refit_decoder
from sae import SAE, seeded_generator


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed, 7))


def make_sae(seed=0):
    sae = SAE(6, 9, seed)
    sae.mean_norm.fill_(2.0)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * rand(9, seed=seed))
    return sae


def test_refit_is_least_squares():
    sae, x = make_sae(), rand(400, 6)
    refitted = refit_decoder(sae, x.split(64), ridge=0.0)
    acts = sae.encode(x).detach().double().numpy()
    design = np.concatenate([acts, np.ones((400, 1))], axis=1)
    target = (x * sae.scale).double().numpy()
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(refitted.W_dec.detach(), expected[:-1], atol=1e-5)
    np.testing.assert_allclose(refitted.b_dec.detach(), expected[-1], atol=1e-5)


def test_no_nudged_decoder_reconstructs_better():
    sae, x = make_sae(1), rand(500, 6, seed=1)
    refitted = refit_decoder(sae, [x])
    best = evaluate.fvu(x, refitted(x)).item()
    assert best < evaluate.fvu(x, sae(x)).item()
    for seed in range(20):
        nudged = SAE.from_tensors(refitted.state_dict())
        with torch.no_grad():
            nudged.W_dec += 0.01 * rand(9, 6, seed=seed)
            nudged.b_dec += 0.01 * rand(6, seed=seed)
        assert evaluate.fvu(x, nudged(x)).item() > best


def test_the_same_latents_fire_and_the_silent_keep_their_rows():
    sae, x = make_sae(2), rand(300, 6, seed=2)
    with torch.no_grad():
        sae.b_enc[4] = -1e3
    refitted = refit_decoder(sae, x.split(100))
    assert torch.equal(refitted.encode(x), sae.encode(x))
    torch.testing.assert_close(refitted.W_dec[4], sae.W_dec[4])


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="no activations"):
        refit_decoder(make_sae(), [])


def test_the_command(tmp_path, capsys):
    write_model(tmp_path / "model.pt")
    write_dataset(tmp_path / "data", 60)
    cache_activations.run(
        cache_activations.Config(
            model=str(tmp_path / "model.pt"),
            dataset=str(tmp_path / "data"),
            tokens=500,
            layer=1,
            out=str(tmp_path / "cache"),
            device="cpu",
        )
    )
    cache = cache_activations.ActivationCache(tmp_path / "cache")
    sae = SAE(cache.d_model, 20)
    x = cache.acts(0, 500).float()
    sae.mean_norm.fill_(x.norm(dim=1).mean())
    sae.save(tmp_path / "sae.safetensors")
    flags = ["--sae", tmp_path / "sae.safetensors", "--cache", tmp_path / "cache"]
    refit.main([*map(str, flags), "--device", "cpu"])
    refitted = SAE.load(tmp_path / "sae_refit.safetensors")
    printed = capsys.readouterr().out
    for one in (sae, refitted):
        assert f"{evaluate.fvu(x, one(x)).item():.4f}" in printed
    assert evaluate.fvu(x, refitted(x)) < evaluate.fvu(x, sae(x))

    for bad, named in (("nowhere", "nowhere"), (tmp_path / "model.pt", "not a safetensors file")):
        with pytest.raises(SystemExit) as stopped:
            refit.main(["--sae", str(bad), "--cache", str(tmp_path / "cache")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert named in error
        assert error.count("\n") == 1
