"""refit.py from end to end, on a small cache."""

import errno
import os
from pathlib import Path

import pytest
import torch
from run_factory import damage_shard, rewrite_acts
from tiny_factory import write_dataset, write_model

import cache_activations
import refit
from matryoshka.cache_reader import ActivationCache
from matryoshka.files import file_sha256
from matryoshka.metrics import fvu
from matryoshka.refit import refit_both, refit_decoder
from sae import SAE


def write_inputs(folder: Path, n_tokens: int = 100) -> tuple[ActivationCache, SAE]:
    """A cache of that many activations of 16 dimensions, and sae.safetensors."""
    write_model(folder / "model.pt", d_model=16, d_mlp=24)
    write_dataset(folder / "data", 60)
    cache_activations.run(
        cache_activations.Config(
            model=str(folder / "model.pt"),
            dataset=str(folder / "data"),
            tokens=n_tokens,
            layer=1,
            out=str(folder / "cache"),
            device="cpu",
        )
    )
    cache = ActivationCache(folder / "cache")
    sae = SAE(cache.d_model, 20)
    sae.mean_norm.fill_(cache.acts(0, n_tokens).float().norm(dim=1).mean())
    sae.about = {"seed": 0}
    sae.save(folder / "sae.safetensors")
    return cache, sae


def flags_for(folder: Path, *more: str) -> list[str]:
    flags = ["--sae", folder / "sae.safetensors", "--cache", folder / "cache", "--device", "cpu"]
    return [*map(str, flags), *more]


def refused(capsys, argv: list[str]) -> str:
    """The one line that the command ends in."""
    with pytest.raises(SystemExit) as stopped:
        refit.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") + error.count("Traceback") == 1
    line = error.splitlines()[-1]  # before it, perhaps a progress bar
    assert line.startswith("error: ")
    return line


def batches_of(cache: ActivationCache) -> list[torch.Tensor]:
    return [batch.acts for batch in cache.sequential(4096)]


def test_the_command_refits_the_decoder(tmp_path, capsys):
    cache, sae = write_inputs(tmp_path, 500)
    refit.main(flags_for(tmp_path))
    refitted = SAE.load(tmp_path / "sae_refit.safetensors")
    assert torch.equal(refitted.W_dec, refit_decoder(sae, batches_of(cache)).W_dec)
    printed, x = capsys.readouterr().out, cache.acts(0, 500).float()
    assert "FVU on 500 activations" in printed
    for one in (sae, refitted):
        assert f"{fvu(x, one(x)).item():.4f}" in printed
    assert fvu(x, refitted(x)) < fvu(x, sae(x))


def test_the_command_refits_the_encoder_as_well_and_the_file_says_of_what(tmp_path, capsys):
    cache, sae = write_inputs(tmp_path, 500)
    refit.main(flags_for(tmp_path, "--encoder", "--ridge", "1e-3", "--out", str(tmp_path / "both")))
    both = SAE.load(tmp_path / "both")
    assert torch.equal(both.W_enc, refit_both(sae, lambda: batches_of(cache), 1e-3).W_enc)
    assert both.about == {
        "seed": 0,
        "refit": {
            "file_sha256": file_sha256(tmp_path / "sae.safetensors"),
            "encoder": True,
            "ridge": 1e-3,
            "n_tokens": 500,
            "acts_sha256": [shard.acts_sha256 for shard in cache.shards],
        },
    }
    refit.main(flags_for(tmp_path, "--n-tokens", "300", "--batch-size", "70"))
    few = SAE.load(tmp_path / "sae_refit.safetensors")
    first = cache.acts(0, 300).float().split(70)
    assert torch.equal(few.W_dec, refit_decoder(sae, first).W_dec)
    assert few.about["refit"]["n_tokens"] == 300


def test_bad_input_is_one_line(tmp_path, capsys):
    _, sae = write_inputs(tmp_path, 500)
    SAE(24, 20).save(tmp_path / "wide.safetensors")
    huge = sae.with_tensors(W_dec=torch.full_like(sae.W_dec, 3e38))
    huge.save(tmp_path / "huge.safetensors")
    with torch.no_grad():
        sae.b_enc[0] = -1e3
    sae.save(tmp_path / "dead.safetensors")
    ours = tmp_path / "sae.safetensors"
    for bad, more, named in (
        ("nowhere", [], "nowhere"),
        (tmp_path / "model.pt", [], "not a safetensors file"),
        (ours, ["--ridge", "inf"], "--ridge is inf"),
        (ours, ["--ridge", "nan"], "--ridge is nan"),
        (ours, ["--ridge", "-1"], "--ridge is -1"),
        (ours, ["--ridge", "1e308"], "the ridge are not"),
        (ours, ["--batch-size", "0"], "--batch-size is 0"),
        (ours, ["--n-tokens", "-3"], "--n-tokens is -3"),
        (ours, ["--n-tokens", "501"], "not 501"),
        (ours, ["--out", str(ours)], "is --sae itself"),
        (ours, ["--out", str(ours / "x")], "--out"),
        (tmp_path, [], "is a folder"),
        (tmp_path / "wide.safetensors", [], "d_model"),
        (tmp_path / "huge.safetensors", [], "not finite"),
        (ours, ["--out", str(tmp_path)], "is a folder"),
        (tmp_path / "dead.safetensors", ["--ridge", "0"], "a larger ridge"),
    ):
        argv = ["--sae", str(bad), "--cache", str(tmp_path / "cache"), "--device", "cpu", *more]
        assert named in refused(capsys, argv)
    assert not (tmp_path / "sae_refit.safetensors").exists()


@pytest.mark.parametrize("encoder", ["--encoder", "--no-encoder"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_a_constant_cache_is_refused(tmp_path, capsys, value, encoder):
    write_inputs(tmp_path)
    rewrite_acts(tmp_path / "cache", lambda acts: torch.full_like(acts, value))
    error = refused(capsys, flags_for(tmp_path, encoder))
    assert "all the same: FVU is not defined" in error
    assert not (tmp_path / "sae_refit.safetensors").exists()


def test_a_damaged_shard_is_refused(tmp_path, capsys):
    write_inputs(tmp_path)
    name = damage_shard(tmp_path / "cache", 0)
    assert f"shard {name} is damaged" in refused(capsys, flags_for(tmp_path))


def test_a_cache_that_fails_while_it_is_read_is_named_once(tmp_path, capsys, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.setattr(
        ActivationCache,
        "verify",
        lambda cache: [path.unlink() for path in cache.folder.glob("*.acts")],
    )
    error = refused(capsys, flags_for(tmp_path))
    assert "on --cache" not in error
    assert error.count(str(tmp_path / "cache")) == 1


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_inputs(tmp_path)
    out = tmp_path / "sae_refit.safetensors"
    out.write_text("older")
    files = set(tmp_path.iterdir())
    monkeypatch.setattr("os.fsync", full)
    error = refused(capsys, flags_for(tmp_path))
    assert f"cannot write {out} (No space left on device)" in error
    assert out.read_text() == "older"
    assert set(tmp_path.iterdir()) == files
