"""Which errors are waited for: by the exceptions that the hub's own client raises."""

import types
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub import errors

from matryoshka import language_models
from matryoshka.errors import UserError
from matryoshka.hub_errors import is_passing
from matryoshka.tiny_model import TinyModel
from matryoshka.transformers_loading import load_tokenizer


def raised_from(cause: BaseException | None) -> UserError:
    error = UserError("cannot get it")
    error.__cause__ = cause
    return error


def answer(status_code: int) -> Exception:
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.response = types.SimpleNamespace(status_code=status_code)  # type: ignore[assignment]
    return error


class ClientConnectionError(Exception):
    """As aiohttp has one."""


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        *((answer(status), True) for status in (408, 429, 500, 502, 503, 504)),
        *((answer(status), False) for status in (400, 401, 403, 404, 416)),
        (ConnectionResetError("by peer"), True),
        (TimeoutError("timed out"), True),
        (ClientConnectionError(), True),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), False),
        (FileNotFoundError("no such dataset"), False),
        (PermissionError("a read-only home"), False),
        (None, False),
    ],
)
def test_a_request_that_may_succeed_later(cause: Any, passes: bool) -> None:
    assert is_passing(raised_from(cause)) is passes


def test_a_status_decides_over_what_it_was_wrapped_in() -> None:
    wrapped = errors.LocalEntryNotFoundError("check your connection")
    wrapped.__cause__ = answer(503)
    assert is_passing(raised_from(wrapped))
    wrapped.__cause__ = answer(404)
    assert not is_passing(raised_from(wrapped))


def test_a_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader keeps the cause: without it nothing could be told."""

    def fails(*args: Any, **kwargs: Any) -> str:
        raise answer(503)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(UserError) as refused:
        TinyModel.from_pretrained("owner/model")
    assert is_passing(refused.value)


@pytest.mark.parametrize(("status_code", "passes"), [(503, True), (429, True), (404, False)])
def test_trouble_of_the_hub_does_not_say_whose_model_it_is(
    monkeypatch: pytest.MonkeyPatch, status_code: int, passes: bool
) -> None:
    """Else a TinyModel would be refused for good, as one that `transformers` cannot load."""

    def fails(*args: Any, **kwargs: Any) -> str:
        raise answer(status_code)

    def no_such_model(*args: Any, **kwargs: Any) -> None:
        raise UserError("no such model")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    monkeypatch.setattr(language_models, "load_transformers_model", no_such_model)
    with pytest.raises(UserError) as refused:
        language_models.load_language_model("owner/model")
    assert is_passing(refused.value) is passes
    assert ("from the Hugging Face hub" in str(refused.value)) is passes


def test_trouble_of_the_hub_does_not_say_that_there_is_no_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Exception] = [answer(503), ValueError("unrecognized")]

    def fails(*args: Any, **kwargs: Any) -> None:
        raise said.pop(0)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(UserError) as refused:
        load_tokenizer(None, "owner/model", {})
    assert is_passing(refused.value)
    assert load_tokenizer(None, "owner/model", {}) is None
