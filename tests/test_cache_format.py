"""Records on disk: what is in them, earlier formats, and damage."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import as_format_1, config_for, write_sources
from tiny_factory import write_dataset

from cache_activations import run
from matryoshka.cache_format import (
    Record,
    Shard,
    bytes_each,
    read_record,
    shard_name,
    whole_number,
    write_record,
    wrong_size,
)
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_a_finished_cache_of_the_format_before_is_read(sources: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", 100, seq=32)
    config = config_for(sources, tmp_path / "c", dataset=str(data))
    run(config)
    content = ActivationCache(tmp_path / "c").content_hash
    as_format_1(tmp_path / "c")
    cache = ActivationCache(tmp_path / "c")
    cache.verify()
    assert cache.content_hash == content
    assert run(config)["shards_made"] == 0
    with pytest.raises(UserError, match="its layer is 1, expected 2"):
        run(dataclasses.replace(config, layer=2))
    write_dataset(data, 99, seq=32)
    with pytest.raises(UserError, match="its dataset_bytes is"):
        run(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ('{"make": {"format": 1, "dtype": "float16", "d_model": 4}}', "manifest.json is damaged"),
        ('{"make": {"format": 99}}', "format 99: this version reads 1 and 2"),
        ('{"name": "an app", "icons": []}', "manifest.json is damaged, or is not part of a cache"),
        ("[" * 100_000, "manifest.json is damaged"),
    ],
)
def test_a_damaged_manifest(sources: Path, tmp_path: Path, text: str, message: str) -> None:
    run(config_for(sources, tmp_path / "c"))
    (tmp_path / "c" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ActivationCache(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c"))


def without_shards(value: dict[str, Any]) -> None:
    value["shards"] = []


def too_many_tokens(value: dict[str, Any]) -> None:
    value["n_tokens"] += 10**6


def tokens_in_words(value: dict[str, Any]) -> None:
    value["shards"][0]["n_tokens"] = "many"


def shard_elsewhere(value: dict[str, Any]) -> None:
    value["shards"][0]["name"] = "../00000"


def without_width(value: dict[str, Any]) -> None:
    value["make"]["d_model"] = None


def other_type(value: dict[str, Any]) -> None:
    value["make"]["dtype"] = "float8"


def without_rows(value: dict[str, Any]) -> None:
    del value["n_rows"]


@pytest.mark.parametrize("name", ["manifest.json", "00001.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        without_shards,
        too_many_tokens,
        tokens_in_words,
        shard_elsewhere,
        without_width,
        other_type,
        without_rows,
    ],
)
def test_a_record_that_a_reader_could_not_use_is_named(
    sources: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], name: str
) -> None:
    run(config_for(sources, tmp_path / "c"))
    value = json.loads((tmp_path / "c" / name).read_text())
    spoil(value)
    (tmp_path / "c" / name).write_text(json.dumps(value))
    if name == "manifest.json":
        with pytest.raises(UserError, match=f"{name} is damaged"):
            ActivationCache(tmp_path / "c")
    else:
        (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        run(config_for(sources, tmp_path / "c"))


def test_manifest_says_what_the_cache_is(sources: Path, tmp_path: Path) -> None:
    run(config_for(sources, tmp_path / "c"))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["n_rows"] == 100
    assert len(manifest["shards"]) == 4
    assert manifest["n_tokens"] == sum(shard["n_tokens"] for shard in manifest["shards"])
    assert manifest["make"]["layer"] == 1
    assert manifest["make"]["split"] == "train"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = {"format": 2, "tokens": 9, "d_model": 4, "rows_per_shard": 3, "dtype": "bfloat16"}
    shards = [Shard("00000", 0, 3, 5, "a" * 64, "b" * 64), Shard("100000", 3, 4, 0, "c", "d")]
    record = Record(recipe, 5, 4, shards)
    write_record(tmp_path / "manifest.json", record)
    assert read_record(tmp_path / "manifest.json") == record
    assert json.loads((tmp_path / "manifest.json").read_text())["make"] == recipe
    assert bytes_each(recipe) == {"acts": 8, "tokens": 12}
    assert shard_name(8, recipe) == "00002"
    assert shard_name(300_000, recipe) == "100000"


def test_what_is_wrong_with_a_shards_files(tmp_path: Path) -> None:
    shard, each = Shard("00000", 0, 3, 5, "", ""), {"acts": 8, "tokens": 12}
    (tmp_path / "00000.acts").write_bytes(b"x" * 40)
    assert wrong_size(tmp_path, shard, each) == "00000.tokens: No such file or directory"
    (tmp_path / "00000.tokens").write_bytes(b"x" * 60)
    assert wrong_size(tmp_path, shard, each) is None
    for n_bytes in (39, 41, 0):
        (tmp_path / "00000.acts").write_bytes(b"x" * n_bytes)
        found = wrong_size(tmp_path, shard, each)
        assert found == f"00000.acts has {n_bytes} bytes, expected 40"


@pytest.mark.parametrize("value", [0, 6, -1, 2.0, "2", None, float("nan"), float("inf")])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"n must be a whole number between 1 and 5, got {value}"):
        whole_number("n", value, 1, 5)
    assert [whole_number("n", i, 1, 5) for i in (1, np.int64(5))] == [1, 5]
