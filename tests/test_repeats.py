"""Firings that repeat those of another latent of nearly the same direction."""

import json

import pytest
import torch
from cache_factory import write_cache

from sae import SAE, seeded_generator
from studies import repeats


def brute_force(added, W_dec, cosine):
    rows = W_dec.double() / W_dec.double().norm(dim=1, keepdim=True)
    found = torch.zeros(added.shape, dtype=torch.bool)
    for token in range(len(added)):
        for j in range(len(W_dec)):
            for i in range(len(W_dec)):
                alike = i != j and float(rows[i] @ rows[j]) > cosine
                if alike and 0 < added[token, j] < added[token, i]:
                    found[token, j] = True
    return found


@pytest.mark.parametrize("cosine", [0.2, 0.7])
def test_repeats_are_those_of_brute_force(cosine):
    generator = seeded_generator(0)
    added = torch.rand(40, 12, generator=generator) - 0.5
    added.relu_()
    W_dec = torch.randn(12, 3, generator=generator)
    found = repeats.repeated(added, W_dec, cosine)
    assert found.any()
    assert torch.equal(found, brute_force(added, W_dec, cosine))


def test_latents_of_one_direction_are_counted_and_others_not(tmp_path, capsys):
    cache = write_cache(tmp_path / "cache", 300, d_model=8)
    same = SAE(8, 4).requires_grad_(False)
    same = same.with_tensors(
        W_enc=same.W_enc * 0, b_enc=torch.tensor([4.0, 3, 2, 1]), W_dec=torch.ones(4, 8)
    )
    other = same.with_tensors(W_dec=torch.eye(8)[:4].contiguous())
    same.save(tmp_path / "same.safetensors")
    other.save(tmp_path / "other.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("same", "other")]
    out = tmp_path / "repeats.json"
    repeats.main(["--cache", str(cache), "--saes", *paths, "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    assert [run["repeats"] for run in runs] == [3, 0]
    assert [run["l0"] for run in runs] == [4, 4]
    assert "75.0%" in capsys.readouterr().out


def test_a_cache_of_another_width_is_one_line(tmp_path, capsys):
    cache = write_cache(tmp_path / "cache", 50, d_model=8)
    SAE(16, 4).save(tmp_path / "sae.safetensors")
    with pytest.raises(SystemExit) as stopped:
        repeats.main(["--cache", str(cache), "--saes", str(tmp_path / "sae.safetensors")])
    assert stopped.value.code == 2
    assert "d_model 16" in capsys.readouterr().err
