"""The interface that this project needs of a language model, and how to load one.

`tiny_model.TinyModel` implements it, and `transformers_model.TransformersModel` implements it for
any model that the library `transformers` loads. Caches, evaluations and pages of latents use only
this interface, and so work the same for all of them.
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
    """The interface of a language model. Blocks are counted from 0.

    Activations have the dtype that the model runs in; log-probabilities are float32, in nats.
    `is_real`: bool [batch, seq], False at padding; None if there is no padding. At real positions
    the values are those of the row without padding, wherever the padding is; at padding, values
    have no meaning. The methods raise `UserError` for a layer, site or length that the model does
    not have, and for padding that it cannot handle.
    """

    @property
    def d_model(self) -> int:
        """The width of the residual stream, and of the outputs of attention and MLP."""

    @property
    def d_vocab(self) -> int:
        """The size of the vocabulary: token ids are 0 to d_vocab - 1."""

    @property
    def n_layers(self) -> int:
        """The number of blocks."""

    @property
    def max_seq_len(self) -> int:
        """The number of tokens of the longest row that the model accepts."""

    @property
    def has_head(self) -> bool:
        """Whether it predicts next tokens, which `forward_from` and `log_probs_with` need."""

    @property
    def stream_is_all(self) -> bool:
        """Whether each block's only input is the residual stream, and not also the token ids.

        If it is not, `forward_from` raises `UserError`.
        """

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, an object of `transformers`; None if there is none."""

    @property
    def begin_id(self) -> int | None:
        """The id that a row or a text begins with, if the vocabulary has one."""

    @property
    def pad_id(self) -> int | None:
        """The id of padding, if the vocabulary has one."""

    @property
    def special_ids(self) -> Set[int]:
        """The special ids, such as [BEGIN]; by default, a cache leaves their positions out."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights' names, shapes and float32 values, by name: 64 hex digits."""

    @property
    def device(self) -> torch.device:
        """The device of the weights, on which token ids and activations must be, too."""

    def text_of(self, tok_id: int) -> str:
        """The text of a token id, with its leading space; the id as text if none is known."""

    def check_site(self, layer: int, site: str) -> None:
        """Raises `UserError` if the model does not have this site at this layer."""

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

        The forward pass stops there.
        """

    def log_probs_with(
        self,
        tok_ids: Tensor,
        layer: int,
        site: Site,
        replace: Replace,
        is_real: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities [batch, seq, d_vocab] if `replace(acts)` replaces the activations.

        `replace` gets what `activations` returns, and returns a tensor of the same shape. At
        resid_pre, `forward_from(replace(residual(...)))` is the same; for several replacements of
        one residual it runs fewer blocks.
        """


def load_language_model(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: ModelDtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> LanguageModel:
    """Loads a language model: a TinyModel, or one that `transformers` loads.

    `name_or_path`: a repo on the Hugging Face hub, a folder, or the `.pt` or `.safetensors` file of
    a TinyModel. `revision`: the hub repo's branch, tag or commit. `dtype`: the dtype in which the
    model runs. `trust_remote_code`: whether Python code that comes with the model may be run.
    `tokenizer`: a hub name or a folder, if it is not the model's own; for TinyModel, the file that
    `tiny_tokens.load_texts` reads. Raises `UserError` if there is no such model, or it cannot be
    used.
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
    """Whether this names a TinyModel: a file of weights, or a folder or hub repo that has one.

    Raises `UserError` for a folder without a model, and if the hub cannot be reached and no model
    of `transformers` with that name was downloaded before.
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
    except Exception as error:  # no such file or no such repo: the other loader says which
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
