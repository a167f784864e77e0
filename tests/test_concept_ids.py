"""Looking up the token ids of words, in a vocabulary made up here."""

import json

import pytest
import torch

from matryoshka.concepts import CONCEPTS, load_concepts
from studies.concept_ids import as_text, main


@pytest.fixture
def argv(tmp_path):
    """Flags for files of eight tokens; concepts.json is still to be written."""
    texts = ["\u0120dog", "dog", "\u0120Dog", "Dog", "\u0120dogs", ".", "\u0120.", "\u0120cat"]
    (tmp_path / "encoder.json").write_text(json.dumps({t: 10 * i for i, t in enumerate(texts)}))
    to_gpt2 = [30, 70, 10, 40, 0, 50, 60, 20, 99_999]  # [PAD] and the like have none
    torch.save(torch.tensor(to_gpt2), tmp_path / "ids.pt")
    files = {"concepts": "concepts.json", "vocabulary": "encoder.json", "tiny-to-gpt2": "ids.pt"}
    return [f"--{flag}={tmp_path / name}" for flag, name in files.items()]


def write_words(folder, **words):
    content = {"note": "a note", "concepts": {k: {"words": v} for k, v in words.items()}}
    (folder / "concepts.json").write_text(json.dumps(content))


def test_ids_of_words_are_looked_up(tmp_path, argv):
    write_words(tmp_path, dog=["dog"], more=[".", "cat"])
    main(argv)
    concepts = load_concepts(tmp_path / "concepts.json")
    assert {name: of.ids for name, of in concepts.items()} == {"dog": [0, 4, 7], "more": [1, 5, 6]}
    written = json.loads((tmp_path / "concepts.json").read_text())
    assert written["note"] == "a note"
    assert written["concepts"]["dog"]["words"] == ["dog"]


@pytest.mark.parametrize("word", ["zebra", "dogs and"])
def test_a_word_that_is_not_one_token_is_refused(tmp_path, argv, capsys, word):
    write_words(tmp_path, dog=["dog", word])
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {tmp_path / 'concepts.json'}: {word!r} is not one token of TinyModel's\n"
    )


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, argv, capsys):
    write_words(tmp_path, dog=["dog"])
    (tmp_path / "ids.pt").write_text("[1, 2]")
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "cannot read the three files" in capsys.readouterr().err


def test_the_file_that_comes_with_the_package_is_written_so():
    text = CONCEPTS.read_text()
    assert as_text(json.loads(text)) == text
