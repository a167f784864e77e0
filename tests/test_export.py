"""export.py as one calls it: what it prints, what it proves on, and bad input in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_factory import write_cache
from sae_zoo import D_MODEL, N_LATENTS, any_sae
from tiny_factory import write_dataset, write_model

import export
from matryoshka import convert
from sae import SAE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An SAE of each activation, a cache of their width, and one of another."""
    folder = tmp_path_factory.mktemp("world")
    for name, d_model in (("cache", D_MODEL), ("wide", 2 * D_MODEL)):
        made = folder / name
        made.mkdir()
        write_model(made / "model.pt", d_model=d_model, d_mlp=24)
        write_dataset(made, 40, split="train", seq=16, seed=0)
        write_cache(made, "train")
    for activation in ("relu", "topk", "batchtopk", "jumprelu"):
        any_sae(activation, 1).save(folder / f"{activation}.safetensors")
    SAE(D_MODEL, N_LATENTS, activation="batchtopk", k=3).save(folder / "new.safetensors")
    (folder / "text.txt").write_text("nothing")
    (folder / "empty").mkdir()
    relu = SAE.load(folder / "relu.safetensors").requires_grad_(False)
    convert.export(relu, "saelens", folder / "lens", convert.noise(relu))
    shutil.copytree(folder / "lens", folder / "both")
    (folder / "both" / "ae.pt").touch()
    (folder / "full").mkdir()
    (folder / "full" / "other").write_text("kept")
    return folder


def export_line(world: Path, out: Path, line: str) -> None:
    export.main(line.format(W=world, O=out).split())


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_there_and_back_gives_the_same_sae(activation, world, tmp_path, capsys):
    line = f"--sae {{W}}/{activation}.safetensors --to {{T}} --out {{O}}/there"
    for target in ("saelens", "dictionary-learning"):
        out = tmp_path / target
        export_line(world, out, line.replace("{T}", target) + " --cache {W}/cache/train")
        back = f"--sae {{O}}/there --from {target} --out {{O}}/back.safetensors"
        export_line(world, out, back)
        back = SAE.load(out / "back.safetensors")
        sae = SAE.load(world / f"{activation}.safetensors")
        assert (back.activation, back.k, back.about) == (sae.activation, sae.k, sae.about)
    printed = capsys.readouterr().out
    assert "activations of" in printed
    assert "Gaussian noise" in printed
    assert "cannot decode a prefix" in printed


def test_from_chooses_where_a_folder_holds_two(world, tmp_path):
    export_line(world, tmp_path, "--sae {W}/both --from saelens --out {O}/back.safetensors")
    assert SAE.load(tmp_path / "back.safetensors").n_latents == N_LATENTS
    line = "--sae {W}/lens --from saelens --to dictionary-learning --out {O}/there"
    export_line(world, tmp_path, line)
    assert convert.formats_of(tmp_path / "there") == ["dictionary-learning"]


def test_widths_are_kept_as_groups(world, tmp_path):
    line = "--sae {W}/relu.safetensors --to dictionary-learning --widths 2 5 20 --out {O}/there"
    export_line(world, tmp_path, line)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["trainer"]["group_sizes"] == [2, 3, 15]


BAD = [
    ("--sae {W}/nothing --out {O}/o", "nothing"),
    ("--sae {W}/text.txt --out {O}/o", "text.txt"),
    ("--sae {W}/empty --out {O}/o", "holds no SAE: expected sae_weights"),
    ("--sae {W}/new.safetensors --out {O}/o", "train it first"),
    ("--sae {W}/relu.safetensors --out {W}/full", "is not empty"),
    ("--sae {W}/relu.safetensors --out {W}/text.txt", "is not empty"),
    ("--sae {W}/relu.safetensors --out {W}/text.txt/o", "cannot be written"),
    ("--sae {W}/relu.safetensors --to matryoshka --out {W}/topk.safetensors", "is there already"),
    ("--sae {W}/relu.safetensors --to gguf --out {O}/o", "--to"),
    ("--sae {W}/relu.safetensors --out {O}/o --cache {W}/empty", "no finished cache"),
    ("--sae {W}/relu.safetensors --out {O}/o --cache {W}/wide/train", "d_model"),
    ("--sae {W}/relu.safetensors --out {O}/o --n-tokens 0", "--n-tokens"),
    ("--sae {W}/relu.safetensors --out {O}/o --widths 4 20", "--widths is only for"),
    (
        "--sae {W}/relu.safetensors --to matryoshka --out {O}/o --widths 4 20",
        "--widths is only for",
    ),
    ("--sae {W}/relu.safetensors --push a/b --dry-run --out {O}/o --widths 4 20", "--widths is"),
    ("--sae {W}/relu.safetensors --push a/b --dry-run --out {O}/o --to saelens", "--to saelens"),
    ("--sae {W}/relu.safetensors --from saelens --out {O}/o", "is not a folder of saelens"),
    ("--sae {W}/nothing --from saelens --out {O}/o", "nothing is not a folder of saelens"),
    ("--sae {W}/empty --from sparsify --out {O}/o", "is not a folder of sparsify"),
    ("--sae {W}/lens --from dictionary-learning --out {O}/o", "learning, but of saelens"),
    ("--sae {W}/both --out {O}/o", "SAEs of saelens and dictionary-learning: choose one"),
    ("--sae {W}/lens --from gguf --out {O}/o", "--from"),
    ("--sae {W}/relu.safetensors --to dictionary-learning --out {O}/o --widths 4", "must rise"),
    ("--out {O}/o", "--sae"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(line, words, world, tmp_path, capsys):
    before = sorted(path for path in world.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        export_line(world, tmp_path, line)
    assert ended.value.code == 2
    stderr = capsys.readouterr().err.strip()
    assert stderr.count("\n") == 0
    assert words in stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(path for path in world.rglob("*")) == before


def test_a_file_is_not_replaced(world):
    sae = SAE.load(world / "topk.safetensors")
    assert torch.equal(sae.W_enc, any_sae("topk", 1).W_enc)
