"""The settings of training from a language model that runs during training, without a cache."""

import dataclasses
from typing import Any

from matryoshka.cache_config import CacheConfig, Dtype
from matryoshka.cache_format import whole_number
from matryoshka.command_line import inherited, setting
from matryoshka.errors import UserError
from matryoshka.language_models import ModelDtype
from matryoshka.live_activations import BUFFER
from matryoshka.sites import Site
from matryoshka.text_rows import Begin, Packing
from matryoshka.training_config import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveConfig(TrainingConfig):
    """How SAEs are trained from a cache, or from a language model if `model` is given."""

    cache: str = inherited(
        TrainingConfig,
        "cache",
        default="",
        help="folder that cache_activations.py wrote (default: cache/train, unless --model is "
        "given)",
    )
    tokens: int = inherited(
        TrainingConfig,
        "tokens",
        help="train on only this many activations, the first ones; 0: on the whole cache or, with "
        "--model, on as many as the steps use and the text has",
    )
    model: str | None = inherited(
        CacheConfig,
        "model",
        default=None,
        help="instead of --cache: a language model that runs during training; a hub name, a "
        "folder, or the file of a TinyModel",
    )
    model_revision: str | None = inherited(CacheConfig, "model_revision")
    model_dtype: ModelDtype = inherited(CacheConfig, "model_dtype")
    trust_remote_code: bool = inherited(CacheConfig, "trust_remote_code")
    dataset: str = inherited(CacheConfig, "dataset")
    dataset_config: str | None = inherited(CacheConfig, "dataset_config")
    dataset_revision: str | None = inherited(CacheConfig, "dataset_revision")
    split: str = inherited(CacheConfig, "split")
    text_column: str = inherited(CacheConfig, "text_column")
    tokenizer: str | None = inherited(CacheConfig, "tokenizer")
    context: int = inherited(CacheConfig, "context")
    packing: Packing = inherited(CacheConfig, "packing")
    begin: Begin = inherited(CacheConfig, "begin")
    layer: int = inherited(CacheConfig, "layer")
    site: Site = inherited(CacheConfig, "site")
    dtype: Dtype = inherited(
        CacheConfig, "dtype", help="dtype to which activations of --model are rounded"
    )
    keep_begin: bool = inherited(
        CacheConfig,
        "keep_begin",
        help="train also on the positions of [BEGIN] and other special ids",
    )
    rows_at_once: int = inherited(CacheConfig, "batch_size")
    buffer: int = setting(BUFFER, "how many activations of --model are shuffled together")

    def __post_init__(self) -> None:
        """Sets the default of --cache if there is no --model."""
        if not self.cache and self.model is None:
            default = inherited(TrainingConfig, "cache").default
            object.__setattr__(self, "cache", default)

    def as_json(self) -> dict[str, Any]:
        """The settings for results.json; without those of a language model if there is none."""
        settings = super().as_json()
        if self.model is not None:
            return settings
        return {name: value for name, value in settings.items() if name not in OF_MODEL}

    def check_live(self) -> None:
        """Raises `UserError` if a setting of the language model is impossible or has no effect."""
        if self.model is None:
            for name in OF_MODEL:
                if getattr(self, name) != inherited(LiveConfig, name).default:
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(
                        f"{flag} is a setting of a language model, and there is no --model: give "
                        "one, or leave it out"
                    )
            return
        if self.cache:
            raise UserError(
                f"--model {self.model} is in place of a cache: leave out --cache {self.cache}, or "
                "leave out --model and its settings"
            )
        for name, most in (("rows_at_once", 10**6), ("buffer", 10**9)):
            try:
                whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
            except ValueError as error:
                raise UserError(str(error)) from None

    @property
    def as_cache(self) -> CacheConfig:
        """The settings of a cache of the same activations, which is not written."""
        shared = {field.name for field in dataclasses.fields(CacheConfig)} & set(OF_MODEL)
        settings = {name: getattr(self, name) for name in shared}
        n_tokens = self.tokens or min(self.n_steps * self.batch_size, 10**12)
        return CacheConfig(**settings, tokens=n_tokens, batch_size=self.rows_at_once)


OF_MODEL = tuple(
    field.name
    for field in dataclasses.fields(LiveConfig)
    if field.name not in {field.name for field in dataclasses.fields(TrainingConfig)}
)
