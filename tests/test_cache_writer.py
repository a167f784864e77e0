"""What is written to a cache, and that no kill, full disk or changed input spoils it."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from cache_factory import (
    CPU,
    D_MODEL,
    as_format_1,
    config_for,
    contents,
    cut,
    flip,
    hub_of,
    kept_tokens,
    reorder,
    write_sources,
)
from tiny_factory import (
    die_with_parent,
    fresh_processes,
    make_rows,
    make_state,
    write_dataset,
    write_model,
    write_rows,
)

from cache_activations import Config, run
from matryoshka import cache_writer
from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_format import read_record
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import cache_rows, finish, split_rows
from matryoshka.errors import UserError
from matryoshka.files import make_folder
from matryoshka.sources import Block
from matryoshka.tiny_model import BEGIN, PAD, TinyModel
from matryoshka.token_rows import count_rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


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
    assert cache.tokens(seen - 1, seen)[0].tolist() == [expected[-1][0]]


@pytest.mark.parametrize("tokens", [1, 500, 643])
def test_takes_exactly_the_tokens_asked_for(sources: Path, tmp_path: Path, tokens: int) -> None:
    assert run(config_for(sources, tmp_path / "c", tokens=tokens))["tokens"] == tokens
    cache = ActivationCache(tmp_path / "c")
    found = [tok for batch in cache.sequential(100) for tok in batch.tok_ids.tolist()]
    assert found == [tok for tok, _, _ in kept_tokens(make_rows(100, seq=32))[:tokens]]
    # no row is run in vain: the last one brought the last token
    assert cache.manifest.n_rows == cache.tokens(tokens - 1, tokens)[1] + 1


@pytest.mark.parametrize("n_parts", [1, 3, 4, 9])
def test_parts_make_the_same_bytes(sources: Path, tmp_path: Path, n_parts: int) -> None:
    whole, parts = (config_for(sources, tmp_path / name, tokens=1500) for name in ("w", "p"))
    run(whole)
    source = load_source(parts, CPU)
    n_rows, n_tokens = count_rows(parts.token_rows, parts.tokens, parts.keep_begin, 10_000)
    assert n_tokens >= 1500
    ranges = split_rows(n_rows, parts.rows_per_shard, n_parts)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n_rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    make_folder(tmp_path / "p")
    for i, (start, end) in enumerate(reversed(ranges)):
        if i == len(ranges) - 1:
            with pytest.raises(UserError, match="no finished shard 00000"):
                finish(tmp_path / "p", n_rows)
        assert cache_rows(Path(parts.out), parts, source, start, end) > 0
        assert cache_rows(Path(parts.out), parts, source, start, end) == 0  # a retry
    finish(tmp_path / "p", n_rows)
    expected = contents(tmp_path / "w")
    del expected[".lock"]
    assert contents(tmp_path / "p") == expected


def test_finish_names_the_shard_that_is_missing(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    source = load_source(config, CPU)
    cache_rows(Path(config.out), config, source, 0, 30)
    cache_rows(Path(config.out), config, source, 60, 100)
    with pytest.raises(UserError, match="shard 00001, rows 30 to 59, is not finished"):
        finish(tmp_path, 100)
    assert not (tmp_path / "manifest.json").exists()


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

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
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


@pytest.mark.processes
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
        process.join(300)
        assert process.exitcode in (-signal.SIGKILL, 0)
        if n_events:
            assert process.exitcode == -signal.SIGKILL
        survived += process.exitcode == 0
        run(config)
        assert contents(tmp_path / str(i)) == expected
    assert len(moments) - survived >= 10


def test_a_kill_keeps_finished_shards(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(sources, tmp_path / "c")
    compute, calls = cache_writer.compute_shard, []

    def compute_two(block: Block, *settings: Any) -> Any:
        calls.append(int(block.tokens[0, 1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(block, *settings)

    monkeypatch.setattr(cache_writer, "compute_shard", compute_two)
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


def failing(function: Callable[..., Any], fails: Callable[[], bool]) -> Callable[..., Any]:
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
    with pytest.raises(
        UserError, match=r"rows 0 to 29 of .* have changed since shard 00000 was made"
    ):
        run(config)
    assert not (tmp_path / "c" / "00002.json").exists()


def test_an_unfinished_cache_of_the_format_before_is_refused(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path / "c")
    run(config)
    as_format_1(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    before = contents(tmp_path / "c")
    with pytest.raises(UserError, match="its format is 1, expected 2; give another --out"):
        run(config)
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "its layer is 1, expected 2"),
        ({"dtype": "float32"}, "its dtype is float16, expected float32"),
        ({"keep_begin": True}, "its keep_begin is False, expected True"),
        ({"tokens": 2 * 10**6}, "its tokens is 1000000, expected 2000000"),
        ({"rows_per_shard": 31}, "its rows_per_shard is 30, expected 31"),
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
    source = load_source(config, CPU)
    with pytest.raises(UserError, match="shard 00002, rows 60 to 89, is not finished"):
        finish(tmp_path / "c", 100)
    assert cache_rows(Path(config.out), config, source, 0, 100) == 1
    finish(tmp_path / "c", 100)
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
    source = load_source(config, CPU)
    assert cache_rows(Path(config.out), config, source, 90, 95) == 1
    assert run(config)["shards_made"] == 2
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
        ("float16", 1e5, r"reach 340000 in rows 0 to 29 of.*float16 holds 65504 at most; use bfl"),
        ("bfloat16", 1e38, r"--dtype bfloat16 holds 3.38953e\+38 at most; use float32"),
        ("float32", 1e39, "activations are not finite in rows 0 to 29 of .*train.jsonl"),
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
    source = load_source(config, CPU)
    with pytest.raises(UserError, match="ended before row 200"):
        cache_rows(Path(config.out), config, source, 0, 200)
    finished = {path.name for path in tmp_path.glob("0*.json")}
    assert finished == {"00000.json", "00001.json", "00002.json"}


def test_a_part_starts_with_a_shard(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    source = load_source(config, CPU)
    with pytest.raises(ValueError, match="start must be a multiple of rows_per_shard, 30, got 40"):
        cache_rows(Path(config.out), config, source, 40, 70)
    with pytest.raises(ValueError, match="n_parts must be a whole number of 1 or more, got 0"):
        split_rows(100, 30, 0)


def test_parts_are_whole_shards_as_even_as_can_be() -> None:
    assert split_rows(100, 30, 1) == [(0, 100)]
    assert split_rows(100, 30, 2) == [(0, 60), (60, 100)]
    assert split_rows(100, 30, 3) == [(0, 30), (30, 60), (60, 100)]
    assert split_rows(100, 30, 9) == [(0, 30), (30, 60), (60, 90), (90, 100)]
    assert split_rows(90, 30, 3) == [(0, 30), (30, 60), (60, 90)]


def test_finishing_clears_what_killed_writers_left(sources: Path, tmp_path: Path) -> None:
    config = config_for(sources, tmp_path)
    cache_rows(tmp_path, config, load_source(config, CPU), 0, 100)
    for name in (".00001.acts.x.acts", ".00001.json.x.json", ".manifest.json.x.json", ".mine"):
        (tmp_path / name).write_bytes(b"half")
    finish(tmp_path, 100)
    assert [path.name for path in tmp_path.glob(".*")] == [".mine"]


def test_the_models_revision_reaches_the_hub(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, revision))
        return str(sources / "model.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = config_for(sources, tmp_path, model="someone/tiny", model_revision="v2")
    load_source(config, CPU)
    assert set(asked) == {("someone/tiny", "v2")}


def test_each_shards_record_is_of_its_rows(sources: Path, tmp_path: Path) -> None:
    run(config_for(sources, tmp_path / "c"))
    cache = ActivationCache(tmp_path / "c")
    assert [(s.first_row, s.end_row) for s in cache.shards] == [
        (0, 30),
        (30, 60),
        (60, 90),
        (90, 100),
    ]
    for shard in cache.shards:
        record = read_record(tmp_path / "c" / f"{shard.name}.json")
        assert (record.recipe, record.shards) == (cache.recipe, [shard])
        assert (record.n_tokens, record.n_rows) == (shard.n_tokens, shard.end_row - shard.first_row)
    assert sum(shard.n_tokens for shard in cache.shards) == cache.n_tokens


def test_a_layer_that_is_not_there_is_refused_before_anything_is_read(
    sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="layer 3 is not there: this model has 0 to 2"):
        load_source(config_for(sources, tmp_path, layer=3, dataset="nowhere"), CPU)


@pytest.mark.parametrize(
    ("name", "most"), [("tokens", 10**12), ("batch_size", 10**6), ("rows_per_shard", 10**6)]
)
def test_settings_beyond_any_machine_are_refused(name: str, most: int) -> None:
    CacheConfig(**{name: most}).check()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=name.replace("_", "-")):
        CacheConfig(**{name: most + 1}).check()  # type: ignore[arg-type]


def test_a_cache_of_token_ids_has_the_bytes_that_it_has_always_had(
    sources: Path, tmp_path: Path
) -> None:
    """Format 2, written out: what is in its files does not change with what else can be cached."""
    run(config_for(sources, tmp_path / "c", rows_per_shard=100, tokens=2000))
    rows = torch.tensor(make_rows(100, seq=32))
    model = TinyModel.from_pretrained(sources / "model.pt")
    tokens = kept_tokens(rows.tolist())
    n_rows = tokens[1999][1] + 1
    tokens = [token for token in tokens if token[1] < n_rows]
    residual = torch.cat([model.residual(part, 1) for part in rows[:n_rows].split(7)])
    acts = torch.stack([residual[row, position] for _, row, position in tokens]).half()
    acts_bytes, tokens_bytes = acts.numpy().tobytes(), np.array(tokens, dtype="<i4").tobytes()
    recipe = {
        "format": 2,
        "model": str(sources / "model.pt"),
        "weights_hash": model.weights_hash,
        "dataset": str(sources),
        "dataset_revision": None,
        "dataset_bytes": (sources / "train.jsonl").stat().st_size,
        "dataset_sha256": hashlib.sha256((sources / "train.jsonl").read_bytes()).hexdigest(),
        "split": "train",
        "tokens": 2000,
        "layer": 1,
        "dtype": "float16",
        "d_model": D_MODEL,
        "keep_begin": False,
        "rows_per_shard": 100,
    }
    shard = {
        "name": "00000",
        "first_row": 0,
        "end_row": n_rows,
        "n_tokens": len(tokens),
        "acts_sha256": hashlib.sha256(acts_bytes).hexdigest(),
        "tokens_sha256": hashlib.sha256(tokens_bytes).hexdigest(),
    }

    def record(n_tokens: int) -> bytes:
        lines = [f' "make": {json.dumps(recipe)}', f' "n_tokens": {n_tokens}']
        lines += [f' "n_rows": {n_rows}', f' "shards": [\n  {json.dumps(shard)}\n ]']
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    assert contents(tmp_path / "c") == {
        ".lock": b"",
        "00000.acts": acts_bytes,
        "00000.tokens": tokens_bytes,
        "00000.json": record(len(tokens)),
        "manifest.json": record(2000),
    }
