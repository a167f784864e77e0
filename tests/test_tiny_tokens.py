"""The texts of TinyModel's ids, from a vocabulary made up here."""

import json

import huggingface_hub
import pytest
import torch
from tiny_factory import write_model

from matryoshka.errors import UserError
from matryoshka.language_models import load_language_model
from matryoshka.tiny_tokens import load_texts


@pytest.fixture
def files(tmp_path):
    vocabulary = {"\u0120the": 5, "dog": 2, "\u010a": 7, "\u00c3\u00a9": 9, "\u00c3": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    torch.save(torch.tensor([2, 5, 7, 9, 3, 50_257]), tmp_path / "ids.pt")
    return tmp_path


def test_texts_are_those_of_gpt2s_tokens(files):
    assert load_texts(files / "ids.pt") == ["dog", " the", "\n", "\u00e9", "\ufffd", ""]


def test_tiny_model_has_them_where_it_is_told(files):
    write_model(files / "model.pt")
    model = load_language_model(files / "model.pt", tokenizer=str(files / "ids.pt"))
    assert [model.text_of(i) for i in (0, 1, 5, 6)] == ["dog", " the", "5", "6"]
    assert model.text_of(9996) == "[BEGIN]"
    without = load_language_model(files / "model.pt")
    assert [without.text_of(i) for i in (0, 9996)] == ["0", "[BEGIN]"]


def test_without_a_vocabulary_it_is_the_hubs(files, monkeypatch):
    (files / "hub").mkdir()
    (files / "vocab.json").rename(files / "hub" / "vocab.json")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: str(files / "hub" / name)
    )
    assert load_texts(files / "ids.pt")[:2] == ["dog", " the"]


def test_files_that_are_none_are_refused(files, monkeypatch):
    def no_hub(repo, name):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_hub)
    (files / "text.pt").write_text("no tensor")
    for name in ("text.pt", "nowhere.pt"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_texts(files / name)
    (files / "vocab.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        load_texts(files / "ids.pt")
    (files / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"put GPT-2's vocab\.json there"):
        load_texts(files / "ids.pt")
