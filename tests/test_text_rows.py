"""Rows of text against packing by hand; what around a text is the tokenizer's."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers_factory import D_VOCAB, make_documents, save_tokenizer, write_documents

from matryoshka.documents import Documents
from matryoshka.errors import UserError
from matryoshka.sources import TokenBlock
from matryoshka.text_rows import TextRows, Tokenizer
from matryoshka.transformers_model import TransformersModel

ALL = 10**9
TEXTS = make_documents()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By kind, a `Tokenizer` without a model behind it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    import transformers

    @cache
    def of_kind(kind: str) -> Tokenizer:
        saved = save_tokenizer(folder / kind, kind)
        model = object.__new__(TransformersModel)
        model.tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        model.d_vocab = D_VOCAB
        return Tokenizer(model, kind)

    return of_kind


@pytest.fixture
def rows_of(tokenizers: Callable[[str], Any], tmp_path: Path) -> Callable[..., TextRows]:
    def rows_of(
        texts: list[str] = TEXTS, kind: str = "gpt2", context: int = 16, **rest: Any
    ) -> TextRows:
        file = write_documents(tmp_path / "train.jsonl", texts)
        rest = {"n_tokens": ALL, **rest}
        return TextRows(Documents(str(file)), tokenizers(kind), context, **rest)

    return rows_of


def cut(ids: list[int], length: int) -> list[list[int]]:
    return [ids[i : i + length] for i in range(0, len(ids), length)]


def whole(rows: TextRows, size: int = 7) -> TokenBlock:
    """Every row in one block."""
    blocks = list(rows.blocks(0, None, size))
    real = [np.ones_like(b.is_kept) if b.is_real is None else b.is_real for b in blocks]
    ids, kept = ([getattr(b, name) for b in blocks] for name in ("tok_ids", "is_kept"))
    return TokenBlock(0, np.concatenate(ids), np.concatenate(kept), np.concatenate(real))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_packed_rows_are_the_documents_with_a_separator_after_each(
    rows_of: Callable[..., TextRows], kind: str
) -> None:
    rows = rows_of(kind=kind)
    before, after = rows.tokenizer.around
    assert (len(before), len(after)) == {"gpt2": (0, 0), "llama": (1, 0), "bert": (1, 1)}[kind]
    end = rows.tokenizer.end_id
    stream = [i for ids in rows.tokenizer.encode(TEXTS) for i in [*ids, end]]
    n_text = 16 - len(before) - len(after)
    expected = [[*before, *part, *after] for part in cut(stream, n_text)]
    block = whole(rows)
    assert [row[real].tolist() for row, real in zip(block.tok_ids, block.is_real, strict=True)] == (
        expected
    )
    assert block.is_real[:-1].all()  # only the last row is padded
    special = sorted(rows.tokenizer.special_ids)
    assert np.array_equal(block.is_kept, block.is_real & ~np.isin(block.tok_ids, special))
    assert block.is_kept.sum() == sum(map(len, rows.tokenizer.encode(TEXTS)))
    kept_all = whole(rows_of(kind=kind, keep_special=True))
    assert np.array_equal(kept_all.is_kept, block.is_real)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "bare"])
def test_padded_rows_are_of_one_document_each(rows_of: Callable[..., TextRows], kind: str) -> None:
    rows = rows_of(kind=kind, packing="padded")
    before, after = rows.tokenizer.around
    expected = [
        [*before, *part, *after]
        for ids in rows.tokenizer.encode(TEXTS)
        for part in cut(ids, 16 - len(before) - len(after))
    ]
    block = whole(rows)
    assert [row[real].tolist() for row, real in zip(block.tok_ids, block.is_real, strict=True)] == (
        expected
    )
    assert block.is_kept.sum() == sum(map(len, rows.tokenizer.encode(TEXTS)))


@given(
    texts=st.lists(st.text("ab \u00e9\n", max_size=30), max_size=12),
    context=st.integers(3, 9),
    size=st.integers(1, 5),
    start=st.integers(0, 4),
    wanted=st.integers(1, 60),
    packing=st.sampled_from(["packed", "padded"]),
)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_rows_end_with_the_one_that_completes_the_count(
    rows_of: Callable[..., TextRows],
    texts: list[str],
    context: int,
    size: int,
    start: int,
    wanted: int,
    packing: str,
) -> None:
    texts = [*texts, "a"]
    every = whole(rows_of(texts, "llama", context, packing=packing))
    n_kept = every.is_kept.sum(axis=1).cumsum()
    n_rows = min(len(n_kept), int((n_kept < wanted).sum()) + 1)
    rows = rows_of(texts, "llama", context, packing=packing, n_tokens=wanted)
    blocks = list(rows.blocks(0, None, size))
    assert [len(b.tok_ids) for b in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert np.array_equal(np.concatenate([b.tok_ids for b in blocks]), every.tok_ids[:n_rows])
    assert [b.first_row for b in blocks] == list(range(0, n_rows, size))
    later = list(rows.blocks(start * size, None, size))
    assert [b.tokens.tolist() for b in later] == [b.tokens.tolist() for b in blocks[start:]]


def test_a_range_of_rows_is_as_in_all_of_them(rows_of: Callable[..., TextRows]) -> None:
    rows = rows_of()
    every = whole(rows)
    found = list(rows.blocks(6, 11, 3))
    assert [b.first_row for b in found] == [6, 9]
    assert np.array_equal(np.concatenate([b.tok_ids for b in found]), every.tok_ids[6:11])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_begin_as_they_are_told_to(rows_of: Callable[..., TextRows], kind: str) -> None:
    begin_id = rows_of(kind=kind).tokenizer.begin_id
    always = whole(rows_of(kind=kind, begin="always")).tok_ids
    never = whole(rows_of(kind=kind, begin="never")).tok_ids
    auto = whole(rows_of(kind=kind)).tok_ids
    assert (always[:, 0] == begin_id).all()
    assert not (always[:, 1] == begin_id).all()
    assert not (never[:, 0] == begin_id).all()
    assert np.array_equal(auto, always if kind == "llama" else never)


def test_the_identity_tells_rows_apart(rows_of: Callable[..., TextRows]) -> None:
    same = rows_of().identity()
    assert rows_of().identity() == same
    for name, change in {
        "dataset_sha256": {"texts": TEXTS[:-1]},
        "tokenizer_hash": {"kind": "llama"},
        "context": {"context": 17},
        "packing": {"packing": "padded"},
        "begin": {"begin": "always"},
        "keep_begin": {"keep_special": True},
    }.items():
        assert rows_of(**change).identity()[name] != same[name]


def test_a_tokenizer_of_other_merges_has_another_hash(
    tokenizers: Callable[[str], Any], tmp_path: Path
) -> None:
    import transformers

    one = tokenizers("gpt2")
    saved = save_tokenizer(tmp_path, "gpt2")
    text = (saved / "tokenizer.json").read_text()
    hashes = []
    for changed in (text, text.replace('"add_prefix_space": false', '"add_prefix_space": true')):
        (saved / "tokenizer.json").write_text(changed)
        model = object.__new__(TransformersModel)
        model.tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        model.d_vocab = D_VOCAB
        hashes.append(Tokenizer(model, "other").hash)
    assert hashes[0] == one.hash
    assert hashes[1] != one.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bare"}, "no token that ends or begins a text.*give --packing padded"),
        (
            {"kind": "bare", "packing": "padded", "begin": "always"},
            "bare has no token that begins a text: --begin always cannot be",
        ),
        ({"kind": "bert", "context": 2}, "--context 2 leaves no room for text"),
        ({"packing": "loose"}, "--packing must be one of packed, padded, got loose"),
        ({"begin": "maybe"}, "--begin must be one of auto, always, never, got maybe"),
    ],
)
def test_settings_that_the_tokenizer_cannot_have(
    rows_of: Callable[..., TextRows], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(**changes)


def test_ids_out_of_the_models_vocabulary_are_refused(
    rows_of: Callable[..., TextRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of()
    monkeypatch.setattr(rows.tokenizer, "d_vocab", 20)
    with pytest.raises(UserError, match=r"tokenizer gpt2 gives id .* vocabulary, 0 to 19: it is"):
        whole(rows)
