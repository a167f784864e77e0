"""What an evaluation reads besides SAEs and activations: the language model and concepts.

A cache of arrays has no language model, for example. The results that need one are then left out,
and the reason is reported.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from matryoshka.cache_format import Recipe
from matryoshka.cache_reader import ActivationCache
from matryoshka.concepts import Concept, Resolved, Tokenize, resolve
from matryoshka.errors import UserError
from matryoshka.language_models import LanguageModel, load_language_model
from matryoshka.tiny_model import TinyModel

NO_MODEL = "none"  # --model none: use no language model
TOKENS_AT_ONCE = 2**20  # token ids that are read at a time
NO_CONCEPTS = Resolved({}, 0, [])


class ModelSettings(NamedTuple):
    """What the command line says about the language model and its text; None: use the cache's."""

    model: str | None = None
    model_revision: str | None = None
    dataset: str | None = None
    tokenizer: str | None = None
    concepts: str | None = None
    trust_remote_code: bool = False


def is_of_model(cache: ActivationCache) -> bool:
    """Whether the cache was made of a language model's activations."""
    return "model" in cache.recipe


def load_model_of(
    cache: ActivationCache, settings: ModelSettings, device: torch.device
) -> tuple[LanguageModel | None, str]:
    """The language model that the cache was made with and "", or None and the reason.

    Raises `UserError` if the model cannot be loaded, or its weights are not the cache's.
    """
    if not is_of_model(cache):
        if settings.model not in (None, NO_MODEL):
            raise UserError(
                f"--model {settings.model}: {cache.folder} was not made with a language model, and "
                "does not say of which layer its activations are: leave --model out"
            )
        return None, "the cache was not made with a language model"
    if settings.model == NO_MODEL:
        return None, f"--model {NO_MODEL} was asked for"
    recipe = cache.recipe
    name = settings.model or recipe["model"]
    revision = settings.model_revision
    if revision is None and name == recipe["model"]:
        revision = recipe.get("model_revision")
    try:
        model = load_language_model(
            name,
            revision,
            recipe.get("model_dtype", "float32"),
            device,
            settings.trust_remote_code,
            settings.tokenizer or recipe.get("tokenizer"),
        )
    except UserError as error:
        raise UserError(f"{error}; --model {NO_MODEL} leaves out what needs the model") from None
    if model.weights_hash != recipe["weights_hash"]:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{cache.folder} was made with other weights than those of {name}{at}: the "
            f"weights_hash is {recipe['weights_hash']} in the cache and {model.weights_hash} in "
            "the model; give the --model or --model-revision that the cache was made with"
        )
    return model, ""


# ---------------------------------------------------------------------------------------- concepts


def vocabulary_of(cache: ActivationCache, concepts: Resolved) -> int:
    """1 + the largest token id of the cache and of the concepts."""
    largest = max((max(ids) for ids in concepts.ids.values()), default=0)
    for start in range(0, cache.n_tokens, TOKENS_AT_ONCE):
        tok_ids, _, _ = cache.tokens(start, start + TOKENS_AT_ONCE)
        largest = max(largest, int(tok_ids.max()))
    return largest + 1


def concepts_of(
    concepts: Mapping[str, Concept],
    cache: ActivationCache,
    model: LanguageModel | None,
    settings: ModelSettings,
) -> tuple[Resolved, str]:
    """The concepts' token ids in the cache's vocabulary and "", or no concepts and the reason.

    Raises `UserError` if a concept has words and no ids, and there is no tokenizer.
    """
    tokenize = tokenizer_of(model, settings)
    has_tokens = is_of_model(cache) or cache.recipe.get("token_ids", False)
    if not has_tokens:
        return NO_CONCEPTS, "the cache has no token ids"
    if tokenize is None and settings.concepts is None and not is_tiny(cache, model):
        return NO_CONCEPTS, "no tokenizer is known (--tokenizer names one)"
    return resolve(concepts, tokenize), ""


def is_tiny(cache: ActivationCache, model: LanguageModel | None) -> bool:
    """Whether the cache's token ids are taken to be TinyModel's."""
    recipe: Recipe = cache.recipe
    return isinstance(model, TinyModel) or (
        model is None and is_of_model(cache) and "tokenizer" not in recipe
    )


def tokenizer_of(model: LanguageModel | None, settings: ModelSettings) -> Tokenize | None:
    """The model's tokenizer, or without a model the one that was asked for, or None."""
    tokenizer: Any = model.tokenizer if model else None
    if model is None and settings.tokenizer is not None:
        from matryoshka.transformers_loading import load_tokenizer

        tokenizer = load_tokenizer(settings.tokenizer, "", {})
    if tokenizer is None:
        return None

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return [] if tokenizer.unk_token_id in ids else ids

    return tokenize
