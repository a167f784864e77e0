"""The script: its settings, what it says, what it does with a folder that has a cache."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from cache_factory import D_MODEL, config_for, contents, kept_tokens, write_sources
from tiny_factory import make_rows, write_rows

import cache_activations
from cache_activations import Config, result_table, run
from matryoshka import files
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.files import one_writer
from matryoshka.tiny_model import TinyModel

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_says_how_many_there_were(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(sources, tmp_path / "c")
    argv = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in dataclasses.asdict(config).items()
        if value is not None and not isinstance(value, bool)
    ]
    cache_activations.main(argv)
    there_were = len(kept_tokens(make_rows(100, seq=32)))
    assert f"ends after {there_were:,} activations: 1,000,000 were asked" in capsys.readouterr().out
    cache_activations.main(argv)
    assert "nothing was computed" in capsys.readouterr().out


def test_a_complete_cache_is_recognised(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_for(sources, tmp_path / "c"))
    before = contents(tmp_path / "c")

    def never(*args: object) -> None:
        raise AssertionError("a complete cache needs no rows and no model")

    monkeypatch.setattr(TinyModel, "residual", never)
    monkeypatch.setattr(datasets, "load_dataset", never)
    assert run(config_for(sources, tmp_path / "c"))["shards_made"] == 0
    assert run(config_for(sources, tmp_path / "c", tokens=5))["shards_made"] == 0  # a smaller wish
    there_are = len(kept_tokens(make_rows(100, seq=32)))
    assert run(config_for(sources, tmp_path / "c", tokens=there_are))["shards_made"] == 0
    assert contents(tmp_path / "c") == before


def test_standin_is_cached_and_read(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("the stand-in data is not beside the repository")
    config = Config(
        model=str(SHARED / "standin_lm.pt"),
        dataset=str(SHARED / "tinystories_sample"),
        split="validation",
        tokens=2000,
        out=str(tmp_path / "c"),
        device="cpu",
    )
    assert run(config)["tokens"] == 2000
    batch = next(ActivationCache(tmp_path / "c").batches(1024, seed=0))
    assert batch.shape == (1024, 256)
    assert batch.isfinite().all()


def test_the_second_writer_stops(sources: Path, tmp_path: Path) -> None:
    with one_writer(tmp_path):
        with pytest.raises(UserError, match="another process is writing there"):
            run(config_for(sources, tmp_path))
        assert contents(tmp_path) == {".lock": b""}
    assert run(config_for(sources, tmp_path))["shards_made"] == 4


def test_caches_where_there_are_no_locks(
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    assert run(config_for(sources, tmp_path / "c"))["shards_made"] == 4
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.processes
def test_a_local_dataset_needs_no_home_to_write_to(sources: Path, tmp_path: Path) -> None:
    nowhere = {
        name: "/dev/null/home"
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE")
    }
    settings = ["--model", str(sources / "model.pt"), "--dataset", str(sources), "--tokens", "50"]
    ended = subprocess.run(
        [sys.executable, cache_activations.__file__, *settings, "--layer", "0", "--out", "c"],
        env={**os.environ, **nowhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert ActivationCache(tmp_path / "c").n_tokens == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "layer 3 is not there: this model has 0 to 2"),
        ({"layer": 1.0}, "layer 1.0 is not there: this model has 0 to 2"),
        ({"layer": float("nan")}, "layer nan is not there: this model has 0 to 2"),
        ({"layer": -(10**30)}, "layer -10* is not there: this model has 0 to 2"),
        ({"tokens": 0}, "--tokens must be a whole number between 1 and 10*, got 0"),
        ({"tokens": 10**30}, "--tokens must be a whole number between 1 and 10*, got 10*"),
        ({"tokens": float("inf")}, "--tokens must be a whole number between 1 and 10*, got inf"),
        ({"tokens": float("nan")}, "--tokens must be a whole number between 1 and 10*, got nan"),
        ({"batch_size": -1}, "--batch-size must be a whole number between 1 and 10*, got -1"),
        ({"batch_size": 1.5}, "--batch-size must be a whole number between 1 and 10*, got 1.5"),
        ({"rows_per_shard": 10**30}, "--rows-per-shard must be a whole number .*, got 10*"),
        ({"rows_per_shard": None}, "--rows-per-shard must be a whole number .*, got None"),
        ({"dtype": "float8"}, "--dtype must be one of float16, bfloat16, float32, got float8"),
        ({"dataset": "long" * 100}, "neither a folder here nor the name of a hub dataset"),
        ({"dataset": ""}, "neither a folder here nor the name of a hub dataset"),
        ({"split": "long" * 100}, "holds no longlong"),
        ({"out": "/dev/null/c"}, "--out /dev/null/c cannot be written: Not a directory"),
        ({"out": "long" * 100}, "cannot be written: File name too long"),
        ({"split": "test"}, "holds no test.jsonl"),
        ({"dataset": "./nowhere"}, "neither a folder here nor the name of a hub dataset"),
        ({"device": "nonsense"}, "--device nonsense is not there"),
        ({"device": "meta"}, "--device meta is not there"),
    ],
)
def test_impossible_settings(
    sources: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config_for(sources, tmp_path / "c"), **settings))
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_returns_what_is_in_the_folder(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    result = run(config_for(sources, tmp_path / "c", tokens=1500, dtype=dtype))
    cache = ActivationCache(tmp_path / "c")
    files = [*(tmp_path / "c").glob("*.acts"), *(tmp_path / "c").glob("*.tokens")]
    assert result.pop("seconds") > 0
    assert result == {
        "out": str(tmp_path / "c"),
        "tokens_asked": 1500,
        "tokens": 1500,
        "rows": cache.shards[-1].end_row,
        "shards": len(cache.shards),
        "shards_made": len(cache.shards),
        "bytes": sum(path.stat().st_size for path in files),
        "layer": 1,
        "d_model": D_MODEL,
        "dtype": dtype,
        "weights_hash": cache.recipe["weights_hash"],
    }
    assert "1.2" in result_table({**result, "bytes": 1_230_000, "seconds": 9}).split("\n")[-1]


def test_half_written_files_are_removed_before_more_are_written(
    sources: Path, tmp_path: Path
) -> None:
    """They may be what fills the disk."""
    leftover = tmp_path / "c" / ".00001.acts.half.acts"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    write_rows(tmp_path / "data", [[-1]])
    with pytest.raises(UserError, match="token id -1"):
        run(config_for(sources, tmp_path / "c", dataset=str(tmp_path / "data")))
    assert not leftover.exists()
