"""Caches that comparisons share: their names, what is found, and rows fetched once."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modal_cases import TOKENS, files, write_data
from tiny_factory import write_model

from matryoshka import cache_writer, volume_caches
from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_writer import recipe_of
from matryoshka.errors import UserError
from matryoshka.token_rows import TokenRows
from matryoshka.volume_caches import (
    CacheJob,
    copy_of,
    finish_caches,
    folder_of,
    located,
    make_cache_jobs,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def config_for(data: Path, **settings: Any) -> CacheConfig:
    small: dict[str, Any] = {
        "model": str(data / "model.pt"),
        "dataset": str(data),
        "tokens": TOKENS,
        "layer": 1,
        "rows_per_shard": 8,
    }
    return CacheConfig(**{**small, **settings})


def do(jobs: list[CacheJob]) -> None:
    for job in jobs:
        job.do(CPU)


def make(config: CacheConfig, root: Path, n_parts: int = 4) -> Path:
    jobs = make_cache_jobs(config, root, n_parts)
    do(jobs)
    finish_caches(jobs)
    return jobs[0].folder


def test_a_cache_is_named_by_what_it_is_made_of() -> None:
    def name(**settings: Any) -> str:
        return str(folder_of(CacheConfig(**settings), Path("/v")))

    assert name().startswith("/v/caches/tiny_model.TinyModelTokIds.train.layer3.float16.")
    assert name().endswith(".30000000")
    assert name(batch_size=9) == name()
    others: list[dict[str, Any]] = [
        {"layer": 2}, {"dtype": "float32"}, {"tokens": 5}, {"model": "a/tiny_model"},
        {"dataset": "b/TinyModelTokIds"}, {"keep_begin": True}, {"model_revision": "x"},
        {"dataset_revision": "x"}, {"rows_per_shard": 3}, {"split": "validation"},
    ]  # fmt: skip
    assert len({name(**settings) for settings in others} | {name()}) == 1 + len(others)


def test_a_finished_cache_is_found_and_serves_fewer_tokens(data: Path, tmp_path: Path) -> None:
    config, smaller = config_for(data), config_for(data, tokens=3_000)
    assert located(config, tmp_path) == (folder_of(config, tmp_path), False)
    folder = make(config, tmp_path)
    assert located(config, tmp_path) == (folder, True)
    assert located(smaller, tmp_path) == (folder, True)
    assert located(config_for(data, tokens=5_000), tmp_path)[1] is False
    of_validation = config_for(data, split="validation", tokens=800)
    make(of_validation, tmp_path)
    fewer = config_for(data, split="validation", tokens=700)
    assert located(fewer, tmp_path)[1] is False, "figures are of exactly what was asked for"


def test_two_runs_at_once_leave_one_good_cache(data: Path, tmp_path: Path) -> None:
    """Another run finishes the same cache between this one's parts, whose last come last."""
    config = config_for(data)
    jobs = make_cache_jobs(config, tmp_path, 4)
    do(jobs[:2])
    folder = make(config, tmp_path, n_parts=3)
    do(jobs)
    finish_caches(jobs)
    assert files(folder) == files(make(config, tmp_path / "alone"))


def test_a_cache_of_other_weights_is_refused(data: Path, tmp_path: Path) -> None:
    """The name is the same: somebody has changed what the model's name stands for."""
    config = config_for(data)
    folder = make(config, tmp_path)
    other = config_for(data, model=str(write_model(tmp_path / "model.pt", seed=5)))
    recipe = recipe_of(other, load_source(other, CPU))
    with pytest.raises(UserError, match="its weights_hash is"):
        volume_caches.finished_cache(config, folder, recipe)


def test_a_copy_of_a_cache_beside_it_changes_nothing(data: Path, tmp_path: Path) -> None:
    """Names are compared, and are no patterns."""
    folder = make(config_for(data), tmp_path)
    for root in ("plain", "a[1]?"):
        there = tmp_path / root / folder.name
        shutil.copytree(folder, there)
        shutil.copytree(folder, there.with_name(f"{there.name}.bak"))
        smaller = there.with_name(f"{there.stem}.3")
        assert volume_caches.larger_caches(smaller) == [there]


# ------------------------------------------------------------------------------ rows, fetched once


@pytest.fixture
def hub(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`owner/rows` on the hub has the rows in `data`. Notes the rows that are read off it."""
    read: list[int] = []

    def rows_of(self: TokenRows, start: int, block_size: int) -> Iterator[Any]:
        lines = (data / f"{self.split}.jsonl").read_text().splitlines()
        for i, line in enumerate(lines[start:], start):
            read.append(i)
            yield json.loads(line)

    monkeypatch.setattr(TokenRows, "_hub_rows", rows_of)
    return read


def test_rows_of_the_hub_are_read_once(data: Path, tmp_path: Path, hub: list[int]) -> None:
    config = config_for(data, dataset="owner/rows")
    folder = make(config, tmp_path)
    assert max(hub.count(row) for row in hub) <= 2, "the first row, to see that there is one"
    n_read = len(hub)
    shutil.rmtree(folder)
    make(config, tmp_path)
    assert len(hub) == n_read, "and what is fetched is not fetched again"
    copy = (copy_of(config, tmp_path) / "train.jsonl").read_text().splitlines()
    original = (data / "train.jsonl").read_text().splitlines()
    assert list(map(json.loads, copy)) == list(map(json.loads, original))[: len(copy)]


def test_fetched_rows_make_the_same_cache(data: Path, tmp_path: Path, hub: list[int]) -> None:
    """As `cache_activations.py` makes from the hub, name and all."""
    config = config_for(data, dataset="owner/rows")
    folder = make(config, tmp_path)
    (tmp_path / "alone").mkdir()
    cache_writer.cache_all(tmp_path / "alone", config, load_source(config, CPU))
    assert files(folder) == files(tmp_path / "alone")


def test_a_dataset_that_ends_or_is_not_there_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rows(self: TokenRows, start: int, block_size: int) -> Iterator[Any]:
        raise UserError("no such dataset")
        yield

    monkeypatch.setattr(TokenRows, "_hub_rows", no_rows)
    with pytest.raises(UserError, match="no such dataset"):
        make_cache_jobs(config_for(data, dataset="owner/rows"), tmp_path, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no train\.jsonl"):
        make_cache_jobs(config_for(data, dataset=str(tmp_path / "empty")), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_rows_whose_fetching_is_interrupted_are_fetched_again(
    data: Path, tmp_path: Path, hub: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(data, dataset="owner/rows")
    real = TokenRows._hub_rows

    def breaks(self: TokenRows, start: int, block_size: int) -> Iterator[Any]:
        for i, row in enumerate(real(self, start, block_size)):
            if i == 20:
                raise UserError("no connection")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(TokenRows, "_hub_rows", breaks)
        with pytest.raises(UserError, match="no connection"):
            make_cache_jobs(config, tmp_path, 3)
    assert not list(copy_of(config, tmp_path).iterdir())
    make(config, tmp_path)
