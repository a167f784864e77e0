"""The cache: what is in it, that nothing is lost by a kill, what the reader's order promises."""

import dataclasses
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_factory import BEGIN, PAD, make_rows, make_state, write_dataset, write_model, write_rows

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
    slow = ["torch", "datasets", "pyarrow.compute", "safetensors.torch", "einops", "pytest"]
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
        process = context.Process(target=run_and_die, args=(config, n_events, delay))
        process.start()
        process.join(60)
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
        with pytest.raises(UserError, match=r"shard 00002 .*No space left.*finished shards"):
            run(config)
    left = contents(tmp_path / "c")
    assert {"00000.json", "00001.json"} <= set(left)
    assert not {"00002.json", "manifest.json"} & set(left)
    assert run(config)["shards_made"] == 2
    assert {**contents(tmp_path / "c"), **left} == contents(tmp_path / "c")
    ActivationCache(tmp_path / "c").verify()


def test_the_second_writer_stops(sources: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing this cache"):
            run(config_for(sources, tmp_path))
        assert contents(tmp_path) == {".lock": b""}
    assert run(config_for(sources, tmp_path))["shards_made"] == 4


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
        ('{"make": {"format": 99}}', "format 99: this version reads 1"),
    ],
)
def test_a_damaged_manifest(sources: Path, tmp_path: Path, text: str, message: str) -> None:
    run(config_for(sources, tmp_path / "c"))
    (tmp_path / "c" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ActivationCache(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c"))


# --------------------------------------------------------------------------------------- bad input


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
        (spoiled(7, [5] * 31 + [None]), r"train.jsonl row 7: tok_ids holds a null"),
        ([["a", "b"]] * 5, r"train.jsonl row 0: tok_ids are list<.*string>, expected"),
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
        ("", "train.jsonl"),
        ("not json\n", "cannot read .*train.jsonl from row 0"),
        ('{"tok_ids": [1, 2]}\n{"tok_ids": [1, 2\n', "cannot read .*train.jsonl from row 0"),
        ('{"ids": [1, 2]}\n', "train.jsonl row 0: no tok_ids, only ids"),
    ],
)
def test_a_file_that_is_no_dataset(sources: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "layer 3 is not there: this model has 0 to 2"),
        ({"tokens": 0}, "--tokens is 0: it must be positive"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"split": "test"}, "holds no test.jsonl"),
        ({"dataset": "./nowhere"}, "no folder here, and no hub dataset's name"),
        ({"device": "nonsense"}, "--device nonsense is not there"),
    ],
)
def test_impossible_settings(
    sources: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", **settings))
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_unreachable_hub(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"cannot get someone/rows/train.jsonl .*hub.*give --dataset the folder"
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset="someone/rows"))


@pytest.mark.parametrize(
    ("dtype", "factor", "message"),
    [
        ("float16", 1e5, r"reach 340000 in rows 0 to 29.*float16 holds 65504 at most; use bfl"),
        ("bfloat16", 1e38, r"--dtype bfloat16 holds 3.38953e\+38 at most; use float32"),
        ("float32", 1e39, "activations at layer 0 are not finite in rows 0 to 29"),
    ],
)
def test_overflow_is_refused(
    sources: Path, tmp_path: Path, dtype: str, factor: float, message: str
) -> None:
    state = make_state(d_model=D_MODEL, d_mlp=24)
    state["embed.weight"] = state["embed.weight"].clamp(-3.4, 3.4) * factor
    if dtype == "bfloat16":  # above bfloat16's largest number, below float32's
        state["embed.weight"].fill_(3.4e38)
        state["pos_embed"].zero_()
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


def test_require_says_what_differs(sources: Path, tmp_path: Path) -> None:
    result = run(config_for(sources, tmp_path / "c"))
    cache = ActivationCache(tmp_path / "c")
    cache.require(layer=1, d_model=D_MODEL, weights_hash=result["weights_hash"])
    with pytest.raises(UserError, match="its d_model is 16, expected 768"):
        cache.require(layer=1, d_model=768)
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
    process = context.Process(target=read_a_pass, args=(folder, send))
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
