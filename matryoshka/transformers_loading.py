"""Loads models and tokenizers of `transformers` from a folder or the hub; errors are one line."""

import contextlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.hub_errors import is_passing
from matryoshka.transformers_model import TransformersModel


def load_transformers_model(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> TransformersModel:
    """Loads a model; see `language_models.load_language_model`. Raises `UserError`."""
    name = str(name_or_path)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with naming_model(name, revision):
        import transformers  # imported here because it takes seconds

        # It would warn of missing weights, which are checked below.
        transformers.logging.set_verbosity(logging.ERROR)
        config = transformers.AutoConfig.from_pretrained(name, **hub)
        has_head = predicts_next_token(config)
        kind = transformers.AutoModelForCausalLM if has_head else transformers.AutoModel
        # weights_only: no code in pickled weights is run.
        loaded: Any = kind.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            weights_only=True,
            output_loading_info=True,
            **hub,
        )
    model, info = loaded
    missing = tuple(sorted(info["missing_keys"]))
    # `transformers` initializes missing weights at random. A pooler comes after the blocks, and
    # does not matter.
    made_up = [key for key in missing if "pooler" not in key.split(".")]
    if made_up:
        raise UserError(f"the weights of {name} lack {len(made_up)} tensors, such as {made_up[0]}")
    return TransformersModel(
        model.to(device).eval().requires_grad_(False),
        load_tokenizer(tokenizer, name, hub),
        has_head,
        missing,
    )


def load_tokenizer(asked: str | None, model_name: str, hub: dict[str, Any]) -> Any:
    """The tokenizer `asked`, or by default the model's own; None if the model has none.

    Raises `UserError` if `asked` cannot be loaded, or the hub cannot be reached.
    """
    import transformers

    if asked is not None:
        with naming_model(asked, None, "tokenizer"):
            found = transformers.AutoTokenizer.from_pretrained(asked, **{**hub, "revision": None})
        if not has_text(found):
            raise UserError(f"there is no tokenizer {asked}: it holds special tokens only")
        return found
    try:
        own = transformers.AutoTokenizer.from_pretrained(model_name, **hub)
    except Exception as error:  # errors of many classes mean that there is none
        if is_passing(error):
            raise UserError(
                f"cannot get the tokenizer of {model_name} from the Hugging Face hub "
                f"({type(error).__name__}); without a network, set HF_HUB_OFFLINE=1"
            ) from error
        return None
    return own if has_text(own) else None


def has_text(tokenizer: Any) -> bool:
    """Whether a tokenizer has more than special tokens.

    For a folder without a tokenizer, `transformers` makes one that has not.
    """
    return not set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids)


def predicts_next_token(config: Any) -> bool:
    """Whether the weights were saved from a causal language model, by the config's class names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved_from = getattr(config, "architectures", None) or []
    return any(
        name == known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved_from
    )


@contextlib.contextmanager
def naming_model(name: str, revision: str | None, what: str = "language model") -> Iterator[None]:
    """A context in which any error of `transformers` becomes a `UserError` that names the model."""
    try:
        yield
    # Its errors come from many libraries and have no common class.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} {name} comes with Python code of its own, which is run only with "
                "--trust-remote-code"
            ) from None
        if any(isinstance(one, pickle.UnpicklingError) for one in causes(error)):
            raise UserError(
                f"the weights of {name} are a pickle that holds more than tensors: it is not read"
            ) from None
        said = str(error).strip().split("\n")[0]
        reason = f"{type(error).__name__}: {said}"[:200]
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"there is no {what} {name}{at} that can be loaded ({reason}); without a network, give "
            "its folder, or HF_HUB_OFFLINE=1 and HF_HOME where it was downloaded before"
        ) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, the one that it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
