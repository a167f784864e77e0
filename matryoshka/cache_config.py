"""The settings of a cache, and the source of activations that they describe."""

import dataclasses
import os
from typing import Literal

import torch

from matryoshka.cache_format import DTYPES, Recipe, whole_number
from matryoshka.command_line import setting
from matryoshka.documents import Documents
from matryoshka.errors import UserError
from matryoshka.language_models import LanguageModel, ModelDtype, load_language_model
from matryoshka.sites import Site
from matryoshka.sources import IdRows, ModelSource, Rows
from matryoshka.text_rows import Begin, Packing, TextRows, Tokenizer
from matryoshka.token_rows import TokenRows
from matryoshka.transformers_model import TransformersModel

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Which activations of which language model, on which text, and how they are stored."""

    model: str = setting(
        "noanabeshima/tiny_model", "language model: a hub name or a folder, or a TinyModel's file"
    )
    model_revision: str | None = setting(None, "the hub model's branch, tag or commit")
    model_dtype: ModelDtype = setting("float32", "dtype that the model runs in")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    dataset: str = setting(
        "noanabeshima/TinyModelTokIds",
        "text: a hub name, a folder or a .jsonl, .parquet or .txt file; for TinyModel: token ids",
    )
    dataset_config: str | None = setting(None, "which part of the hub dataset, if it has several")
    dataset_revision: str | None = setting(None, "the hub dataset's branch, tag or commit")
    split: str = setting("train", "split of the dataset; of a folder: how its files' names begin")
    text_column: str = setting("text", "column of the dataset that holds the text")
    tokenizer: str | None = setting(
        None, "tokenizer: a hub name or a folder; default: the model's own"
    )
    context: int = setting(128, "token ids in a row of text")
    packing: Packing = setting(
        "packed", "packed: documents one after another in full rows; padded: one document a row"
    )
    begin: Begin = setting(
        "auto", "whether rows begin with [BOS]; auto: where the tokenizer adds one"
    )
    tokens: int = setting(30_000_000, "activations to cache")
    layer: int = setting(3, "block of the model, counted from 0")
    site: Site = setting(
        "resid_pre", "where in that block; resid_pre: the residual stream at its input"
    )
    dtype: Dtype = setting("float16", "dtype that activations are stored in")
    keep_begin: bool = setting(
        False, "also cache the positions of [BEGIN] and other special ids", alias="keep_special"
    )
    batch_size: int = setting(64, "rows in a forward pass")
    rows_per_shard: int = setting(
        1024, "dataset rows in a shard, which is held in memory while it is computed"
    )

    @property
    def token_rows(self) -> TokenRows:
        """The dataset's rows."""
        return TokenRows(self.dataset, self.split, self.dataset_revision)

    def check(self) -> None:
        """Raises `UserError` if a setting is impossible, whatever the model and the dataset."""
        limits = {"tokens": 10**12, "batch_size": 10**6, "rows_per_shard": 10**6}
        limits |= {"context": 10**6}
        for name, most in limits.items():
            try:
                whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
            except ValueError as error:
                raise UserError(str(error)) from None
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        of_hub = {"model_revision": self.model}
        of_hub |= dict.fromkeys(("dataset_revision", "dataset_config"), self.dataset)
        for setting_name, path in of_hub.items():
            if getattr(self, setting_name) is not None and os.path.exists(path):
                raise UserError(
                    f"--{setting_name.replace('_', '-')} is for the hub, and {path} is a file or "
                    "folder here: leave it out"
                )


OF_TEXT = ("dataset_config", "text_column", "tokenizer", "context", "packing", "begin")


def load_source(config: CacheConfig, device: torch.device) -> ModelSource:
    """The language model of `config`, on `device`, with the rows that it reads.

    Raises `UserError` if there is no such model, it has no such layer or site, or it cannot read
    such rows.
    """
    model = load_language_model(
        config.model,
        config.model_revision,
        config.model_dtype,
        device,
        config.trust_remote_code,
        config.tokenizer,
    )
    model.check_site(config.layer, config.site)
    rows: Rows
    about: dict[str, str | None]
    if isinstance(model, TransformersModel):
        rows = text_rows(config, model)
        about = {"model_revision": config.model_revision, "model_dtype": config.model_dtype}
    else:
        rows, about = id_rows(config, model), {}
        if config.model_revision is not None:  # an evaluation must load the same revision
            about["model_revision"] = config.model_revision
    return ModelSource(
        model, config.model, rows, config.layer, config.site, config.batch_size, about
    )


def text_rows(config: CacheConfig, model: TransformersModel) -> TextRows:
    """The rows of text that `model` reads. Raises `UserError`."""
    if config.context > model.max_seq_len:
        raise UserError(
            f"--context must be at most {model.max_seq_len}, which is what {config.model} takes, "
            f"got {config.context}"
        )
    of_hub = config.dataset_config, config.dataset_revision
    return TextRows(
        Documents(config.dataset, config.split, config.text_column, *of_hub),
        Tokenizer(model, config.tokenizer or config.model),
        config.context,
        config.tokens,
        config.packing,
        config.begin,
        config.keep_begin,
    )


def id_rows(config: CacheConfig, model: LanguageModel) -> IdRows:
    """The rows of token ids that TinyModel reads. Raises `UserError` if a setting is about text."""
    for field in dataclasses.fields(CacheConfig):
        if field.name in OF_TEXT and getattr(config, field.name) != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} is about text, and TinyModel reads rows of "
                "token ids: leave it out"
            )
    return IdRows(config.token_rows, model.d_vocab, config.keep_begin)


def rows_of(recipe: Recipe, model: LanguageModel, dataset: str | None = None) -> Rows:
    """The rows that the cache of `recipe` was made from, as `model` reads them.

    model: the recipe's model, loaded with the tokenizer `recipe.get("tokenizer")`; dataset: where
    the dataset is now, if it has moved. Raises `UserError` if the tokenizer has changed.
    """
    name, split = dataset or recipe["dataset"], recipe["split"]
    revision = recipe.get("dataset_revision") if name == recipe["dataset"] else None
    if "text_column" not in recipe or not isinstance(model, TransformersModel):
        return IdRows(TokenRows(name, split, revision), model.d_vocab, recipe["keep_begin"])
    tokenizer = Tokenizer(model, recipe["tokenizer"])
    if tokenizer.hash != recipe["tokenizer_hash"]:
        raise UserError(
            f"tokenizer {tokenizer.name} is not the one that the cache was made with: its "
            "tokenizer_hash differs"
        )
    config = recipe["dataset_config"] if name == recipe["dataset"] else None
    return TextRows(
        Documents(name, split, recipe["text_column"], config, revision),
        tokenizer,
        recipe["context"],
        recipe["tokens"],
        recipe["packing"],
        recipe["begin"],
        recipe["keep_begin"],
    )
