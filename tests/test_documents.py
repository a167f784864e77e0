"""Documents out of files, folders and the hub; and what is said of what is no text."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers_factory import write_documents

from matryoshka.documents import Documents, batched
from matryoshka.errors import UserError

TEXTS = ["One day,", "a caf\u00e9\nof two lines", "and \U0001f98a"]


def write_parquet(file: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": text, "n": 1} for text in TEXTS])
    pyarrow.parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)],
)
def test_a_file_is_read_compressed_or_not(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_documents(tmp_path / "plain.jsonl", TEXTS).read_bytes()
    file = tmp_path / f"some.v2.jsonl{suffix}"
    file.write_bytes(compress(plain))
    assert list(Documents(str(file)).read()) == TEXTS
    lines = tmp_path / f"lines.txt{suffix}"
    lines.write_bytes(compress(b"one\n\ntwo\n"))
    assert list(Documents(str(lines)).read()) == ["one", "two"]


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    assert list(Documents(str(tmp_path / "a.parquet")).read()) == TEXTS


def test_a_folders_files_are_read_by_name(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write_documents(tmp_path / "data" / f"train-0000{i}-of-00003.jsonl", [TEXTS[i]])
    write_documents(tmp_path / "validation.jsonl", ["held out"])
    (tmp_path / "train.md").write_text("no data")
    assert list(Documents(str(tmp_path)).read()) == TEXTS
    assert list(Documents(str(tmp_path), "validation").read()) == ["held out"]
    write_documents(tmp_path / "test" / "any.jsonl", ["in a folder"])
    assert list(Documents(str(tmp_path), "test").read()) == ["in a folder"]


@pytest.mark.parametrize("name", ["a[1]", "b*", "{a,b}", "50%20", "x#y", "a b", "\u00e9"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("a1", "b", "bb", "50 20", "x"):
        write_documents(tmp_path / other / "train.jsonl", ["of another"])
    file = write_documents(tmp_path / name / "train.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path)
    for dataset in (str(file), str(file.parent), name):
        assert list(Documents(dataset).read()) == TEXTS


def test_texts_that_are_empty_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": ""}\n{"text": null}\n{"text": "two"}\n')
    assert list(Documents(str(file)).read()) == ["one", "two"]


def test_a_hub_dataset_is_asked_for_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return [{"story": text} for text in TEXTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = Documents("someone/stories", "test", "story", "part", "v1")
    assert list(documents.read()) == TEXTS
    settings = {"split": "test", "revision": "v1", "streaming": True}
    assert asked == [(("someone/stories", "part"), settings)]
    assert documents.identity()["dataset_sha256"] is None


def test_the_identity_of_files_is_what_they_hold(tmp_path: Path) -> None:
    file = write_documents(tmp_path / "train.jsonl", TEXTS)
    of_file, of_folder = Documents(str(file)).identity(), Documents(str(tmp_path)).identity()
    assert of_file["dataset_bytes"] == of_folder["dataset_bytes"] == file.stat().st_size
    assert of_file["dataset_sha256"] == of_folder["dataset_sha256"]
    write_documents(file, TEXTS[::-1])
    assert Documents(str(file)).identity()["dataset_sha256"] != of_file["dataset_sha256"]


def test_batches_hold_so_many_characters() -> None:
    texts = ["ab", "c", "def", "g", "hijkl", "m"]
    assert list(batched(iter(texts), 4)) == [["ab", "c", "def"], ["g", "hijkl"], ["m"]]


def documents_in(folder: Path, name: str) -> Documents:
    """Something that is wrong, by name."""
    write_documents(folder / "a.jsonl", TEXTS)
    (folder / "numbers.jsonl").write_text('{"text": 3.5}\n')
    (folder / "late.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{nope\n')
    (folder / "data.csv").write_text("text\nfine\n")
    (folder / "cut.parquet").write_bytes(b"PAR1")
    for one in ("train.txt", "train.jsonl"):
        (folder / "mixed" / one).parent.mkdir(exist_ok=True)
        (folder / "mixed" / one).write_text('{"text": "fine"}\n')
    return {
        "column": Documents(str(folder / "a.jsonl"), column="story"),
        "number": Documents(str(folder / "a.jsonl"), column="n"),
        "float": Documents(str(folder / "numbers.jsonl")),
        "late": Documents(str(folder / "late.jsonl")),
        "csv": Documents(str(folder / "data.csv")),
        "cut": Documents(str(folder / "cut.parquet")),
        "mixed": Documents(str(folder / "mixed")),
        "folder": Documents(str(folder), "test"),
        "nowhere": Documents(str(folder / "nowhere.jsonl")),
        "nothing": Documents(""),
        "mistyped": Documents("no_folder/train.jsonl.gz"),
        "hub": Documents("someone/stories"),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", "document 0: there is no column story, only text, n; give --text-column"),
        ("number", "document 0: column n holds 1, expected text; give --text-column another"),
        ("float", "document 0: column text holds 3.5, expected text"),
        ("late", "cannot read .*late.jsonl from document"),
        ("csv", "data.csv is not a .jsonl, .parquet, .txt file; each may be compressed"),
        ("cut", "cannot read .*cut.parquet from document 0 on"),
        ("mixed", "holds train.jsonl and train.txt of split train: give --dataset one of them"),
        ("folder", "holds no test.jsonl, .parquet or .txt; give --split"),
        ("nowhere", "is neither a file or folder here nor the name of a dataset on the hub"),
        (
            "mistyped",
            "train.jsonl.gz is neither a file or folder here nor the name of a dataset on the hub",
        ),
        ("nothing", "--dataset  is neither a file or folder here"),
        ("hub", "cannot read someone/stories .*without a network.*HF_HUB_OFFLINE=1 and HF_HOME"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(documents_in(tmp_path, name).read())


def test_reading_stops_where_it_is_left(tmp_path: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", [json.dumps(i) for i in range(1000)])
    texts = Documents(str(file)).read()
    assert next(texts) == "0"
    texts.close()
