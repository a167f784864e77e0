"""Concepts: what is refused, and the file that comes with the package."""

import json

import pytest

from matryoshka.concepts import load_concepts, membership
from matryoshka.errors import UserError
from matryoshka.tiny_model import BEGIN


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        ("[" * 100_000, "expected"),
        ('{"concepts": {"a": [1]}}', "expected"),
        ('{"concepts": {"a": {"words": []}}}', "expected"),
        ('{"concepts": {}}', "no concepts"),
        ('{"concepts": {"a": {"ids": []}}}', "'a' needs a list"),
        ('{"concepts": {"a": {"ids": ["x"]}}}', "'a' needs a list"),
        ('{"concepts": {"a": {"ids": [true]}}}', "'a' needs a list"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, named):
    (tmp_path / "concepts.json").write_text(text)
    with pytest.raises(UserError, match=named) as error:
        load_concepts(tmp_path / "concepts.json")
    assert str(error.value).startswith(f"--concepts {tmp_path / 'concepts.json'}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(UserError, match="cannot be read"):
            load_concepts(path)


def test_ids_are_read(tmp_path):
    content = {"note": "", "concepts": {"a": {"words": ["x"], "ids": [3, 1]}, "b": {"ids": [0]}}}
    (tmp_path / "concepts.json").write_text(json.dumps(content))
    concepts = load_concepts(tmp_path / "concepts.json")
    assert concepts == {"a": [3, 1], "b": [0]}
    members = membership(concepts, 4)
    assert members.tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_out_of_the_vocabulary_are_refused(bad):
    with pytest.raises(UserError, match=f"'b': token id {bad} is out of the vocabulary, 0 to 3"):
        membership({"a": [0], "b": [1, bad]}, 4)


def test_the_concepts_that_come_with_the_package_are_of_tiny_models_vocabulary():
    concepts = load_concepts()
    members = membership(concepts, 10_000)
    assert members.sum(1).tolist() == [len(ids) for ids in concepts.values()]  # none twice
    assert not members[:, BEGIN:].any()
    names = list(concepts)
    female, male = names.index("female names"), names.index("male names")
    assert not (members[female] & members[male]).any()
