"""The settings of a cache, and the source of activations that they stand for."""

import dataclasses
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
    """What a cache is made of."""

    model: str = setting(
        "noanabeshima/tiny_model", "language model: a hub name or a folder, or a TinyModel's file"
    )
    model_revision: str | None = setting(None, "the hub model's branch, tag or commit")
    model_dtype: ModelDtype = setting("float32", "what the model runs in")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    dataset: str = setting(
        "noanabeshima/TinyModelTokIds",
        "text: a hub name, a folder or a .jsonl, .parquet or .txt file; TinyModel: its token ids",
    )
    dataset_config: str | None = setting(None, "which part of the hub dataset, if it has several")
    dataset_revision: str | None = setting(None, "the hub dataset's branch, tag or commit")
    split: str = setting("train", "split of the dataset; in a folder: how its files' names begin")
    text_column: str = setting("text", "column of the dataset that holds the text")
    tokenizer: str | None = setting(None, "hub name or folder; default: the model's own")
    context: int = setting(128, "token ids a row, of text")
    packing: Packing = setting(
        "packed", "documents after each other in full rows, or padded: one a row"
    )
    begin: Begin = setting("auto", "rows begin with [BOS]; auto: as the tokenizer has it")
    tokens: int = setting(30_000_000, "activations to cache")
    layer: int = setting(3, "block of the model, counted from 0")
    site: Site = setting("resid_pre", "where in it: resid_pre is the residual stream at its input")
    dtype: Dtype = setting("float16", "what activations are stored in")
    keep_begin: bool = setting(
        False, "cache [BEGIN] positions, and those of other special ids, too", alias="keep_special"
    )
    batch_size: int = setting(64, "rows a forward pass")
    rows_per_shard: int = setting(1024, "dataset rows a shard; held in memory while it is computed")

    @property
    def token_rows(self) -> TokenRows:
        """The dataset's rows."""
        return TokenRows(self.dataset, self.split, self.dataset_revision)

    def check(self) -> None:
        """Raises `UserError` naming a setting that is impossible for every model and dataset."""
        limits = {"tokens": 10**12, "batch_size": 10**6, "rows_per_shard": 10**6}
        limits |= {"context": 10**6}
        for name, most in limits.items():
            try:
                whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
            except ValueError as error:
                raise UserError(str(error)) from None
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")


OF_TEXT = ("dataset_config", "text_column", "tokenizer", "context", "packing", "begin")


def load_source(config: CacheConfig, device: torch.device) -> ModelSource:
    """What `config` caches: its language model, on `device`, and its rows.

    Raises `UserError` where there is no such model, or it has no such layer or site, or it cannot
    read such rows.
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
        if config.model_revision is not None:  # that an evaluation must load, too
            about["model_revision"] = config.model_revision
    return ModelSource(
        model, config.model, rows, config.layer, config.site, config.batch_size, about
    )


def text_rows(config: CacheConfig, model: TransformersModel) -> TextRows:
    """The rows of text that `model` reads. Raises `UserError`."""
    if config.context > model.max_seq_len:
        raise UserError(
            f"--context must be at most what {config.model} takes, {model.max_seq_len}, got "
            f"{config.context}"
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
    """The rows of token ids that TinyModel reads. Raises `UserError` for a setting of text."""
    for field in dataclasses.fields(CacheConfig):
        if field.name in OF_TEXT and getattr(config, field.name) != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} is about text, and TinyModel reads rows of "
                "token ids: leave it out"
            )
    return IdRows(config.token_rows, model.d_vocab, config.keep_begin)


def rows_of(recipe: Recipe, model: LanguageModel, dataset: str | None = None) -> Rows:
    """The rows that the cache of `recipe` was made of, as `model` reads them.

    `model` is the recipe's, loaded with its tokenizer, `recipe.get("tokenizer")`; `dataset`: where
    the rows are now. Raises `UserError` where the tokenizer is another one.
    """
    name, split = dataset or recipe["dataset"], recipe["split"]
    revision = recipe.get("dataset_revision") if name == recipe["dataset"] else None
    if "text_column" not in recipe or not isinstance(model, TransformersModel):
        return IdRows(TokenRows(name, split, revision), model.d_vocab, recipe["keep_begin"])
    tokenizer = Tokenizer(model, recipe["tokenizer"])
    if tokenizer.hash != recipe["tokenizer_hash"]:
        raise UserError(
            f"the cache was made with another tokenizer than {tokenizer.name} is now: its "
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
