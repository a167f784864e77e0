"""Caches of arrays: what is in them, that no kill spoils them, and which arrays are refused."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_factory import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import cache_activations
import train
from matryoshka import arrays
from matryoshka.array_files import cache_arrays, open_arrays
from matryoshka.arrays import NO_ID, Array, named_array
from matryoshka.errors import UserError

WIDTH = 6


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save(path: Path, values: torch.Tensor) -> Path:
    """Writes `values` as the path's suffix says, and returns the path."""
    if path.suffix == ".npy":
        np.save(path, values.numpy())
    elif path.suffix == ".pt":
        torch.save(values, path)
    else:
        save_file({"values": values.contiguous()}, path)
    return path


def whole(cache: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """All activations of a cache, and [token id, row, position] of each."""
    tokens = torch.stack(cache.tokens(0, cache.n_tokens), dim=1)
    return cache.acts(0, cache.n_tokens), tokens.tolist()


FILES = [(".npy", torch.float16), (".npy", torch.float32), (".npy", torch.float64)]
FILES += [
    (suffix, dtype)
    for suffix in (".pt", ".safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
]


@pytest.mark.parametrize(("suffix", "dtype"), FILES)
def test_a_file_is_cached_as_it_is(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    values = randn(50, WIDTH, dtype=dtype)
    path = save(tmp_path / f"acts{suffix}", values)
    cache = cache_arrays(tmp_path / "c", open_arrays([path]), dtype="float32", rows_per_shard=20)
    acts, tokens = whole(cache)
    cache.verify()
    assert len(cache.shards) == 3
    assert torch.equal(acts, values.float())
    assert tokens == [[NO_ID, i, 0] for i in range(50)]


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_rows_of_tokens_keep_their_rows_and_token_ids(tmp_path: Path, suffix: str) -> None:
    values = randn(9, 5, WIDTH)
    tok_ids = torch.arange(45).reshape(9, 5) + 100
    ids = open_arrays([save(tmp_path / f"ids{suffix}", tok_ids.int())], "--token-ids")
    acts = open_arrays([save(tmp_path / f"acts{suffix}", values)])
    cache = cache_arrays(tmp_path / "c", acts, ids, dtype="float32", rows_per_shard=2)
    found, tokens = whole(cache)
    assert torch.equal(found, values.reshape(45, WIDTH))
    assert tokens == [[100 + i, i // 5, i % 5] for i in range(45)]
    assert cache.manifest.n_rows == 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_are_rounded_once_to_the_caches_dtype(tmp_path: Path, dtype: str) -> None:
    values = randn(30, WIDTH, dtype=torch.float64)
    acts, _ = whole(cache_arrays(tmp_path / "c", [values], dtype=dtype))
    assert torch.equal(acts, values.to(getattr(torch, dtype)))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=4),
    id_cuts=st.lists(st.integers(0, 40), max_size=4),
    at_once=st.integers(1, 50),
)
def test_how_the_rows_are_cut_into_arrays_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], id_cuts: list[int], at_once: int
) -> None:
    folder, values = tmp_path_factory.mktemp("cuts"), randn(40, 3, WIDTH)
    tok_ids = torch.arange(120).reshape(40, 3)

    def parts(of: torch.Tensor, at: list[int]) -> Iterator[torch.Tensor]:
        bounds = [0, *sorted(at), 40]
        return (of[a:b] for a, b in itertools.pairwise(bounds))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "ACTS_AT_ONCE", at_once)
        cache_arrays(folder / "a", parts(values, cuts), parts(tok_ids, id_cuts), rows_per_shard=7)
    cache_arrays(folder / "b", [values.numpy()], [tok_ids.numpy()], rows_per_shard=7)
    assert contents(folder / "a") == contents(folder / "b")


def test_order_in_memory_and_byte_order_make_no_difference(tmp_path: Path) -> None:
    values = randn(30, WIDTH).numpy()
    np.save(tmp_path / "columns.npy", np.asfortranarray(values))
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    for name in ("columns.npy", "big.npy"):
        cache = cache_arrays(tmp_path / name[:-4], open_arrays([tmp_path / name]), dtype="float32")
        assert torch.equal(cache.acts(0, 30), torch.from_numpy(values))


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "notes.txt").write_text("how these were made")
    parts = [randn(4, WIDTH, seed=i) for i in range(3)]
    for i, suffix in enumerate((".npy", ".pt", ".safetensors")):
        save(tmp_path / "acts" / f"{i}{suffix}", parts[i])
    cache = cache_arrays(tmp_path / "c", open_arrays([tmp_path / "acts"]), dtype="float32")
    assert torch.equal(cache.acts(0, 12), torch.cat(parts))


def test_only_a_few_activations_are_read_at_a_time(tmp_path: Path) -> None:
    reads = []

    def read(start: int, stop: int) -> torch.Tensor:
        reads.append(stop - start)
        return torch.ones(stop - start, 4, WIDTH)

    array = Array("ones", (5000, 4, WIDTH), torch.float32, read)
    cache = cache_arrays(tmp_path / "c", [array], rows_per_shard=3000)
    assert cache.n_tokens == sum(reads) * 4 == 20_000
    assert max(reads) * 4 <= arrays.ACTS_AT_ONCE


@pytest.mark.parametrize("n_tokens", [1, 59, 60, 61, 118])
def test_the_first_so_many_activations(tmp_path: Path, n_tokens: int) -> None:
    values = randn(40, 3, WIDTH)

    def endless() -> Iterator[torch.Tensor]:
        for _ in range(100):
            yield values
        raise AssertionError("more was read than is needed")

    cache = cache_arrays(
        tmp_path / "c", endless(), dtype="float32", n_tokens=n_tokens, rows_per_shard=7
    )
    assert torch.equal(cache.acts(0, 10**6), values.reshape(120, WIDTH)[:n_tokens])
    assert cache.manifest.n_rows == -(-n_tokens // 3)


# -------------------------------------------------------------------------------------- going on


def arrays_for_kills() -> Iterator[torch.Tensor]:
    return (randn(n, 3, WIDTH, seed=n) for n in (11, 1, 8))


def test_killed_at_any_moment_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave is what is on disk at that moment: a copy is taken at each step."""
    folder, moments = tmp_path / "whole", itertools.count()

    def snapshot_before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            shutil.copytree(folder, tmp_path / str(next(moments)))
            return function(*args)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", snapshot_before(os.replace))
        patch.setattr(os, "fsync", snapshot_before(os.fsync))
        cache_arrays(folder, arrays_for_kills(), rows_per_shard=6)
    expected = contents(folder)
    n_moments = next(moments)
    assert n_moments == 4 * 6 + 2  # 4 shards and a manifest: each file is synced, then renamed
    for i in range(n_moments):
        assert contents(tmp_path / str(i)) != expected
        cache_arrays(tmp_path / str(i), arrays_for_kills(), rows_per_shard=6)
        assert contents(tmp_path / str(i)) == expected


def test_the_same_arrays_again_are_compared_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    cache_arrays(folder, arrays_for_kills(), rows_per_shard=6)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}
    cache = cache_arrays(folder, arrays_for_kills(), rows_per_shard=6)
    fewer = cache_arrays(folder, arrays_for_kills(), rows_per_shard=6, n_tokens=12)
    assert cache.n_tokens == fewer.n_tokens == 60
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")} == before


def test_other_arrays_are_refused_and_the_cache_is_untouched(tmp_path: Path) -> None:
    folder, values = tmp_path / "c", randn(20, WIDTH)
    ids = torch.arange(20)
    cache_arrays(folder, [values], [ids], rows_per_shard=6)
    changed, other_ids = values.clone(), ids.clone()
    changed[13, 2] += 1
    other_ids[3] = 77
    others: list[tuple[torch.Tensor, torch.Tensor | None, dict[str, Any], str]] = [
        (changed, ids, {}, "rows 12 to 17 differ"),
        (values, other_ids, {}, "rows 0 to 5 differ"),
        (values[:17], ids[:17], {}, "shard 00002 ends before row 18"),
        (values[:18], ids[:18], {}, "they have more than 18 rows"),
        (torch.cat([values, values]), torch.cat([ids, ids]), {}, "shard 00003 ends before row 20"),
        (values, None, {}, "its token_ids is True"),
        (values, ids, {"dtype": "float32"}, "its dtype is float16"),
        (values[:, :3], ids, {}, "its d_model is 6"),
    ]
    before = contents(folder)
    for acts, tok_ids, changes, named in others:
        token_ids = None if tok_ids is None else [tok_ids]
        with pytest.raises(UserError, match=named):
            cache_arrays(folder, [acts], token_ids, rows_per_shard=6, **changes)
        assert contents(folder) == before


# -------------------------------------------------------------------------------------- bad input


def with_value(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = randn(30, WIDTH, dtype=dtype)
    values[17, 3] = value
    return values


def good() -> torch.Tensor:
    return randn(10, WIDTH)


IDS = torch.arange(10)
BAD: list[tuple[str, Callable[[], list[Any]], list[Any] | None, str]] = [
    ("NaN", lambda: [good(), with_value(np.nan)], None, "array 1 row 17 holds nan"),
    ("infinite", lambda: [good(), with_value(-np.inf)], None, "array 1 row 17 holds -inf"),
    ("too large", lambda: [with_value(7e4)], None, "array 0 row 17 reaches 70000: float16 holds"),
    ("other width", lambda: [good(), randn(3, 7)], None, r"array 1 has shape \[3, 7\], but array"),
    ("other seq", lambda: [randn(2, 3, 4), randn(2, 4, 4)], None, "only the first number"),
    ("other axes", lambda: [good(), randn(2, 1, 6)], None, r"array 1 has shape \[2, 1, 6\]"),
    ("other dtype", lambda: [good(), good().double()], None, "array 1 has dtype float64, but"),
    ("integers", lambda: [IDS[:, None]], None, "array 0 has dtype int64; activations are"),
    ("complex", lambda: [good() + 0j], None, "array 0 has dtype complex64"),
    ("text", lambda: [np.array([["a"]])], None, "array 0 has dtype <U1"),
    ("a list", lambda: [[[0.5]]], None, "array 0 is a list"),
    ("sparse", lambda: [good().to_sparse()], None, "sparse"),
    ("one axis", lambda: [good()[0]], None, r"array 0 has shape \[6\]"),
    ("four axes", lambda: [randn(1, 2, 3, 4)], None, r"array 0 has shape \[1, 2, 3, 4\]"),
    ("no width", lambda: [randn(3, 0)], None, r"array 0 has shape \[3, 0\]"),
    ("nothing", list, None, "no arrays"),
    ("no rows", lambda: [good()[:0]], None, "hold no activations"),
    ("fewer ids", lambda: [good()], [IDS[:9]], "token ids end after 9 rows, the activations go"),
    ("more ids", lambda: [good()], [IDS, IDS], "activations end after 10 rows, the token ids go"),
    ("no ids", lambda: [good()], [], "token ids end after 0 rows"),
    ("ids of rows", lambda: [good()], [IDS[:, None]], r"token ids are \[n\] beside"),
    ("no seq", lambda: [randn(2, 3, 4)], [IDS[:6]], r"token ids are \[n_rows, 3\] beside"),
    ("negative", lambda: [good()], [IDS - 4], "token id array 0 row 0 holds -4"),
    ("too large an id", lambda: [good()], [IDS + 2**31 - 5], "row 5 holds 2147483648"),
    ("float ids", lambda: [good()], [IDS.float()], "token id array 0 has dtype float32"),
]


@pytest.mark.parametrize(("arrays", "token_ids", "named"), [case[1:] for case in BAD], ids=[
    case[0] for case in BAD
])  # fmt: skip
def test_bad_arrays_are_refused_before_a_cache_is_finished(
    tmp_path: Path, arrays: Callable[[], list[Any]], token_ids: list[Any] | None, named: str
) -> None:
    with pytest.raises(UserError, match=named) as error:
        cache_arrays(tmp_path / "c", arrays(), token_ids, rows_per_shard=4)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float64"}, "dtype must be one of float16, bfloat16, float32, got float64"),
        ({"n_tokens": 0}, "n_tokens must be a whole number"),
        ({"rows_per_shard": 0}, "rows_per_shard must be a whole number"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        cache_arrays(tmp_path / "c", [good()], **changes)
    assert not (tmp_path / "c").exists()


def test_one_array_instead_of_a_list_is_refused(tmp_path: Path) -> None:
    for one in (good(), good().numpy()):
        with pytest.raises(UserError, match="got one array"):
            cache_arrays(tmp_path / "c", one)


def test_bad_files_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", good().numpy())
    data = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:-3])
    for suffix in (".npy", ".pt", ".safetensors"):
        (tmp_path / f"text{suffix}").write_text("not an array")
    torch.save({"acts": good()}, tmp_path / "dict.pt")
    torch.save(good(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"a": good(), "b": good()}, tmp_path / "two.safetensors")
    save_file({"a": torch.ones(3, dtype=torch.bool)}, tmp_path / "bools.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "acts.npz").write_bytes(b"")
    named = {
        "objects.npy": "cannot be read",
        "cut.npy": "cannot be read",
        "text.npy": "cannot be read",
        "text.pt": "cannot be read",
        "text.safetensors": "cannot be read",
        "dict.pt": "holds a dict, expected one tensor",
        "old.pt": "cannot be read",
        "two.safetensors": r"holds 2 tensors \(a, b\), expected one",
        "bools.safetensors": "has dtype BOOL, which cannot be read",
        "folder": "is a folder without .npy, .pt, .safetensors files",
        "acts.npz": "ends in .npy, .pt, .safetensors",
        "nowhere.npy": "is not there",
    }
    for name, words in named.items():
        with pytest.raises(UserError, match=words) as error:
            open_arrays([tmp_path / name])
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_no_pickled_code_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        open_arrays([tmp_path / "evil.pt"])
    assert not (tmp_path / "ran").exists()


def test_a_value_that_is_not_finite_is_named_by_file_and_row(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.npy", good()), save(tmp_path / "b.npy", with_value(np.nan))]
    with pytest.raises(UserError, match=r"b\.npy row 17 holds nan"):
        cache_arrays(tmp_path / "c", open_arrays(files), rows_per_shard=4)


def test_values_of_an_array_that_torch_has_not_are_not_read() -> None:
    with pytest.raises(UserError, match="NumPy has no bfloat16"):
        named_array("acts.npy", np.zeros((2, 2), dtype="V2"))


def test_what_is_behind_a_cache_works_on_arrays(tmp_path: Path) -> None:
    """Training and a refit; the evaluation has its own tests."""
    cache_arrays(tmp_path / "c", [randn(700, WIDTH)], rows_per_shard=300)
    small: dict[str, Any] = {"n_steps": 20, "batch_size": 64, "device": "cpu"}
    small |= {"n_latents": 16, "n_prefixes": 3, "target_l0": 2.0, "cache": str(tmp_path / "c")}
    results = train.run(train.Config(**small, out=str(tmp_path / "run"), refit=True))
    assert results["cache"]["make"]["source"] == "arrays"
    assert len(list((tmp_path / "run" / "refit").glob("*.safetensors"))) == 2


# ------------------------------------------------------------------------------- the command line


def test_the_command_line_caches_files_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, tok_ids = randn(40, 3, WIDTH), torch.arange(120).reshape(40, 3)
    save(tmp_path / "0.npy", values[:30])
    save(tmp_path / "1.npy", values[30:])
    save(tmp_path / "ids.pt", tok_ids)
    argv = ["--activations", *(str(tmp_path / name) for name in ("0.npy", "1.npy"))]
    argv += [f"--token-ids={tmp_path / 'ids.pt'}", f"--out={tmp_path / 'c'}"]
    cache_activations.main(argv)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3  # the table, and nothing to say
    cache_arrays(tmp_path / "python", [values], [tok_ids], n_tokens=30_000_000)
    assert contents(tmp_path / "c") == contents(tmp_path / "python")
    cache_activations.main([*argv[:-1], f"--out={tmp_path / 'few'}", "--tokens=50"])
    assert "leaves out 70 activations of the files" in capsys.readouterr().out
