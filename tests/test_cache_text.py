"""Caches of models of `transformers` that read text: what is in them, and what is refused."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_factory import contents
from transformers_factory import (
    D_VOCAB,
    make_documents,
    save_model,
    save_tokenizer,
    write_documents,
)

import cache_activations
from cache_activations import Config, run
from matryoshka.cache_config import rows_of
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import compute_shard
from matryoshka.errors import UserError
from matryoshka.language_models import load_language_model
from matryoshka.sources import Block

KINDS = {"gpt2": "gpt2", "llama": "llama", "bert": "bert"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their tokenizers, and text."""
    folder = tmp_path_factory.mktemp("world")
    for name, kind in KINDS.items():
        save_tokenizer(save_model(name, folder), kind)
    write_documents(folder / "text" / "train.jsonl", make_documents())
    return folder


@pytest.fixture
def config_for(world: Path, tmp_path: Path) -> Callable[..., Config]:
    def config_for(name: str = "gpt2", **settings: Any) -> Config:
        small: dict[str, Any] = {"layer": 1, "context": 16, "tokens": 10**6, "batch_size": 7}
        small |= {"dataset": str(world / "text"), "rows_per_shard": 30, "device": "cpu"}
        small |= {"dtype": "float32", "out": str(tmp_path / "c")}
        return Config(model=str(world / name), **{**small, **settings})

    return config_for


# Each two settings together are always tried once; the other cases are slow together.
PAIRWISE = [
    ("gpt2", "packed", "resid_pre"),
    ("gpt2", "padded", "mlp_out"),
    ("llama", "packed", "mlp_out"),
    ("llama", "padded", "resid_pre"),
    ("bert", "packed", "resid_pre"),
    ("bert", "padded", "mlp_out"),
]
OTHERS = {*itertools.product(KINDS, ("packed", "padded"), ("resid_pre", "mlp_out"))} - {*PAIRWISE}


@pytest.mark.parametrize(
    ("name", "packing", "site"),
    [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(OTHERS))],
)
def test_each_activation_is_that_of_its_row_alone(
    world: Path, config_for: Callable[..., Config], name: str, packing: str, site: str
) -> None:
    result = run(config_for(name, packing=packing, site=site))
    cache = ActivationCache(result["out"])
    cache.verify()
    model = load_language_model(world / name)
    found = next(cache.sequential(10**6))
    n_seen = 0
    for block in rows_of(cache.recipe, model).blocks(0, None, 1):  # a row at a time
        length = 16 if block.is_real is None else int(block.is_real.sum())
        row = torch.from_numpy(block.tok_ids[:, :length])
        alone = model.activations(row, 1, site)[0][torch.from_numpy(block.is_kept[0, :length])]
        here = slice(n_seen, n_seen + len(alone))
        torch.testing.assert_close(found.acts[here], alone, atol=1e-5, rtol=1e-5)
        assert found.tok_ids[here].tolist() == block.tok_ids[block.is_kept].tolist()
        assert found.positions[here].tolist() == np.flatnonzero(block.is_kept[0]).tolist()
        assert set(found.rows[here].tolist()) == {block.first_row}
        n_seen += len(alone)
    assert n_seen == cache.n_tokens == result["tokens"]


def test_the_manifest_says_what_a_reader_needs(
    world: Path, config_for: Callable[..., Config]
) -> None:
    recipe = ActivationCache(run(config_for("llama", site="resid_post"))["out"]).recipe
    model = load_language_model(world / "llama")
    file = world / "text" / "train.jsonl"
    assert recipe.pop("dataset_sha256")
    assert recipe.pop("tokenizer_hash")
    assert recipe == {
        "format": 3,
        "model": str(world / "llama"),
        "weights_hash": model.weights_hash,
        "dataset": str(world / "text"),
        "dataset_revision": None,
        "dataset_bytes": file.stat().st_size,
        "split": "train",
        "tokens": 10**6,
        "layer": 1,
        "dtype": "float32",
        "d_model": 16,
        "keep_begin": False,
        "rows_per_shard": 30,
        "site": "resid_post",
        "model_revision": None,
        "model_dtype": "float32",
        "dataset_config": None,
        "text_column": "text",
        "tokenizer": str(world / "llama"),
        "context": 16,
        "packing": "packed",
        "begin": "auto",
        "special_ids": sorted(model.special_ids),
        "pad_id": model.pad_id,
    }


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float16"])
def test_the_model_runs_in_its_own_dtype(
    world: Path, config_for: Callable[..., Config], model_dtype: str
) -> None:
    cache = ActivationCache(run(config_for(model_dtype=model_dtype, dtype=model_dtype))["out"])
    model = load_language_model(world / "gpt2", dtype=model_dtype)
    first = next(iter(rows_of(cache.recipe, model).blocks(0, None, 7)))
    acts = model.residual(torch.from_numpy(first.tok_ids), 1)[torch.from_numpy(first.is_kept)]
    assert torch.equal(cache.acts(0, len(acts)), acts)


def test_two_equal_commands_give_equal_caches(config_for: Callable[..., Config]) -> None:
    first = run(config_for(tokens=700))
    before = contents(Path(first["out"]))
    shutil.rmtree(first["out"])
    assert run(config_for(tokens=700))["tokens"] == 700
    assert contents(Path(first["out"])) == before
    assert run(config_for(tokens=700))["shards_made"] == 0


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_costs_unfinished_shards_only(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int
) -> None:
    run(config_for(out=str(tmp_path / "whole")))
    expected, n_shards = contents(tmp_path / "whole"), len(list(tmp_path.glob("whole/*.acts")))
    calls: list[Block] = []

    def dies(block: Block, *settings: Any) -> Any:
        calls.append(block)
        if len(calls) == call:
            raise KeyboardInterrupt
        return compute_shard(block, *settings)

    with monkeypatch.context() as patch:
        patch.setattr("matryoshka.cache_writer.compute_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config_for())
    assert run(config_for())["shards_made"] == n_shards - (call - 1)
    assert contents(tmp_path / "c") == expected


def test_text_that_has_changed_is_noticed(
    world: Path, config_for: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file by its checksum; on the hub, by the tokens of finished shards."""
    file = write_documents(tmp_path / "train.jsonl", make_documents())
    config = config_for(dataset=str(file))
    run(config)
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "00002.json").unlink()
    write_documents(file, make_documents()[::-1])
    with pytest.raises(UserError, match="holds another cache: its dataset_sha256 is"):
        run(config)
    monkeypatch.setattr("matryoshka.documents.hash_of_files", lambda files: "the same")
    shutil.rmtree(tmp_path / "c")
    run(config)
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "00002.json").unlink()
    write_documents(file, make_documents())
    with pytest.raises(
        UserError, match=r"rows 0 to 29 of .* have changed since shard 00000 was made"
    ):
        run(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "attn_out"}, "its site is resid_pre, expected attn_out"),
        ({"layer": 2}, "its layer is 1, expected 2"),
        ({"context": 15}, "its context is 16, expected 15"),
        ({"packing": "padded"}, "its packing is packed, expected padded"),
        ({"begin": "always"}, "its begin is auto, expected always"),
        ({"keep_begin": True}, "its keep_begin is False, expected True"),
        ({"model_dtype": "bfloat16"}, "its weights_hash is"),
        ({"tokenizer": "llama"}, "its tokenizer_hash is"),
    ],
)
def test_another_cache_is_refused_and_untouched(
    world: Path, config_for: Callable[..., Config], tmp_path: Path, change: Any, message: str
) -> None:
    run(config_for())
    before = contents(tmp_path / "c")
    if "tokenizer" in change:
        change = {"tokenizer": str(world / "llama")}
    with pytest.raises(UserError, match=message):
        run(config_for(**change))
    assert contents(tmp_path / "c") == before


def test_rows_of_another_tokenizer_are_refused(
    world: Path, config_for: Callable[..., Config]
) -> None:
    recipe = ActivationCache(run(config_for())["out"]).recipe
    model = load_language_model(world / "gpt2", tokenizer=str(world / "llama"))
    with pytest.raises(UserError, match="is not the one that the cache was made with"):
        rows_of(recipe, model)


@pytest.fixture(scope="module")
def wrong(world: Path) -> Path:
    """Beside the good world, what is wrong in one way each."""
    save_model("phi", world)  # without a tokenizer
    save_tokenizer(world / "bare", "bare")
    (world / "empty.jsonl").write_text("")
    (world / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (world / "numbers.jsonl").write_text('{"text": 3}\n')
    (world / "nothing").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(world / "gpt2", world / f"no_{name}").joinpath(name).unlink()
    wide = shutil.copytree(world / "gpt2", world / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": D_VOCAB + 1}))
    return world


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model {W}/nowhere --layer 1", "no weights at"),
        ("--model nowhere --layer 1", "no language model nowhere .*HF_HUB_OFFLINE=1 and HF_HOME"),
        ("--model some/where --layer 1", "no language model some/where .*HF_HUB_OFFLINE=1"),
        ("--model {W}/nothing --layer 1", "holds neither"),
        ("--model {W}/no_config.json --layer 1", "holds neither"),
        ("--model {W}/no_model.safetensors --layer 1", "no language model .* can be loaded"),
        ("--model {W}/wide --layer 1", "no language model .* can be loaded"),
        ("{OK} --layer 4", "layer 4 is not there: this model has 0 to 3"),
        ("{OK} --layer 3 --site mlp_out", "layer 3 is not there: .* 0 to 2 with site mlp_out"),
        ("{OK} --site resid_mid", "--site"),
        ("{OK} --model-dtype float8", "--model-dtype"),
        ("{OK} --context 33", "--context must be at most 32, which is what .*gpt2 takes, got 33"),
        ("{OK} --context 0", "--context must be a whole number between 1"),
        ("{OK} --packing loose", "--packing"),
        ("{OK} --model {W}/phi", "phi has no tokenizer: give --tokenizer"),
        ("{OK} --tokenizer {W}/nothing", "no tokenizer .*nothing"),
        ("{OK} --tokenizer {W}/bare", "no token that ends or begins a text"),
        ("{OK} --tokenizer {W}/bare --packing padded --begin always", "no token that begins"),
        ("{OK} --dataset {W}/nothing", "nothing holds no train.jsonl, .parquet or .txt"),
        ("{OK} --dataset {W}/nowhere.jsonl", "is neither a file or folder here"),
        ("{OK} --dataset some/text", "cannot read some/text .*HF_HUB_OFFLINE=1 and HF_HOME"),
        ("{OK} --dataset {W}/empty.jsonl", "cannot read .*empty.jsonl|holds nothing to cache"),
        ("{OK} --dataset {W}/blank.jsonl", "blank.jsonl holds nothing to cache"),
        ("{OK} --dataset {W}/numbers.jsonl", "column text holds 3, expected text"),
        ("{OK} --text-column story", "no column story, only text, n; give --text-column"),
        ("{OK} --split test", "holds no test.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, words: str
) -> None:
    ok = f"--model {wrong}/gpt2 --layer 1 --context 16 --dataset {wrong}/text"
    line = argv.format(W=wrong, OK=ok)
    with pytest.raises(SystemExit) as ended:
        cache_activations.main([*line.split(), "--out", str(tmp_path / "c"), "--device", "cpu"])
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(words, said[0])
    assert not list(tmp_path.glob("c/*.json"))
