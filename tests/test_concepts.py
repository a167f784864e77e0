"""Concepts: what is refused, and the file that comes with the package."""

import json

import pytest

from matryoshka.concepts import Concept, ids_of_word, load_concepts, membership, resolve
from matryoshka.errors import UserError
from matryoshka.tiny_model import BEGIN


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        ("[" * 100_000, "expected"),
        ('{"concepts": {"a": [1]}}', "expected"),
        ('{"concepts": {"a": {"words": []}}}', "'a' needs words or"),
        ('{"concepts": {"a": {"words": 3}}}', "expected"),
        ('{"concepts": {"a": {"words": "dog"}}}', '"words" and "ids" must be lists'),
        ('{"concepts": {"a": {"words": ["dog"], "ids": {"3": 1}}}}', '"words" and "ids" must be'),
        ('{"concepts": {"a": {"words": ["dog", ""]}}}', "'a' needs words, found"),
        ('{"concepts": {"a": {"words": [7]}}}', "'a' needs words, found"),
        ('{"concepts": {}}', "no concepts"),
        ('{"concepts": {"a": {"ids": []}}}', "'a' needs words or token ids"),
        ('{"concepts": {"a": {"ids": ["x"]}}}', "'a' needs words or token ids"),
        ('{"concepts": {"a": {"ids": [true]}}}', "'a' needs words or token ids"),
        ('{"concepts": {"a": {"ids": [3, -1]}}}', "'a' has the token id -1, which must be between"),
        ('{"concepts": {"a": {"ids": [1e9]}}}', "'a' needs words or token ids"),
        ('{"concepts": {"a": {"ids": [1000000000]}}}', "'a' has the token id 1000000000"),
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
    assert concepts == {"a": (["x"], [3, 1]), "b": ([], [0])}
    members = membership(resolve(concepts, None).ids, 4)
    assert members.tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_out_of_the_vocabulary_are_refused(bad):
    with pytest.raises(UserError, match=f"'b': token id {bad} is not in the vocabulary, 0 to 3"):
        membership({"a": [0], "b": [1, bad]}, 4)


def test_the_concepts_that_come_with_the_package_are_of_tiny_models_vocabulary():
    concepts = resolve(load_concepts(), None).ids
    members = membership(concepts, 10_000)
    assert members.sum(1).tolist() == [len(ids) for ids in concepts.values()]  # none twice
    assert not members[:, BEGIN:].any()
    names = list(concepts)
    female, male = names.index("female names"), names.index("male names")
    assert not (members[female] & members[male]).any()


# ------------------------------------------------------------------------------- words as token ids

VOCABULARY = ["a", " dog", "dog", " Dog", "Dog", "s", " cat", '"', ' "', "c", "t", " ", "."]


def longest_first(text: str) -> list[int]:
    """A tokenizer whose tokens are the longest of VOCABULARY that fit, from the left."""
    if not text:
        return []
    token = max((t for t in VOCABULARY if text.startswith(t)), key=len)
    return [VOCABULARY.index(token), *longest_first(text[len(token) :])]


def uncased(text: str) -> list[int]:
    """A tokenizer that knows words only, whatever their case, and no spaces."""
    return [["a", "dog", "cat", "."].index(word) for word in text.lower().split()]


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("dog", [" dog", " Dog", "Dog"]),  # not "dog": it would end "hotdog"
        ("cat", [" cat"]),  # "Cat" and " Cat" are several tokens
        ("dogs", []),
        ('"', ['"', ' "']),
        (".", ["."]),
    ],
)
def test_a_word_is_the_single_tokens_that_it_is(word, forms):
    tokenize = with_letters(longest_first)
    assert {VOCABULARY[i] for i in ids_of_word(word, tokenize)} == set(forms)


def with_letters(tokenize):
    """Every character that is in no token is one by itself: -1."""

    def letters_too(text: str) -> list[int]:
        try:
            return tokenize(text)
        except ValueError:
            return [-1] * len(text)

    return letters_too


def test_a_tokenizer_without_case_and_spaces_has_one_form():
    assert ids_of_word("Dog", uncased) == {1}


def test_words_that_are_no_single_token_are_left_out_and_counted():
    concepts = {
        "animals": Concept(["dog", "dogs", "cat"], [7777]),  # ids are of another vocabulary
        "none": Concept(["dogs"], []),
        "ids": Concept([], [5, 2]),
    }
    resolved = resolve(concepts, with_letters(longest_first))
    assert resolved.ids == {"animals": [1, 3, 4, 6], "ids": [2, 5]}
    assert (resolved.n_words, resolved.left_out) == (4, ["dogs", "dogs"])


def test_words_alone_need_a_tokenizer():
    with pytest.raises(UserError, match="'a' has words and no ids, which needs a --tokenizer"):
        resolve({"a": Concept(["dog"], [])}, None)
