"""Rows of token ids: from folders and the hub, and what is said of wrong ones."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cache_factory import config_for, hub_of, kept_tokens, write_sources
from tiny_factory import make_rows, write_dataset, write_rows

from cache_activations import run
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.tiny_model import BEGIN, PAD
from matryoshka.token_rows import TokenRows, count_rows, kept_positions


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


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
    assert hub_cache.recipe["dataset_sha256"] is None
    (tmp_path / "hub" / "manifest.json").unlink()
    (tmp_path / "hub" / "00002.json").unlink()
    assert run(config_for(sources, tmp_path / "hub", **hub))["shards_made"] == 1
    assert ActivationCache(tmp_path / "hub").content_hash == local.content_hash


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
    extras: list[dict[str, Any]] = [
        {},
        {"story": 1},
        {"story": "one"},
        {"story": {"n": [None]}, "late": 5},
    ]
    lines = [json.dumps({**extras[i // 10], "tok_ids": row}) for i, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("\n" + "\r\n\n".join(lines))
    run(config_for(sources, tmp_path / "c", dataset=str(tmp_path)))
    cache = ActivationCache(tmp_path / "c")
    found = torch.stack(cache.tokens(0, cache.n_tokens), dim=1).tolist()
    assert list(map(tuple, found)) == kept_tokens(rows)


def test_unreachable_hub(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"cannot get someone/rows/train.jsonl .*hub.*give --dataset the folder"
    with pytest.raises(UserError, match=message):
        run(config_for(sources, tmp_path / "c", dataset="someone/rows"))


@pytest.mark.parametrize("block_size", [1, 7, 100, 1000])
def test_reads_any_range_in_blocks(sources: Path, block_size: int) -> None:
    rows = make_rows(100, seq=32)
    for start, end in [(0, None), (0, 100), (13, 57), (99, 100), (40, 40), (90, 500), (100, None)]:
        blocks = list(TokenRows(str(sources)).read(start, end, 10_000, block_size))
        assert [row for block in blocks for row in block.tolist()] == rows[start:end]
        assert {len(block) for block in blocks[:-1]} <= {block_size}
        assert all(block.dtype == np.int64 and block.ndim == 2 for block in blocks)


def test_the_first_wrong_row_is_named(tmp_path: Path) -> None:
    """Also where a later one is wrong in a kind that is noticed sooner."""
    (tmp_path / "train.jsonl").write_text('{"tok_ids": [1]}\n{"tok_ids": [99]}\nnot json\n')
    with pytest.raises(UserError, match=r"train.jsonl row 1: token id 99 is out .*, 0 to 49"):
        list(TokenRows(str(tmp_path)).read(0, None, 50))
    with pytest.raises(UserError, match=r"train.jsonl row 2 is not JSON"):
        list(TokenRows(str(tmp_path)).read(2, None, 50))
    assert len(next(TokenRows(str(tmp_path)).read(0, 2, 100))) == 2


def test_impossible_ranges_say_what_would_be_right(sources: Path) -> None:
    token_rows = TokenRows(str(sources))
    with pytest.raises(ValueError, match="start must be a whole number of 0 or more, got -1"):
        next(token_rows.read(-1, None, 10_000))
    with pytest.raises(ValueError, match="end must be a whole number of 5 or more, got 4"):
        next(token_rows.read(5, 4, 10_000))


def test_what_is_kept_of_a_row() -> None:
    rows = np.array([[BEGIN, 5, PAD, BEGIN], [PAD, PAD, 0, 9999]])
    kept = [[False, True, False, False], [False, False, True, True]]
    assert kept_positions(rows, keep_begin=False).tolist() == kept
    kept[0] = [True, True, False, True]
    assert kept_positions(rows, keep_begin=True).tolist() == kept


@pytest.mark.parametrize("keep_begin", [False, True])
def test_counts_as_one_row_after_another_would(tmp_path: Path, keep_begin: bool) -> None:
    rows = make_rows(60, seq=16)
    rows[3] = [BEGIN] + [PAD] * 15
    kept = [len(kept_tokens([row], keep_begin)) for row in rows]
    token_rows = TokenRows(str(write_rows(tmp_path, rows)))
    totals = list(itertools.accumulate(kept))
    for wanted in (1, totals[1], totals[1] + 1, totals[30] - 1, totals[-1], totals[-1] + 1):
        n_rows = next((i + 1 for i, total in enumerate(totals) if total >= wanted), 60)
        found = count_rows(token_rows, wanted, keep_begin, 10_000)
        assert found == (n_rows, totals[n_rows - 1])


def test_counts_beyond_one_block(tmp_path: Path) -> None:
    token_rows = TokenRows(str(write_rows(tmp_path, [[5, 6, PAD]] * 2500)))
    assert count_rows(token_rows, 4801, False, 10_000) == (2401, 4802)
    assert count_rows(token_rows, 10**6, False, 10_000) == (2500, 5000)


def test_the_hubs_rows_are_read_from_any_row_on(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", hub_of(sources, []))
    rows = make_rows(100, seq=32)
    for start, end in [(0, None), (13, 57), (99, 100), (100, None)]:
        blocks = TokenRows("someone/rows").read(start, end, 10_000, block_size=9)
        assert [row for block in blocks for row in block.tolist()] == rows[start:end]


def test_a_local_file_is_known_by_its_bytes(sources: Path) -> None:
    data = (sources / "train.jsonl").read_bytes()
    assert TokenRows(str(sources), "train", "v1").identity() == {
        "dataset": str(sources),
        "dataset_revision": "v1",
        "dataset_bytes": len(data),
        "dataset_sha256": hashlib.sha256(data).hexdigest(),
        "split": "train",
    }
    hub = TokenRows("someone/rows", "validation").identity()
    assert (hub["split"], hub["dataset_bytes"], hub["dataset_sha256"]) == ("validation", None, None)
