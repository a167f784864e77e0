"""A `LanguageModel` made of any language model that the library `transformers` loads.

Hooks read and replace activations; an exception ends a forward pass as soon as it has the
activations that were asked for. A forward pass from a layer on is the model's own with the blocks
before that layer skipped. So everything around the blocks (positions, masks, the last norm, the
head) is computed by the model's own code.

This module does not import `transformers`; `transformers_loading` does, when a model is loaded.
"""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError
from matryoshka.model_structure import (
    Parts,
    find_blocks,
    find_parts,
    input_of,
    stream_of,
    with_input,
    with_stream,
)
from matryoshka.sites import Replace, Site, check_site
from matryoshka.tiny_model import hash_of

PROBE = 3  # the number of token ids that a model is tried on
NO_LIMIT = 10**9  # longer than any row; tokenizers without a limit say 10^30


class _Found(Exception):
    """Raised to end a forward pass when it has the activations."""

    def __init__(self, acts: Tensor) -> None:
        super().__init__()
        self.acts = acts


class TransformersModel:
    """A causal language model, or an encoder without a head, of `transformers`.

    `model` is on its device, in its dtype and in evaluation mode. `tokenizer`: None if there is
    none. `not_loaded`: names of weights that were in no file; activations do not depend on them.
    Raises `UserError` if no blocks are found.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        has_head: bool = True,
        not_loaded: tuple[str, ...] = (),
    ) -> None:
        self.model, self.tokenizer, self.has_head = model, tokenizer, has_head
        self._not_loaded = not_loaded
        self._takes = inspect.signature(model.forward).parameters
        self._parts_of: dict[int, Parts] = {}
        config = model.config.get_text_config()
        self.d_vocab: int = model.get_input_embeddings().num_embeddings
        self.max_seq_len = longest_row(model, config, tokenizer)
        n_layers = getattr(config, "num_hidden_layers", None)
        with torch.no_grad():
            self._calls = find_blocks(model, n_layers, self._try)
        self.n_layers = len(self._calls)
        self.d_model: int = input_of(self._calls[0].args, self._calls[0].kwargs).shape[-1]

    # ------------------------------------------------------------------------ what it is

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights' names, shapes and float32 values, by name: 64 hex digits."""
        weights = self.model.state_dict()
        return hash_of({name: weights[name] for name in weights if name not in self._not_loaded})

    @property
    def begin_id(self) -> int | None:
        """The id that begins a text: the tokenizer's [BOS], or [CLS] if it has no [BOS]."""
        begin = self._special("bos_token_id")
        return self._special("cls_token_id") if begin is None else begin

    @property
    def pad_id(self) -> int | None:
        """The id that the tokenizer pads with."""
        return self._special("pad_token_id")

    @property
    def end_id(self) -> int | None:
        """The id that ends a text: the tokenizer's [EOS], or [SEP] if it has no [EOS]."""
        end = self._special("eos_token_id")
        return self._special("sep_token_id") if end is None else end

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokenizer's special ids, except that of unknown text, which stands for text."""
        if self.tokenizer is None:
            named = [self.begin_id, self.end_id, self.pad_id]
            return frozenset(token for token in named if token is not None)
        unknown = self.tokenizer.unk_token_id
        others = (self.begin_id, self.end_id, self.pad_id)
        ids = set(self.tokenizer.all_special_ids)
        return frozenset(token for token in ids if token != unknown or token in others)

    def _special(self, name: str) -> int | None:
        found = getattr(self.model.config if self.tokenizer is None else self.tokenizer, name, None)
        return found if isinstance(found, int) else None

    def text_of(self, tok_id: int) -> str:
        """The text of a token, with its leading space; the id as text if there is no tokenizer.

        A token that is a part of a character is U+FFFD.
        """
        token = self.tokenizer and self.tokenizer.convert_ids_to_tokens(tok_id)
        if token is None:
            return str(tok_id)
        text: str = self.tokenizer.decode([tok_id], clean_up_tokenization_spaces=False)
        # U+2581 is SentencePiece's mark of a space, which is lost at the beginning of a text.
        return " " + text if token.startswith("\u2581") and not text.startswith(" ") else text

    def check_site(self, layer: int, site: str) -> None:
        """Raises `UserError` if the model does not have this site at this layer."""
        check_site(layer, site, self.n_layers)
        if site in ("attn_out", "mlp_out"):
            self._parts(layer)

    # ------------------------------------------------------------------------ what it computes

    def residual(self, tok_ids: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """The residual stream at `layer`, [batch, seq, d_model]. See `LanguageModel`."""
        return self.activations(tok_ids, layer, "resid_pre", is_real)

    def activations(
        self, tok_ids: Tensor, layer: int, site: Site, is_real: Tensor | None = None
    ) -> Tensor:
        """The activations at a site of `layer`, [batch, seq, d_model]. See `LanguageModel`."""
        self.check_site(layer, site)
        return self._read(self._inputs(tok_ids, is_real), layer, site)

    def forward_from(self, residual: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """Log-probabilities, [batch, seq, d_vocab], from the residual stream at `layer`.

        See `LanguageModel`. Raises `UserError` if the blocks also read the token ids.
        """
        self._require_head()
        self.check_site(layer, "resid_pre")
        if not self.stream_is_all:
            raise UserError(
                f"{self._name}: its blocks also read the token ids, so no forward pass can begin "
                "with the residual stream alone"
            )
        return self._from(residual, layer, is_real)

    def log_probs_with(
        self,
        tok_ids: Tensor,
        layer: int,
        site: Site,
        replace: Replace,
        is_real: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities, [batch, seq, d_vocab], if `replace(acts)` replaces the activations.

        See `LanguageModel`.
        """
        self._require_head()
        self.check_site(layer, site)
        with self._replacing(layer, site, lambda acts: replace(acts).to(acts.dtype)):
            return log_probabilities(self._run(self._inputs(tok_ids, is_real)))

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _require_head(self) -> None:
        if not self.has_head:
            raise UserError(f"{self._name} has no head that predicts next tokens")

    def _from(self, residual: Tensor, layer: int, is_real: Tensor | None) -> Tensor:
        """The model's own forward pass from `residual` on, without the blocks before `layer`."""
        tok_ids = torch.zeros(residual.shape[:2], dtype=torch.int64, device=self.device)
        stream = residual.to(self.device, self.model.dtype)
        with self._skipping(layer), self._replacing(layer, "resid_pre", lambda _: stream):
            return log_probabilities(self._run(self._inputs(tok_ids, is_real)))

    def _read(self, inputs: dict[str, Tensor], layer: int, site: Site) -> Tensor:
        """The activations at a site in the forward pass of `inputs`, which ends there."""

        def stop(acts: Tensor) -> Tensor:
            raise _Found(acts)

        try:
            with self._replacing(layer, site, stop):
                self._run(inputs)
        except _Found as found:
            return found.acts
        raise RuntimeError(f"the forward pass did not come to {site} of block {layer}")

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        """The model's forward pass, which a hook may end with an exception."""
        self._shape = inputs["input_ids"].shape  # [batch, seq]
        no_cache = {"use_cache": False} if "use_cache" in self._takes else {}
        return self.model(**inputs, **no_cache)

    @contextlib.contextmanager
    def _replacing(self, layer: int, site: Site, replace: Replace) -> Iterator[None]:
        """A context in which `replace(acts)` replaces the activations at a site."""
        if site == "resid_pre" and layer == self.n_layers:
            layer, site = layer - 1, "resid_post"

        def read(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return with_input(args, kwargs, replace(input_of(args, kwargs)))

        def left(module: nn.Module, args: Any, output: Any) -> Any:
            stream = stream_of(output)  # in a block it may be flat: [batch * seq, d_model]
            acts = replace(stream.reshape(*self._shape, -1))
            return with_stream(output, acts.reshape(stream.shape))

        block = self._calls[layer].module
        if site == "resid_pre":
            hook = block.register_forward_pre_hook(read, with_kwargs=True)
        elif site == "resid_post":
            hook = block.register_forward_hook(left)
        else:
            name = getattr(self._parts(layer), site)
            hook = block.get_submodule(name).register_forward_hook(left)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _skipping(self, layer: int) -> Iterator[None]:
        """A context in which the blocks before `layer` return their inputs."""
        skipped = self._calls[:layer]
        for call in skipped:
            call.module.forward = functools.partial(_read_through, call.output)
        try:
            yield
        finally:
            for call in skipped:
                del call.module.forward  # restores the method of the class

    def _parts(self, layer: int) -> Parts:
        """The names of a block's attention and MLP. Raises `UserError` if they are not found."""
        if layer not in self._parts_of:
            self._parts_of[layer] = find_parts(self._calls[layer])
        return self._parts_of[layer]

    # ------------------------------------------------------------------------ what it is given

    def _inputs(self, tok_ids: Tensor, is_real: Tensor | None = None) -> dict[str, Tensor]:
        """The arguments of the forward pass: ids [batch, seq]; with padding, mask and positions.

        Raises `UserError` if rows are too long, or cannot be padded like this.
        """
        seq = tok_ids.shape[1]
        if seq > self.max_seq_len:
            raise UserError(f"rows of {seq} tokens: the model has {self.max_seq_len} positions")
        if is_real is None or bool(is_real.all()):
            return {"input_ids": tok_ids}
        inputs = {"input_ids": tok_ids, "attention_mask": is_real.to(self.device).long()}
        is_after_padding = is_real[:, 1:] & ~is_real[:, :-1]
        if bool(is_after_padding.any()) and self._needs_positions:
            inputs["position_ids"] = positions_of(inputs["attention_mask"])
        return inputs

    @functools.cached_property
    def _needs_positions(self) -> bool:
        """Whether the model has to be given `position_ids` if padding comes before tokens.

        Otherwise it computes them itself. Both are tried. Raises `UserError` if neither gives the
        activations of the row without padding.
        """
        filled = self.pad_id if self.pad_id is not None and self.pad_id < self.d_vocab else 0
        ids = torch.cat([torch.full_like(self._probe, filled), self._probe], dim=1)
        mask = torch.cat([torch.zeros_like(self._probe), torch.ones_like(self._probe)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        alone = self._read({"input_ids": self._probe}, self.n_layers, "resid_pre")
        errors = {}
        for needs_positions in [False, True] if "position_ids" in self._takes else [False]:
            given = {"position_ids": positions_of(mask)} if needs_positions else {}
            padded = self._read(inputs | given, self.n_layers, "resid_pre")[:, PROBE:]
            errors[needs_positions] = float((padded - alone).norm() / alone.norm())
        best = min(errors, key=errors.__getitem__)
        if errors[best] > min(0.1, 1000 * torch.finfo(self.model.dtype).eps):
            raise UserError(f"{self._name} cannot read rows that are padded before their tokens")
        return best

    @functools.cached_property
    def _probe(self) -> Tensor:
        """The first ids that are not special, [1, PROBE]."""
        ordinary = (i for i in range(self.d_vocab) if i not in self.special_ids)
        return torch.tensor([list(itertools.islice(ordinary, PROBE))], device=self.device)

    def _try(self) -> None:
        """Runs the model on the probe. Raises `UserError` if it needs more than token ids."""
        try:
            self._run(self._inputs(self._probe))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self._name} does not run on token ids alone ({reason})") from error

    @functools.cached_property
    def stream_is_all(self) -> bool:
        """Whether each block's only input is the residual stream, and not also the token ids."""
        layer = self.n_layers // 2
        inputs = self._inputs(self._probe)
        whole = log_probabilities(self._run(inputs))
        parts = self._from(self._read(inputs, layer, "resid_pre"), layer, None)
        return bool((whole - parts).abs().max() <= 1e-3 * whole.abs().max())


def _read_through(returned: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a block's forward method: returns its input, in the form of what it `returned`."""
    return with_stream(returned, input_of(args, kwargs))


def log_probabilities(output: Any) -> Tensor:
    """Log-probabilities, float32 [batch, seq, d_vocab], from the output of a model with a head."""
    logits: Tensor = output.logits
    return logits.float().log_softmax(dim=-1)


def positions_of(mask: Tensor) -> Tensor:
    """Each token's index among the real tokens of its row; 0 at padding before them.

    mask: [batch, seq], 1 at real tokens and 0 at padding.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def longest_row(model: Any, config: Any, tokenizer: Any) -> int:
    """The length of the longest row, from the model's config, or else from its tokenizer."""
    said = getattr(config, "max_position_embeddings", None)
    if said is None:
        said = getattr(tokenizer, "model_max_length", None)
    if not isinstance(said, int) or not 0 < said < NO_LIMIT:
        return NO_LIMIT
    for module in model.modules():  # RoBERTa's positions begin after padding_idx
        is_table = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if is_table and module.num_embeddings == said and module.padding_idx is not None:
            return said - int(module.padding_idx) - 1
    return said
