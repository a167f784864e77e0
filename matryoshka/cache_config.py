"""The settings of a cache, and the source of activations that they stand for."""

import dataclasses
from typing import Literal

import torch

from matryoshka.cache_format import DTYPES, whole_number
from matryoshka.command_line import setting
from matryoshka.errors import UserError
from matryoshka.language_models import load_language_model
from matryoshka.sites import Site
from matryoshka.sources import IdRows, ModelSource
from matryoshka.token_rows import TokenRows

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a cache is made of."""

    model: str = setting("noanabeshima/tiny_model", "weights: a hub repo, a file or a folder")
    model_revision: str | None = setting(None, "the hub model's branch, tag or commit")
    dataset: str = setting(
        "noanabeshima/TinyModelTokIds", "token ids: a hub dataset, or a folder of SPLIT.jsonl"
    )
    dataset_revision: str | None = setting(None, "the hub dataset's branch, tag or commit")
    split: str = setting("train", "which SPLIT.jsonl of the dataset")
    tokens: int = setting(30_000_000, "activations to cache")
    layer: int = setting(3, "block of the model, counted from 0")
    site: Site = setting("resid_pre", "where in it: resid_pre is the residual stream at its input")
    dtype: Dtype = setting("float16", "what activations are stored in")
    keep_begin: bool = setting(False, "cache [BEGIN] positions too")
    batch_size: int = setting(64, "rows a forward pass")
    rows_per_shard: int = setting(1024, "dataset rows a shard; held in memory while it is computed")

    @property
    def token_rows(self) -> TokenRows:
        """The dataset's rows."""
        return TokenRows(self.dataset, self.split, self.dataset_revision)

    def check(self) -> None:
        """Raises `UserError` naming a setting that is impossible for every model and dataset."""
        limits = {"tokens": 10**12, "batch_size": 10**6, "rows_per_shard": 10**6}
        for name, most in limits.items():
            try:
                whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
            except ValueError as error:
                raise UserError(str(error)) from None
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")


def load_source(config: CacheConfig, device: torch.device) -> ModelSource:
    """What `config` caches: its language model, on `device`, and its rows.

    Raises `UserError` where there is no such model, or it has no such layer or site.
    """
    model = load_language_model(config.model, config.model_revision, device=device)
    model.check_site(config.layer, config.site)
    rows = IdRows(config.token_rows, model.d_vocab, config.keep_begin)
    return ModelSource(model, config.model, rows, config.layer, config.site, config.batch_size)
