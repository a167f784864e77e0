"""The cache: what is in it, that nothing is lost by a kill, what the reader's order promises."""

import dataclasses
import errno
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_factory import (
    BEGIN,
    PAD,
    die_with_parent,
    make_rows,
    make_state,
    write_dataset,
    write_model,
    write_rows,
)

import cache_activations
import script
from cache_activations import CHUNK, ActivationCache, Config, run
from script import UserError
from tiny_model import TinyModel

D_MODEL = 16
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt and train.jsonl: 100 rows of 32 ids."""
    folder = tmp_path_factory.mktemp("sources")
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    return write_dataset(folder, 100, seq=32)


def config_for(sources: Path, out: Path, **settings: Any) -> Config:
    small: dict[str, Any] = {
        "model": str(sources / "model.pt"),
        "dataset": str(sources),
        "tokens": 10**6,
        "layer": 1,
        "batch_size": 7,
        "rows_per_shard": 30,
        "device": "cpu",
        "out": str(out),
    }
    return Config(**{**small, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kept_tokens(rows: list[list[int]], keep_begin: bool = False) -> list[tuple[int, int, int]]:
    """(token id, row, position) of what is to be cached, in order."""
    drop = {PAD} if keep_begin else {PAD, BEGIN}
    return [
        (tok, r, p) for r, row in enumerate(rows) for p, tok in enumerate(row) if tok not in drop
    ]


def write_cache(
    folder: Path, n_tokens: int, *, d_model: int = 4, row_length: int = 100, n_shards: int = 3
) -> Path:
    """A cache made up without a model: activation i is [i // 65536, i % 65536, 0, ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    n_rows = -(-n_tokens // row_length)
    per_shard = -(-n_rows // n_shards)
    make = {
        "format": 1,
        "tokens": n_tokens,
        "dtype": "float32",
        "d_model": d_model,
        "rows_per_shard": per_shard,
    }
    for first in range(0, n_rows, per_shard):
        end = min(first + per_shard, n_rows)
        i = np.arange(first * row_length, min(end * row_length, n_tokens))
        acts = torch.zeros(len(i), d_model)
        acts[:, 0] = torch.from_numpy(i // 65536)
        acts[:, 1] = torch.from_numpy(i % 65536)
        tokens = np.stack([i % 9000, i // row_length, i % row_length], axis=1).astype("<i4")
        cache_activations.write_shard(folder, acts, tokens, (first, end), make)
    cache_activations.finish(folder, n_rows)
    return folder


def fresh_processes() -> Any:
    """Starts processes that share nothing with this one, without importing torch in each.

    They are forked from a server that has imported what is slow to import, and run nothing.
    """
    context = multiprocessing.get_context("forkserver")
    slow = ["torch", "datasets", "safetensors.torch", "einops", "pytest"]
    context.set_forkserver_preload(slow)
    return context


def numbers(batch: torch.Tensor) -> np.ndarray:
    """Which of `write_cache`'s activations these are."""
    return (batch[:, 0].long() * 65536 + batch[:, 1].long()).numpy()


# ------------------------------------------------------------------------------ what is in a cache


@pytest.mark.parametrize(
    ("dtype", "keep_begin", "layer"),
    [("float32", False, 1), ("float16", True, 2), ("bfloat16", False, 0)],
)
def test_holds_the_models_activations(
    sources: Path, tmp_path: Path, dtype: str, keep_begin: bool, layer: int
) -> None:
    config = config_for(sources, tmp_path / "c", dtype=dtype, keep_begin=keep_begin, layer=layer)
    result = run(config)
    rows = make_rows(100, seq=32)
    expected = kept_tokens(rows, keep_begin)
    model = TinyModel.from_pretrained(sources / "model.pt")
    residual = model.residual(torch.tensor(rows), layer)  # [row, position, d_model]
    cache = ActivationCache(tmp_path / "c")
    cache.verify()
    assert result["tokens"] == cache.n_tokens == len(expected)
    assert cache.dtype == getattr(torch, dtype)
    seen = 0
    for batch in cache.sequential(150):
        assert batch.acts.dtype == torch.float32
        found = zip(
            batch.tok_ids.tolist(), batch.rows.tolist(), batch.positions.tolist(), strict=True
        )
        assert list(found) == expected[seen : seen + 150]
        rounded = residual[batch.rows, batch.positions].to(cache.dtype).float()
        step = torch.finfo(cache.dtype).eps  # float32's rounding may tip the cache dtype's
        torch.testing.assert_close(batch.acts, rounded, atol=1e-5, rtol=max(step, 1e-5))
        seen += len(batch.acts)
    assert seen == len(expected)
    assert cache.tok_ids(seen - 1) == expected[-1][0]


@pytest.mark.parametrize("tokens", [1, 500, 643])
def test_takes_exactly_the_tokens_asked_for(sources: Path, tmp_path: Path, tokens: int) -> None:
    assert run(config_for(sources, tmp_path / "c", tokens=tokens))["tokens"] == tokens
    cache = ActivationCache(tmp_path / "c")
    found = [tok for batch in cache.sequential(100) for tok in batch.tok_ids.tolist()]
    assert found == [tok for tok, _, _ in kept_tokens(make_rows(100, seq=32))[:tokens]]
    # no row is run in vain: the last one brought the last token
    assert cache.manifest.n_rows == cache.tokens(tokens - 1, tokens)[1] + 1


def test_says_how_many_there_were(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(sources, tmp_path / "c")
    argv = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key != "keep_begin"
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
    assert contents(tmp_path / "c") == before


def test_a_part_of_a_cache_is_a_cache(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "c", 1000)
    cache = ActivationCache(folder, n_tokens=300)
    assert sorted(numbers(next(cache.batches(300, seed=0)))) == list(range(300))
    assert sum(len(batch.acts) for batch in cache.sequential(128)) == 300
    with pytest.raises(UserError, match="holds 1000 activations, not 1001"):
        ActivationCache(folder, n_tokens=1001)


@pytest.mark.parametrize("n_parts", [1, 3, 4, 9])
def test_parts_make_the_same_bytes(sources: Path, tmp_path: Path, n_parts: int) -> None:
    whole, parts = (config_for(sources, tmp_path / name, tokens=1500) for name in ("w", "p"))
    run(whole)
    model = cache_activations.load_model(parts)
    n_rows, n_tokens = cache_activations.count_rows(parts, model.d_vocab)
    assert n_tokens >= 1500
    ranges = cache_activations.split_rows(parts, n_rows, n_parts)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n_rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    script.make_folder(tmp_path / "p")
    for i, (start, end) in enumerate(reversed(ranges)):
        if i == len(ranges) - 1:
            with pytest.raises(UserError, match="no finished shard 00000"):
                cache_activations.finish(tmp_path / "p", n_rows)
        assert cache_activations.cache_rows(parts, model, start, end) > 0
        assert cache_activations.cache_rows(parts, model, start, end) == 0  # a retry
    cache_activations.finish(tmp_path / "p", n_rows)
    expected = contents(tmp_path / "w")
    del expected[".lock"]
    assert contents(tmp_path / "p") == expected


def test_finish_names_the_shard_that_is_missing(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    model = cache_activations.load_model(config)
    cache_activations.cache_rows(config, model, 0, 30)
    cache_activations.cache_rows(config, model, 60, 100)
    with pytest.raises(UserError, match="shard 00001, rows 30 to 59, is not finished"):
        cache_activations.finish(tmp_path, 100)
    assert not (tmp_path / "manifest.json").exists()


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


# ------------------------------------------------------------------------------- kills and faults


def run_and_die(config: Config, n_events: int, delay: float) -> None:
    """In a process of its own: `run`, killed at its `n_events`-th step on disk, or after `delay`.

    A step is a file synced, renamed (before and after) or a part of one written.
    """
    die_with_parent()
    torch.set_num_threads(1)
    count = itertools.count(1)

    def step() -> None:
        if next(count) == n_events:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable) -> Callable:
        def wrapped(*args: Any) -> Any:
            step()
            result = function(*args)
            step()
            return result

        return wrapped

    def write_in_two(path: Path, data: Any) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            step()
            file.write(data[len(data) // 2 :])

    os.replace = around(os.replace)
    os.fsync = around(os.fsync)
    Path.write_bytes = write_in_two  # type: ignore[method-assign, assignment]
    if delay:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, delay)
    run(config)
    os._exit(0)


def test_killed_at_any_moment_ends_with_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    run(config_for(sources, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    context = fresh_processes()
    # 4 shards: 14 steps each (two files written in parts, three synced and renamed), then 4.
    moments = [(n, 0.0) for n in (1, 2, 4, 6, 9, 11, 13, 14, 15, 23, 30, 44, 55, 58, 59)]
    moments += [(0, delay) for delay in (0.04, 0.08, 0.12, 0.16)]
    survived = 0
    for i, (n_events, delay) in enumerate(moments):
        config = config_for(sources, tmp_path / str(i))
        process = context.Process(target=run_and_die, args=(config, n_events, delay), daemon=True)
        process.start()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        if n_events:
            assert process.exitcode == -signal.SIGKILL
        survived += process.exitcode == 0
        run(config)
        assert contents(tmp_path / str(i)) == expected
    assert len(moments) - survived >= 10


def sleep_on(ready: Any, seconds: float) -> None:
    """In a process of its own: says that it is there, and never ends by itself."""
    die_with_parent(seconds)
    ready.send(os.getpid())
    while True:
        time.sleep(1)


def start_a_sleeper(ready: Any, seconds: float) -> None:
    """In a process of its own: starts another, and waits for it."""
    die_with_parent()
    sleeper = multiprocessing.get_context("fork").Process(target=sleep_on, args=(ready, seconds))
    sleeper.start()
    ready.close()
    sleeper.join()


@pytest.mark.parametrize("seconds", [0.5, 100])
def test_no_process_outlives_the_tests_that_started_it(seconds: float) -> None:
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    starter = context.Process(target=start_a_sleeper, args=(send, seconds))
    starter.start()
    send.close()
    assert receive.poll(60)
    receive.recv()
    if seconds == 100:
        starter.kill()
    assert receive.poll(20)
    with pytest.raises(EOFError):  # nobody is left who could send
        receive.recv()
    starter.join(20)
    assert starter.exitcode is not None


def test_a_kill_keeps_finished_shards(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(sources, tmp_path / "c")
    compute, calls = cache_activations.compute_shard, []

    def compute_two(model: TinyModel, rows: np.ndarray, first_row: int, config: Config) -> Any:
        calls.append(first_row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(model, rows, first_row, config)

    monkeypatch.setattr(cache_activations, "compute_shard", compute_two)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert run(config)["shards_made"] == 2
    assert calls == [0, 30, 60, 60, 90]


def test_a_full_disk_keeps_what_was_finished(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(sources, tmp_path / "c")
    write, calls = Path.write_bytes, []

    def fills_up(path: Path, data: Any) -> int:
        calls.append(path)
        if len(calls) == 6:  # the third shard's second file
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fills_up)
        with pytest.raises(UserError, match=r"shard 00002: .*No space left.*finished shards"):
            run(config)
    left = contents(tmp_path / "c")
    assert {"00000.json", "00001.json"} <= set(left)
    assert not {"00002.json", "manifest.json"} & set(left)
    assert run(config)["shards_made"] == 2
    assert {**contents(tmp_path / "c"), **left} == contents(tmp_path / "c")
    ActivationCache(tmp_path / "c").verify()


def failing(function: Callable, fails: Callable[[], bool]) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if fails():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return wrapped


def test_a_disk_full_at_any_moment_is_one_line_and_loses_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_for(sources, tmp_path / "whole"))
    config, failures = config_for(sources, tmp_path / "c"), []
    writes = [(tempfile, "mkstemp"), (tempfile, "TemporaryFile"), (os, "fsync"), (os, "replace")]
    writes += [(Path, "write_bytes"), (Path, "write_text"), (Path, "mkdir")]  # type: ignore[list-item]
    for moment in itertools.count(1):
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            for owner, name in writes:
                broken = failing(getattr(owner, name), lambda: next(calls) == moment)  # noqa: B023
                patch.setattr(owner, name, broken)
            try:
                run(config)
                break
            except UserError as error:
                failures.append(str(error))
    assert len(failures) >= 2 + 4 * 4  # the folder, each of a shard's files and the manifest
    assert all("No space left on device" in failure for failure in failures)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_the_second_writer_stops(sources: Path, tmp_path: Path) -> None:
    with script.one_writer(tmp_path):
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
    """As on a system without fcntl, where a module that imports it unasked does not import."""
    file = cache_activations.__file__
    spec = importlib.util.spec_from_file_location("without_fcntl", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_fcntl", module)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(script, "fcntl", None)
    spec.loader.exec_module(module)
    assert module.run(config_for(sources, tmp_path / "c"))["shards_made"] == 4
    assert "cannot be locked" in capsys.readouterr().err


def reorder(file: Path) -> None:
    """The same rows in another order: the file's size does not change."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::-1]))


@pytest.mark.parametrize("finished", [True, False])
def test_rows_reordered_in_a_folder_are_noticed(
    sources: Path, tmp_path: Path, finished: bool
) -> None:
    data = write_dataset(tmp_path / "data", 100, seq=32)
    config = config_for(sources, tmp_path / "c", dataset=str(data))
    run(config)
    if not finished:
        for path in [*(tmp_path / "c").glob("0000[23].*"), tmp_path / "c" / "manifest.json"]:
            path.unlink()
    before = contents(tmp_path / "c")
    reorder(data / "train.jsonl")
    with pytest.raises(UserError, match="holds another cache: its dataset_sha256 is"):
        run(config)
    assert contents(tmp_path / "c") == before


def hub_of(folder: Path, asked: list[Any]) -> Callable:
    """`datasets.load_dataset` with a hub that has the files of `folder` in every repo."""
    load = datasets.load_dataset

    def load_dataset(name: str, data_files: dict[str, str], split: str, **settings: Any) -> Any:
        asked.append((name, data_files, split, settings.pop("revision")))
        return load(
            "json", data_files={split: str(folder / data_files[split])}, split=split, **settings
        )

    return load_dataset


def test_rows_of_the_hub_are_those_of_a_folder(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_for(sources, tmp_path / "local"))
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", hub_of(sources, asked))
    hub = {"dataset": "someone/rows", "dataset_revision": "v1"}
    run(config_for(sources, tmp_path / "hub", **hub))
    assert set(map(repr, asked)) == {
        repr(("someone/rows", {"train": "train.jsonl"}, "train", "v1"))
    }
    local, hub_cache = ActivationCache(tmp_path / "local"), ActivationCache(tmp_path / "hub")
    assert hub_cache.content_hash == local.content_hash
    assert hub_cache.make["dataset_sha256"] is None
    part = cache_activations.read_rows(config_for(sources, tmp_path, **hub), 40, 75, 10_000)
    assert np.concatenate(list(part)).tolist() == make_rows(100, seq=32)[40:75]
    (tmp_path / "hub" / "manifest.json").unlink()
    (tmp_path / "hub" / "00002.json").unlink()
    assert run(config_for(sources, tmp_path / "hub", **hub))["shards_made"] == 1
    assert ActivationCache(tmp_path / "hub").content_hash == local.content_hash


def test_rows_reordered_on_the_hub_are_noticed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", 100, seq=32)
    monkeypatch.setattr(datasets, "load_dataset", hub_of(data, []))
    config = config_for(sources, tmp_path / "c", dataset="someone/rows")
    run(config)
    for path in [*(tmp_path / "c").glob("0000[23].*"), tmp_path / "c" / "manifest.json"]:
        path.unlink()
    reorder(data / "train.jsonl")
    with pytest.raises(UserError, match="shard 00000 was made of other rows 0 to 29 than"):
        run(config)
    assert not (tmp_path / "c" / "00002.json").exists()


def as_format_1(folder: Path) -> None:
    """What the version before wrote: without a hash of the dataset."""
    for path in folder.glob("*.json"):
        value = json.loads(path.read_text())
        del value["make"]["dataset_sha256"]
        value["make"]["format"] = 1
        path.write_text(json.dumps(value))


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
    with pytest.raises(UserError, match="its layer is 1, asked for is 2"):
        run(dataclasses.replace(config, layer=2))
    write_dataset(data, 99, seq=32)
    with pytest.raises(UserError, match="its dataset_bytes is"):
        run(config)


def test_an_unfinished_cache_of_the_format_before_is_refused(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path / "c")
    run(config)
    as_format_1(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    before = contents(tmp_path / "c")
    with pytest.raises(UserError, match="its format is 1, asked for is 2; give another --out"):
        run(config)
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "its layer is 1, asked for is 2"),
        ({"dtype": "float32"}, "its dtype is float16, asked for is float32"),
        ({"keep_begin": True}, "its keep_begin is False, asked for is True"),
        ({"tokens": 2 * 10**6}, "its tokens is 1000000, asked for is 2000000"),
        ({"rows_per_shard": 31}, "its rows_per_shard is 30, asked for is 31"),
        ({"model": "other.pt"}, "its weights_hash is"),
        ({"split": "validation"}, "its dataset_bytes is"),
    ],
)
def test_another_cache_is_refused_and_untouched(
    sources: Path, tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    write_model(tmp_path / "other.pt", d_model=D_MODEL, d_mlp=24, seed=1)
    out = tmp_path / "c"
    run(config_for(sources, out))
    if not finished:
        (out / "manifest.json").unlink()
    before = contents(out)
    if "model" in change:
        change = {"model": str(tmp_path / "other.pt")}
    if "split" in change:
        write_dataset(sources, 99, split="validation", seq=32)
    with pytest.raises(UserError, match=message):
        run(config_for(sources, out, **change))
    assert contents(out) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("kind", ["acts", "tokens"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_shard_is_named_and_made_anew(
    sources: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    config = config_for(sources, tmp_path / "c")
    run(config)
    before = contents(tmp_path / "c")
    damage(tmp_path / "c" / f"00002.{kind}")
    with pytest.raises(UserError, match=r"shard 00002 is damaged.*delete 00002\.\*"):
        ActivationCache(tmp_path / "c").verify()
    for path in (tmp_path / "c").glob("00002.*"):
        path.unlink()
    assert run(config)["shards_made"] == 1
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("kind", ["acts", "tokens"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_going_on_makes_an_incomplete_shard_anew(
    sources: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    config = config_for(sources, tmp_path / "c")
    run(config)
    before = contents(tmp_path / "c")
    damage(tmp_path / "c" / f"00002.{kind}")
    (tmp_path / "c" / "manifest.json").unlink()
    model = cache_activations.load_model(config)
    with pytest.raises(UserError, match="shard 00002, rows 60 to 89, is not finished"):
        cache_activations.finish(tmp_path / "c", 100)
    assert cache_activations.cache_rows(config, model, 0, 100) == 1
    cache_activations.finish(tmp_path / "c", 100)
    assert contents(tmp_path / "c") == before


def test_a_shard_of_other_rows_is_made_anew(sources: Path, tmp_path: Path) -> None:
    """A whole shard under another's name, and one that ended where the rows once did."""
    config = config_for(sources, tmp_path / "c")
    run(config)
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    for kind in ("acts", "tokens", "json"):
        shutil.copy(tmp_path / "c" / f"00000.{kind}", tmp_path / "c" / f"00001.{kind}")
        (tmp_path / "c" / f"00003.{kind}").unlink()
    model = cache_activations.load_model(config)
    assert cache_activations.cache_rows(config, model, 90, 95) == 1
    sidecar = json.loads((tmp_path / "c" / "00002.json").read_text())
    sidecar["shards"][0].update(name="00004")
    (tmp_path / "c" / "00002.json").write_text(json.dumps(sidecar))
    for kind in ("acts", "tokens"):
        shutil.copy(tmp_path / "c" / f"00002.{kind}", tmp_path / "c" / f"00004.{kind}")
    assert run(config)["shards_made"] == 3
    for kind in ("acts", "tokens"):
        (tmp_path / "c" / f"00004.{kind}").unlink()
    assert contents(tmp_path / "c") == before


def test_a_shard_whose_rows_hold_nothing_to_cache(sources: Path, tmp_path: Path) -> None:
    rows = make_rows(6, seq=32)
    rows[2:4] = [[BEGIN] + [PAD] * 31] * 2
    write_rows(tmp_path / "data", rows)
    run(config_for(sources, tmp_path / "c", dataset=str(tmp_path / "data"), rows_per_shard=2))
    cache = ActivationCache(tmp_path / "c")
    assert [shard.n_tokens for shard in cache.shards][1] == 0
    read = [tok for batch in cache.sequential(7) for tok in batch.tok_ids.tolist()]
    assert read == [tok for tok, _, _ in kept_tokens(rows)]


def test_copies_beside_a_cache_change_nothing(sources: Path, tmp_path: Path) -> None:
    config, out = config_for(sources, tmp_path / "c"), tmp_path / "c"
    run(config)
    content = ActivationCache(out).content_hash
    shutil.copytree(out, tmp_path / "c.bak")
    for path in list(out.glob("*.json")):
        for name in (f"{path.name}.bak", f"{path.stem}.bak.json", f"{path.stem} (copy).json"):
            shutil.copy(path, out / name)
    shutil.copytree(out, out / "c.bak")
    (out / "notes.json").write_text("{")
    assert ActivationCache(out).content_hash == content
    assert ActivationCache(tmp_path / "c.bak").content_hash == content
    assert run(config)["shards_made"] == 0
    (out / "manifest.json").unlink()
    (out / "00001.json").unlink()
    assert run(config)["shards_made"] == 1
    assert ActivationCache(out).content_hash == content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "manifest.json cannot be read .Is a directory"),
        ("00001.json", "00001.json cannot be read .Is a directory"),
        ("00001.acts", "cannot write .*00001.acts .Is a directory"),
        ("00001.tokens", "cannot write .*00001.tokens .Is a directory"),
        (".lock", "c cannot be written: Is a directory"),
    ],
)
def test_a_folder_where_a_file_should_be(
    sources: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "c" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c"))
    (tmp_path / "c" / name).rmdir()
    assert run(config_for(sources, tmp_path / "c"))["shards_made"] > 0


def test_a_folder_named_as_a_leftover_stays(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "c" / ".00001.acts.kept").mkdir(parents=True)
    (tmp_path / "c" / ".00001.acts.half.acts").write_bytes(b"half")
    assert run(config_for(sources, tmp_path / "c"))["shards_made"] == 4
    assert (tmp_path / "c" / ".00001.acts.kept").is_dir()
    assert not (tmp_path / "c" / ".00001.acts.half.acts").exists()


def test_damage_while_reading_is_named(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    (tmp_path / "c" / "00001.acts").write_bytes(b"")
    with pytest.raises(UserError, match="shard 00001 is damaged"):
        next(cache.batches(100, seed=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ('{"make": {"format": 1, "dtype": "float16", "d_model": 4}}', "manifest.json is damaged"),
        ('{"make": {"format": 99}}', "format 99: this version reads 1 and 2"),
        ('{"name": "an app", "icons": []}', "manifest.json is damaged, or no cache's"),
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


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name", ["a?", "exp[1]", "*", "**", "{a,b}", "[!x]", "50%20", "a b", "x#y", "file:", "zip::a"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_name_is_no_pattern(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: bool
) -> None:
    """With folders beside it that such a pattern would match; and the working folder's name."""
    for other in ("a1", "a", "b", "exp1", "50 20", "x"):
        write_dataset(tmp_path / other, 7, seq=16, seed=1)
    data = write_dataset(tmp_path / name, 5, seq=32)
    monkeypatch.chdir(data if inside else tmp_path)
    dataset = "." if inside else str(data)
    run(config_for(sources, tmp_path / "out", dataset=dataset))
    read = next(ActivationCache(tmp_path / "out").sequential(1000)).tok_ids.tolist()
    assert read == [tok for tok, _, _ in kept_tokens(make_rows(5, seq=32))]


def test_a_local_dataset_needs_no_home_to_write_to(sources: Path, tmp_path: Path) -> None:
    nowhere = {
        name: "/dev/null/home"
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE")
    }
    settings = ["--model", sources / "model.pt", "--dataset", sources, "--tokens", "50"]
    ended = subprocess.run(
        [sys.executable, cache_activations.__file__, *settings, "--layer", "0", "--out", "c"],
        env={**os.environ, **nowhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ActivationCache(tmp_path / "c").n_tokens == 50


def spoiled(row: int, value: Any) -> list[Any]:
    rows: list[Any] = make_rows(100, seq=32)
    rows[row] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (spoiled(41, [10_000] * 32), r"train.jsonl row 41: token id 10000 is out of the vocab"),
        (spoiled(41, [-1] + [5] * 31), r"train.jsonl row 41: token id -1 is out of the vocab"),
        (spoiled(41, [5] * 31), r"train.jsonl row 41: 31 tokens, expected 32"),
        (spoiled(30, [5] * 33), r"train.jsonl row 30: 33 tokens, expected 32"),
        (spoiled(7, None), r"train.jsonl row 7: no tok_ids"),
        (spoiled(7, [5] * 31 + [None]), r"train.jsonl row 7: tok_ids holds null, expected int"),
        ([["a", "b"]] * 5, r'train.jsonl row 0: tok_ids holds "a", expected integers'),
        (spoiled(41, [5] * 31 + [7.0]), r"train.jsonl row 41: tok_ids holds 7.0, expected int"),
        (spoiled(41, [5] * 31 + [7.5]), r"train.jsonl row 41: tok_ids holds 7.5, expected int"),
        (spoiled(41, [5] * 31 + [True]), r"train.jsonl row 41: tok_ids holds true, expected int"),
        (spoiled(41, [5] * 31 + [[5]]), r"train.jsonl row 41: tok_ids holds \[5\], expected int"),
        (spoiled(41, [5] * 31 + [10**30]), r"train.jsonl row 41: token id 10{30} is out of the"),
        (spoiled(41, 5), r"train.jsonl row 41: tok_ids is 5, expected a list of integers"),
        (spoiled(0, []), r"train.jsonl row 0: tok_ids is empty"),
        (spoiled(41, []), r"train.jsonl row 41: tok_ids is empty"),
        (spoiled(0, [5] * 31), r"train.jsonl row 1: 32 tokens, expected 31 as in the rows before"),
        ([[]] * 5, r"train.jsonl row 0: tok_ids is empty"),
        ([[BEGIN, PAD, PAD]] * 5, r"train.jsonl holds no tokens to cache in 5 rows"),
        ([[5] * 300] * 5, "rows of 300 tokens: the model has 256 positions"),
    ],
)
def test_wrong_rows_are_named(
    sources: Path, tmp_path: Path, rows: list[list[int]], message: str
) -> None:
    write_rows(tmp_path / "data", rows)
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset=str(tmp_path / "data")))
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.jsonl holds no tokens to cache in 0 rows"),
        ("\n \n", "train.jsonl holds no tokens to cache in 0 rows"),
        ("not json\n", "train.jsonl row 0 is not JSON: expected"),
        ('\n{"tok_ids": [1, 2]}\n{"tok_ids": [1, 2\n', "train.jsonl row 1 is not JSON: expected"),
        ('{"tok_ids": [1, 2]}\n[1, 2]\n', "train.jsonl row 1: a list, expected"),
        ('{"tok_ids": [1, 2]}\n{}\n', "train.jsonl row 1: no tok_ids, only null"),
        ("[" * 100_000, "train.jsonl row 0 is not JSON"),
        ("\xff\xfe", "train.jsonl row 0 is not JSON"),
        ('{"ids": [1, 2]}\n', "train.jsonl row 0: no tok_ids, only ids"),
    ],
)
def test_a_file_that_is_no_dataset(sources: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset=str(tmp_path)))


def test_other_columns_and_blank_lines_are_passed_over(sources: Path, tmp_path: Path) -> None:
    """A column that turns up late, one that changes its type, a last line without its end."""
    rows = make_rows(40, seq=32)
    extras = [{}, {"story": 1}, {"story": "one"}, {"story": {"n": [None]}, "late": 5}]
    lines = [json.dumps({**extras[i // 10], "tok_ids": row}) for i, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("\n" + "\r\n\n".join(lines))
    run(config_for(sources, tmp_path / "c", dataset=str(tmp_path)))
    cache = ActivationCache(tmp_path / "c")
    found = torch.stack(cache.tokens(0, cache.n_tokens), dim=1).tolist()
    assert list(map(tuple, found)) == kept_tokens(rows)


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
        ({"dataset": "long" * 100}, "no folder here, and no hub dataset's name"),
        ({"dataset": ""}, "no folder here, and no hub dataset's name"),
        ({"split": "long" * 100}, "holds no longlong"),
        ({"out": "/dev/null/c"}, "--out /dev/null/c cannot be written: Not a directory"),
        ({"out": "long" * 100}, "cannot be written: File name too long"),
        ({"split": "test"}, "holds no test.jsonl"),
        ({"dataset": "./nowhere"}, "no folder here, and no hub dataset's name"),
        ({"device": "nonsense"}, "--device nonsense is not there"),
    ],
)
def test_impossible_settings(
    sources: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config_for(sources, tmp_path / "c"), **settings))
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_unreachable_hub(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"cannot get someone/rows/train.jsonl .*hub.*give --dataset the folder"
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset="someone/rows"))


@pytest.mark.parametrize("error", [MemoryError(), None, torch.OutOfMemoryError("CUDA")])
def test_a_batch_beyond_memory_says_which_setting(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def residual(*args: object) -> torch.Tensor:
        if error is None:
            return torch.empty(2**60)
        raise error

    monkeypatch.setattr(TinyModel, "residual", residual)
    with pytest.raises(UserError, match="batches of 7: give a smaller --batch-size or --rows-per"):
        run(config_for(sources, tmp_path / "c"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "factor", "message"),
    [
        ("float16", 1e5, r"reach 340000 in rows 0 to 29.*float16 holds 65504 at most; use bfl"),
        ("bfloat16", 1e38, r"--dtype bfloat16 holds 3.38953e\+38 at most; use float32"),
        ("float32", 1e39, "activations at layer 0 are not finite in rows 0 to 29"),
    ],
)
def test_overflow_is_refused(
    sources: Path, tmp_path: Path, dtype: str, factor: float, message: str, sign: int
) -> None:
    state = make_state(d_model=D_MODEL, d_mlp=24)
    state["embed.weight"] = sign * state["embed.weight"].abs().clamp(max=3.4) * factor
    state["pos_embed"].zero_()
    if dtype == "bfloat16":  # above bfloat16's largest number, below float32's
        state["embed.weight"].fill_(sign * 3.4e38)
    torch.save(state, tmp_path / "hot.pt")
    with pytest.raises(UserError, match=message):
        run(
            config_for(
                sources, tmp_path / "c", model=str(tmp_path / "hot.pt"), layer=0, dtype=dtype
            )
        )
    assert not list(tmp_path.glob("c/0*"))


def test_a_dataset_cut_while_it_is_cached(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    model = cache_activations.load_model(config)
    with pytest.raises(UserError, match="ended before row 200"):
        cache_activations.cache_rows(config, model, 0, 200)
    finished = {path.name for path in tmp_path.glob("0*.json")}
    assert finished == {"00000.json", "00001.json", "00002.json"}


def test_a_part_starts_with_a_shard(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    model = cache_activations.load_model(config)
    with pytest.raises(ValueError, match="start must be a multiple of rows_per_shard, 30, got 40"):
        cache_activations.cache_rows(config, model, 40, 70)
    with pytest.raises(ValueError, match="n_parts must be a whole number of 1 or more, got 0"):
        cache_activations.split_rows(config, 100, 0)
    with pytest.raises(ValueError, match="start must be a whole number of 0 or more, got -1"):
        next(cache_activations.read_rows(config, -1, None, 10_000))
    with pytest.raises(ValueError, match="end must be a whole number of 5 or more, got 4"):
        next(cache_activations.read_rows(config, 5, 4, 10_000))


def test_require_says_what_differs(sources: Path, tmp_path: Path) -> None:
    result = run(config_for(sources, tmp_path / "c"))
    cache = ActivationCache(tmp_path / "c")
    cache.require(layer=1, d_model=D_MODEL, weights_hash=result["weights_hash"])
    with pytest.raises(UserError, match="its d_model is 16, expected 768"):
        cache.require(layer=1, d_model=768)
    with pytest.raises(UserError, match="its language is None, expected Welsh"):
        cache.require(language="Welsh")
    with pytest.raises(UserError, match="holds no finished cache"):
        ActivationCache(tmp_path)


# -------------------------------------------------------------------------------------- the reader

# Three buffers and a short last chunk; 1,024 does not divide it.
N_TOKENS = 3 * 512 * CHUNK - 10_000 + 77


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("big") / "c", N_TOKENS, n_shards=5)


@pytest.mark.parametrize("max_resident", [0, 2**40])
def test_every_activation_once_a_pass(big: Path, max_resident: int) -> None:
    cache = ActivationCache(big)
    steps = cache.steps_per_pass(1024)
    batches = cache.batches(1024, seed=3, max_resident=max_resident)
    passes = [
        np.concatenate([numbers(b) for b in itertools.islice(batches, steps)]) for _ in range(2)
    ]
    for order in passes:
        assert len(np.unique(order)) == len(order) == steps * 1024
        assert order.max() < N_TOKENS
    assert N_TOKENS - steps * 1024 < 1024
    left_out = [set(range(N_TOKENS)) - set(order.tolist()) for order in passes]
    assert left_out[0] != left_out[1]
    assert (passes[0] != passes[1]).mean() > 0.99


def test_each_pass_and_each_buffer_has_an_order_of_its_own(big: Path) -> None:
    schedule = ActivationCache(big)._schedule(1024, 3, 0)
    buffers = list(itertools.islice(schedule, 3 * 3))  # three passes of three buffers
    n_chunks = -(-N_TOKENS // CHUNK)
    chunks = [np.concatenate([c for c, _ in buffers[i : i + 3]]) for i in (0, 3, 6)]
    for of_pass in chunks:
        assert sorted(of_pass) == list(range(n_chunks))
    for a, b in itertools.combinations([np.arange(n_chunks), *chunks], 2):
        assert (a == b).mean() < 0.01
    orders = [order[:100_000] for _, order in buffers]
    for a, b in itertools.combinations([np.arange(100_000), *orders], 2):
        assert (a == b).mean() < 0.01


def test_the_content_hash_is_of_the_count_and_the_activations(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "c", 1000)
    cache = ActivationCache(folder)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.acts"))]
    assert cache.content_hash == hashlib.sha256(" ".join(["1000", *sums]).encode()).hexdigest()
    shutil.copytree(folder, tmp_path / "copy")
    assert ActivationCache(tmp_path / "c" / ".." / "copy").content_hash == cache.content_hash
    assert ActivationCache(folder, n_tokens=999).content_hash != cache.content_hash
    other = write_cache(tmp_path / "other", 1000, d_model=5)
    assert ActivationCache(other).content_hash != cache.content_hash


class Chosen(Exception):
    """Which of the two loaders was."""


@pytest.mark.parametrize("n_tokens", [None, 300])
def test_a_cache_is_held_only_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokens: int | None
) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000, d_model=4), n_tokens)
    n_bytes = (n_tokens or 1000) * 4 * 4

    def choose(name: str) -> Callable:
        def chosen(*args: object) -> None:
            raise Chosen(name)

        return chosen

    monkeypatch.setattr(ActivationCache, "_resident_loader", choose("resident"))
    monkeypatch.setattr(ActivationCache, "_streaming_loader", choose("streaming"))

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(Chosen, match=match):
            next(cache.batches(100, seed=0, **settings))

    refused("resident", max_resident=n_bytes)
    refused("streaming", max_resident=n_bytes - 1)
    refused("resident")
    cache._each["acts"] = 2**30 // cache.n_tokens + 1  # as if each activation were that large
    refused("streaming")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.tok_ids(-1), "i must be a whole number between 0 and 999, got -1"),
        (lambda c: c.tok_ids(1000), "i must be a whole number between 0 and 999, got 1000"),
        (lambda c: c.tok_ids(1.0), "i must be a whole number between 0 and 999, got 1.0"),
        (lambda c: c.tokens(-1, 5), "start must be a whole number between 0 and 1000, got -1"),
        (lambda c: c.acts(1001, 1002), "start must be .* between 0 and 1000, got 1001"),
        (lambda c: c.tokens(5, 4), "stop must be a whole number of 5 or more, got 4"),
        (lambda c: c.acts(5, 4), "stop must be a whole number of 5 or more, got 4"),
        (lambda c: c.acts(0, 4.0), "stop must be a whole number of 0 or more, got 4.0"),
        (lambda c: c.sequential(0), "batch_size must be a whole number of 1 or more, got 0"),
        (lambda c: c.sequential(-1), "batch_size must be a whole number of 1 or more, got -1"),
        (lambda c: c.sequential(10.0), "batch_size must be a whole number of 1 or more, got 10.0"),
        (lambda c: c.steps_per_pass(0), "batch_size must be a whole number of 1 or more, got 0"),
        (lambda c: c.batches(-1, 0), "batch_size must be a whole number of 1 or more, got -1"),
        (lambda c: c.batches(0, 0), "batch_size must be a whole number of 1 or more, got 0"),
        (lambda c: c.batches(10.0, 0), "batch_size must be a whole number of 1 or more, got 10.0"),
        (lambda c: c.batches(10, -1), "seed must be a whole number of 0 or more, got -1"),
        (lambda c: c.batches(10, 0, -1), "start_step must be a whole number of 0 or more, got -1"),
        (lambda c: c.batches(10, 0, 0.5), "start_step must be .* of 0 or more, got 0.5"),
        (lambda c: c.batches(10, 0, max_resident=-1), "max_resident must be bytes, 0 or more, got"),
        (lambda c: ActivationCache(c.folder, 10.0), "n_tokens must be .* of 1 or more, got 10.0"),
    ],
)
def test_impossible_requests_say_what_would_be_right(
    tmp_path: Path, ask: Callable[[ActivationCache], object], message: str
) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    with pytest.raises(ValueError, match=message):
        ask(cache)


def test_a_range_may_be_empty_or_go_past_the_end(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    assert cache.acts(1000, 1000).shape == (0, 4)
    assert cache.acts(7, 7).shape == (0, 4)
    assert len(cache.tokens(np.int64(990), 2000)[0]) == 10
    assert torch.equal(cache.acts(990, 2000), cache.acts(990, 1000))
    for n_tokens in (0, -5):
        with pytest.raises(UserError, match=f"holds 1000 activations, not {n_tokens}"):
            ActivationCache(tmp_path / "c", n_tokens=n_tokens)


def test_a_batch_holds_tokens_of_many_rows(big: Path) -> None:
    cache = ActivationCache(big)
    rows = [
        len(np.unique(numbers(batch) // 100))
        for batch in itertools.islice(cache.batches(1024, seed=0), cache.steps_per_pass(1024))
    ]
    assert min(rows) >= 500


def test_no_trend_within_a_pass(big: Path) -> None:
    """Each stretch of a pass is drawn from all of the cache: its mean number is the cache's."""
    batches = ActivationCache(big).batches(1024, seed=1)
    means = [numbers(batch).mean() / N_TOKENS for batch in itertools.islice(batches, 380)]
    # within a buffer 512 chunks were drawn: a mean off by 0.29 / sqrt(512) = 0.013
    assert np.abs(np.asarray(means) - 0.5).max() < 0.08


@pytest.mark.parametrize("start_step", [0, 1, 127, 128, 255, 378, 379, 1000])
def test_starts_at_any_step(big: Path, start_step: int) -> None:
    cache = ActivationCache(big)
    straight = cache.batches(1024, seed=5)
    expected = next(itertools.islice(straight, start_step, None))
    for max_resident in (0, 2**40):
        again = cache.batches(1024, seed=5, start_step=start_step, max_resident=max_resident)
        assert torch.equal(next(again), expected)


def test_starting_late_is_cheap(big: Path) -> None:
    cache = ActivationCache(big)
    began = time.monotonic()
    next(cache.batches(1024, seed=0, start_step=10**9, max_resident=0))
    assert time.monotonic() - began < 2  # a replay would take minutes


def test_seeds_and_memory_limits(big: Path) -> None:
    cache = ActivationCache(big)

    def first(n: int, **kwargs: Any) -> torch.Tensor:
        return torch.cat(list(itertools.islice(cache.batches(1000, **kwargs), n)))

    assert torch.equal(first(300, seed=1), first(300, seed=1, max_resident=0))
    assert not torch.equal(first(1, seed=1), first(1, seed=2))


def test_order_does_not_depend_on_the_reading_threads_timing(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache(big)
    expected = torch.cat(list(itertools.islice(cache.batches(4096, seed=2), 100)))
    read = ActivationCache._read

    def slow_at_times(self: ActivationCache, kind: str, start: int, out: np.ndarray) -> None:
        time.sleep(0.01 if start % 97 == 0 else 0)
        read(self, kind, start, out)

    monkeypatch.setattr(ActivationCache, "_read", slow_at_times)
    found = itertools.islice(cache.batches(4096, seed=2, max_resident=0), 100)
    assert torch.equal(torch.cat(list(found)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batches_are_float32_of_what_is_stored(sources: Path, tmp_path: Path, dtype: str) -> None:
    run(config_for(sources, tmp_path / "c", dtype=dtype))
    cache = ActivationCache(tmp_path / "c")
    stored = {tuple(row) for batch in cache.sequential(512) for row in batch.acts.tolist()}
    for max_resident in (0, 2**40):
        batch = next(cache.batches(500, seed=0, max_resident=max_resident))
        assert batch.dtype == torch.float32
        assert {tuple(row) for row in batch.tolist()} <= stored


def test_too_small_for_a_batch(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    with pytest.raises(UserError, match="holds 1000 activations: too few for one batch of 1024"):
        cache.batches(1024, seed=0)
    assert sorted(numbers(next(cache.batches(1000, seed=0)))) == list(range(1000))


def read_a_pass(folder: Path, result: Any) -> None:
    """In a process of its own: sends by how many bytes reading made its memory grow."""
    die_with_parent()
    torch.set_num_threads(1)
    cache = ActivationCache(folder)
    next(cache.batches(1024, seed=0, max_resident=0)).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for batch in itertools.islice(
        cache.batches(1024, seed=0, max_resident=0), cache.steps_per_pass(1024)
    ):
        batch.sum()
    for consecutive in cache.sequential(4096):
        consecutive.acts.sum()
    result.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    n_tokens, d_model = 2_000_000, 32
    folder = write_cache(tmp_path / "c", n_tokens, d_model=d_model, n_shards=40)
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=read_a_pass, args=(folder, send), daemon=True)
    process.start()
    assert receive.poll(60)
    grown = receive.recv()
    process.join()
    shutil.rmtree(folder)
    # 256 MB of activations; two buffers of them are 2 x 17 MB, a third may be being freed.
    assert grown < 100e6


def test_manifest_says_what_the_cache_is(sources: Path, tmp_path: Path) -> None:
    run(config_for(sources, tmp_path / "c"))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["n_rows"] == 100
    assert len(manifest["shards"]) == 4
    assert manifest["n_tokens"] == sum(shard["n_tokens"] for shard in manifest["shards"])
    assert manifest["make"]["layer"] == 1
    assert manifest["make"]["split"] == "train"
