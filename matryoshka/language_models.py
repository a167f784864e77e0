"""A language model as a handful of names, whoever made it; and how one is loaded.

`tiny_model.TinyModel` has these names, and so has `transformers_model.TransformersModel`, which
wraps whatever the library `transformers` loads. Nothing else of a model is used anywhere: a cache,
an evaluation and a page of latents work the same for all of them.
"""

import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal, Protocol

import huggingface_hub
import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.hub_errors import is_passing
from matryoshka.sites import Replace, Site
from matryoshka.tiny_model import WEIGHTS_FILE, TinyModel
from matryoshka.tiny_tokens import load_texts
from matryoshka.transformers_loading import load_transformers_model

ModelDtype = Literal["float32", "bfloat16", "float16"]


class LanguageModel(Protocol):
    """What a language model is here. Blocks are counted from 0.

    Activations have the dtype that the model runs in; log-probabilities are float32, in nats.
    `is_real`: bool [batch, seq], False where a row is padded; None where it is nowhere. Positions
    that are real have the values that their row has alone, wherever it is padded; those of padding
    mean nothing. All of these raise `UserError` for a layer, a site or a length that the model has
    not, and where it cannot be padded like that.
    """

    @property
    def d_model(self) -> int:
        """Width of the residual stream, and of attention's and the MLP's outputs."""

    @property
    def d_vocab(self) -> int:
        """Token ids are 0 to d_vocab - 1."""

    @property
    def n_layers(self) -> int:
        """Blocks."""

    @property
    def max_seq_len(self) -> int:
        """The longest row that the model takes."""

    @property
    def has_head(self) -> bool:
        """Whether it predicts next tokens. `forward_from` and `log_probs_with` need it."""

    @property
    def stream_is_all(self) -> bool:
        """Whether later blocks see of the token ids only what is in the residual stream: else
        `forward_from` raises `UserError`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `transformers`, None where there is none."""

    @property
    def begin_id(self) -> int | None:
        """The id that a row or a text begins with, if the vocabulary has one."""

    @property
    def pad_id(self) -> int | None:
        """The id that rows are filled up with, if the vocabulary has one."""

    @property
    def special_ids(self) -> Set[int]:
        """Ids that stand for no text: a cache leaves their positions out by default."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of names, shapes and float32 values, sorted by name: 64 hex digits."""

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where token ids and residuals are expected."""

    def text_of(self, tok_id: int) -> str:
        """The text of a token id, a leading space included; the id itself where none is known."""

    def check_site(self, layer: int, site: str) -> None:
        """Raises `UserError` unless the model has this site at this layer."""

    def residual(self, tok_ids: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """The residual stream at `layer`, 0 to n_layers: [batch, seq, d_model] from [batch, seq].

        Only the blocks before it are run.
        """

    def forward_from(self, residual: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """Log-probabilities [batch, seq, d_vocab] from the residual stream at `layer`."""

    def activations(
        self, tok_ids: Tensor, layer: int, site: Site, is_real: Tensor | None = None
    ) -> Tensor:
        """The activations at a site of `layer`, [batch, seq, d_model], from ids [batch, seq].

        The forward pass ends where they are.
        """

    def log_probs_with(
        self,
        tok_ids: Tensor,
        layer: int,
        site: Site,
        replace: Replace,
        is_real: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities [batch, seq, d_vocab] with `replace(acts)` in the activations' place.

        `replace` gets what `activations` returns, and returns a tensor of the same shape. At
        resid_pre, `forward_from(replace(residual(...)))` is the same, and runs fewer blocks where
        several replacements of one residual are asked for.
        """


def load_language_model(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: ModelDtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> LanguageModel:
    """The language model of that name: a TinyModel, or one that `transformers` loads.

    `name_or_path`: a repo on the Hugging Face hub, a folder, or a TinyModel's `.pt` or
    `.safetensors` file; `revision`: the hub repo's branch, tag or commit. `dtype`: what the model
    runs in. `trust_remote_code`: whether Python code that comes with the model may run.
    `tokenizer`: a hub name or a folder, where it is not the model's own; of TinyModel, the file
    that `tiny_tokens.load_texts` reads. Raises `UserError` where there is no such model, or none
    that can be used.
    """
    if is_tiny_model(name_or_path, revision):
        if dtype != "float32":
            raise UserError(f"--model-dtype {dtype}: TinyModel runs in float32 only")
        model = TinyModel.from_pretrained(name_or_path, revision, device)
        model.texts = load_texts(Path(tokenizer)) if tokenizer else ()
        return model
    return load_transformers_model(
        name_or_path, revision, dtype, device, trust_remote_code, tokenizer
    )


def is_tiny_model(name_or_path: str | Path, revision: str | None) -> bool:
    """Whether that is a TinyModel: a file of weights, or a folder or a hub repo that holds its.

    Raises `UserError` for a folder that holds no model, and where the hub does not answer and no
    model of `transformers` of that name was downloaded before.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if os.path.isdir(path):
        is_tiny = os.path.isfile(path / WEIGHTS_FILE)
        if not is_tiny and not os.path.isfile(path / "config.json"):
            raise UserError(f"folder {name} holds neither config.json nor {WEIGHTS_FILE}")
        return is_tiny
    if os.path.exists(path) or path.suffix in (".pt", ".safetensors") or not is_repo_name(name):
        return True
    if name.count("/") == 0:
        return False
    try:
        huggingface_hub.hf_hub_download(name, WEIGHTS_FILE, revision=revision)
    except Exception as error:  # no such file, no such repo: the other loader says which
        here = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if is_passing(error) and not isinstance(here, str):
            raise UserError(
                f"cannot get {name} from the Hugging Face hub ({type(error).__name__}); without a "
                "network, give its folder, or HF_HUB_OFFLINE=1 and HF_HOME where it was "
                "downloaded before"
            ) from error
        return False
    return True


def is_repo_name(name: str) -> bool:
    """Whether a repo on the hub can have this name: `gpt2`, `someone/model`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
