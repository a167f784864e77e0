"""The reader: ranges, checksums, and what the order of its batches promises."""

import hashlib
import itertools
import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_factory import D_MODEL, config_for, cut, flip, numbers, write_cache, write_sources
from tiny_factory import die_with_parent, fresh_processes

from cache_activations import run
from matryoshka import cache_reader
from matryoshka.cache_reader import CHUNK, ActivationCache, _default_max_resident
from matryoshka.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


# Three buffers and a short last chunk; 1,024 does not divide it.
N_TOKENS = 3 * 512 * CHUNK - 10_000 + 77


def test_a_part_of_a_cache_is_a_cache(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "c", 1000)
    cache = ActivationCache(folder, n_tokens=300)
    assert sorted(numbers(next(cache.batches(300, seed=0)))) == list(range(300))
    assert sum(len(batch.acts) for batch in cache.sequential(128)) == 300
    with pytest.raises(UserError, match="holds 1000 activations, not 1001"):
        ActivationCache(folder, n_tokens=1001)


def test_damage_while_reading_is_named(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    (tmp_path / "c" / "00001.acts").write_bytes(b"")
    with pytest.raises(UserError, match="shard 00001 is damaged"):
        next(cache.batches(100, seed=0))


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


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("big") / "c", N_TOKENS, n_shards=5)


@pytest.mark.parametrize("kind", ["acts", "tokens"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_that_verify_or_opening_finds(
    tmp_path: Path, damage: Callable[[Path], object], kind: str
) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    cache.verify()
    damage(tmp_path / "c" / f"00001.{kind}")
    with pytest.raises(UserError, match=rf"shard 00001 is damaged \(.*00001.{kind}"):
        cache.verify()
    if damage is not flip:
        with pytest.raises(UserError, match=rf"shard 00001 is damaged \(00001.{kind}"):
            ActivationCache(tmp_path / "c")


@pytest.mark.parametrize("n_tokens", [None, 700])
def test_what_was_verified_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tokens: int | None
) -> None:
    monkeypatch.setattr(cache_reader, "VERIFIED_AT_ONCE", 128)
    cache = ActivationCache(write_cache(tmp_path / "c", 1000), n_tokens)
    expected = list(itertools.islice(cache.batches(64, seed=1), 25))
    cache.verify(hold_on=torch.device("cpu"))
    shutil.rmtree(tmp_path / "c")
    held = cache.batches(64, seed=1)
    for batch in expected:
        assert torch.equal(next(held), batch)
    with pytest.raises(UserError, match="shard 00000 is damaged"):
        next(cache.batches(64, seed=1))  # it is held once


def test_what_does_not_fit_is_verified_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_reader, "_default_max_resident", lambda _: 999 * 16)
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    cache.verify(hold_on=torch.device("cpu"))
    assert cache._resident is None


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

    def choose(name: str) -> Callable[..., Any]:
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
    cache._bytes_each["acts"] = 2**30 // cache.n_tokens + 1  # as if each activation were that large
    refused("streaming")


def test_a_gpu_lends_a_cache_a_share_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert _default_max_resident(torch.device("cuda")) == 700
    assert _default_max_resident(torch.device("cpu")) == 2**30


def as_any(value: Any) -> Any:
    """Hides a value's type from the type checker: that it is wrong is what is tested."""
    return value


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.tokens(-1, 5), "start must be a whole number between 0 and 1000, got -1"),
        (lambda c: c.tokens(1.0, 5), "start must be a whole number between 0 and 1000, got 1.0"),
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
        (
            lambda c: ActivationCache(c.folder, n_tokens=as_any(10.0)),
            "n_tokens must be .* of 1 or more, got 10.0",
        ),
    ],
)
def test_impossible_requests_say_what_would_be_right(
    tmp_path: Path, ask: Callable[[ActivationCache], object], message: str
) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    with pytest.raises(ValueError, match=message):
        ask(cache)


def test_any_range_is_what_was_written(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000, n_shards=4))
    for start, stop in np.random.default_rng(0).integers(1001, size=(300, 2)).tolist():
        if start <= stop:
            i = np.arange(start, stop)
            assert numbers(cache.acts(start, stop)).tolist() == i.tolist()
            tok_ids, rows, positions = (t.tolist() for t in cache.tokens(start, stop))
            assert tok_ids == (i % 9000).tolist()
            assert rows == (i // 100).tolist()
            assert positions == (i % 100).tolist()


def test_a_range_may_be_empty_or_go_past_the_end(tmp_path: Path) -> None:
    cache = ActivationCache(write_cache(tmp_path / "c", 1000))
    assert cache.acts(1000, 1000).shape == (0, 4)
    assert cache.acts(7, 7).shape == (0, 4)
    assert len(cache.tokens(as_any(np.int64(990)), 2000)[0]) == 10
    assert torch.equal(cache.acts(990, 2000), cache.acts(990, 1000))
    for n_tokens in (0, -5):
        with pytest.raises(UserError, match=f"holds 1000 activations, not {n_tokens}"):
            ActivationCache(tmp_path / "c", n_tokens=n_tokens)


def test_a_cache_without_activations_is_refused(tmp_path: Path) -> None:
    """Text whose rows have nothing but special tokens makes one."""
    folder = write_cache(tmp_path / "c", 1000)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"n_tokens": 0}))
    with pytest.raises(UserError, match="holds no activations: cache other text"):
        ActivationCache(folder)


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


@pytest.mark.processes
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    n_tokens, d_model = 1_200_000, 32
    folder = write_cache(tmp_path / "c", n_tokens, d_model=d_model, n_shards=24)
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=read_a_pass, args=(folder, send), daemon=True)
    process.start()
    assert receive.poll(300)
    grown = receive.recv()
    process.join()
    shutil.rmtree(folder)
    # 154 MB of activations; two buffers of them are 2 x 17 MB, a third may be being freed.
    assert grown < 100e6
