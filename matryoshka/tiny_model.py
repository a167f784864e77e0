"""TinyModel: its forward pass up to a residual layer, and its weights.

A transformer of the plainest kind, trained on TinyStories (N. Nabeshima; 4 layers, d_model 768,
16 heads, 10,000 tokens). There is no LayerNorm anywhere:

    x = embed[tok_ids] + pos_embed
    x = x + attn(x),  x = x + mlp(x)     once a block
    log-probabilities = log_softmax(x W_head + b_head)

The residual stream at layer L is the input of block L, blocks counted from 0; at L = n_layers it
is what the head reads. Shapes are read off the weights, so any state dict of these names loads.
"""

import functools
import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from matryoshka.errors import UserError
from matryoshka.sites import Replace, Site, check_site

WEIGHTS_FILE = "tiny_model.pt"
BEGIN, PAD = 9996, 9998  # of its 10,000 token ids: what rows begin with, and are filled up with
HASHED_AT_ONCE = 2**24  # values: a copy of all of a large model's weights in float32 may not fit
SPECIAL_TEXTS = {BEGIN: "[BEGIN]", 9997: "[END]", PAD: "[PAD]", 9999: "[UNK]"}


class Linear(nn.Linear):
    """A linear map whose values are always loaded: none are drawn, which takes seconds."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """As `Linear`, for an embedding."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    """Causal attention, scaled by 1/sqrt(d_head). Q, K and V have no bias, O has one."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.Q = Linear(d_model, d_model, bias=False)
        self.K = Linear(d_model, d_model, bias=False)
        self.V = Linear(d_model, d_model, bias=False)
        self.O = Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, d_model] to the same shape."""
        q, k, v = (
            rearrange(project(x), "batch seq (head d) -> batch head seq d", head=self.n_heads)
            for project in (self.Q, self.K, self.V)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.O(rearrange(mixed, "batch head seq d -> batch seq (head d)"))
        return out


class MLP(nn.Module):
    """Read in, ReLU, write out."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.read_in = Linear(d_model, d_mlp)
        self.write_out = Linear(d_mlp, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, d_model] to the same shape."""
        out: Tensor = self.write_out(F.relu(self.read_in(x)))
        return out


class Block(nn.Module):
    """Attention, then the MLP, each added to the stream that it reads."""

    def __init__(self, d_model: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        self.attn = Attention(d_model, n_heads)
        self.mlp = MLP(d_model, d_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, d_model] to the same shape."""
        x = x + self.attn(x)
        x = x + self.mlp(x)
        return x


class TinyModel(nn.Module):
    """The whole model. Make it with `from_pretrained`: `TinyModel(...)` has shapes, no values.

    It is a `language_models.LanguageModel`. Rows can be padded at their end only, where no other
    position sees the padding.
    """

    has_head = stream_is_all = True
    tokenizer = None  # the weights come without one
    texts: Sequence[str] = ()  # of token ids: see `tiny_tokens.load_texts`
    begin_id, pad_id = BEGIN, PAD
    special_ids = frozenset({BEGIN, PAD})

    def __init__(
        self, d_model: int, n_layers: int, n_heads: int, d_mlp: int, d_vocab: int, max_seq_len: int
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise UserError(f"n_heads is {n_heads}: it must divide the weights' d_model, {d_model}")
        self.d_model, self.n_layers, self.n_heads = d_model, n_layers, n_heads
        self.d_vocab, self.max_seq_len = d_vocab, max_seq_len
        with torch.device("meta"):  # shapes only: unloaded weights cannot be run by mistake
            self.embed = Embedding(d_vocab, d_model)
            self.pos_embed = nn.Parameter(torch.empty(1, max_seq_len, d_model))
            self.torso = nn.ModuleList(Block(d_model, n_heads, d_mlp) for _ in range(n_layers))
            self.lm_head = Linear(d_model, d_vocab)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        n_heads: int = 16,
    ) -> "TinyModel":
        """The model whose weights are in a file, in a folder, or in a repo on the hub.

        `name_or_path`: a `.pt` or `.safetensors` file, a folder or a hub repo that holds
        `tiny_model.pt`; `revision`: the hub repo's branch, tag or commit. Every shape but the
        number of heads can be read off the weights. They are run in float32, whatever they are
        stored in, and ask for no gradient. Raises `UserError` where there are no weights there,
        the hub does not answer, or names or shapes are not a TinyModel's.
        """
        path = locate_weights(name_or_path, revision)
        return cls.from_state_dict(read_weights(path), str(name_or_path), n_heads).to(device)

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Tensor], source: str = "state dict", n_heads: int = 16
    ) -> "TinyModel":
        """The model with these weights, as float32. Raises `UserError` naming `source`."""
        shapes = check_weights(state, source)
        model = cls(n_heads=n_heads, **shapes)
        # .clone(): the hub's file must not be changed through this model, nor one model by another
        weights = {name: tensor.to(torch.float32).clone() for name, tensor in state.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    def embed_tokens(self, tok_ids: Tensor) -> Tensor:
        """[batch, seq] token ids to the residual stream at layer 0, [batch, seq, d_model].

        Raises `UserError` for a sequence longer than the positions that the model has.
        """
        seq = tok_ids.shape[1]
        if seq > self.max_seq_len:
            raise UserError(f"rows of {seq} tokens: the model has {self.max_seq_len} positions")
        embedded: Tensor = self.embed(tok_ids)
        return embedded + self.pos_embed[:, :seq]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_embed.device

    def text_of(self, tok_id: int) -> str:
        """The name of a special token, else its text, or the id itself where `texts` has none."""
        text = self.texts[tok_id] if 0 <= tok_id < len(self.texts) else ""
        return SPECIAL_TEXTS.get(tok_id, text or str(tok_id))

    def residual(self, tok_ids: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """The residual stream at `layer`, [batch, seq, d_model]: only blocks before it are run.

        `tok_ids`: integers, [batch, seq], in 0..d_vocab-1 (not checked here: on a GPU that would
        be a stall a call). Raises `UserError` for a layer or a length that the model has not, and
        where padding, False in `is_real`, comes before a token.
        """
        self.check_layer(layer)
        require_padded_at_end(is_real)
        x = self.embed_tokens(tok_ids)  # [batch, seq, d_model]
        for block in self.torso[:layer]:
            x = block(x)
        return x

    def forward_from(self, residual: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """Log-probabilities, [batch, seq, d_vocab], from the residual stream at `layer`.

        A reconstruction in the residual's place, [batch, seq, d_model], is how one asks what an
        SAE costs the model. Raises `UserError` as `residual` does.
        """
        self.check_layer(layer)
        require_padded_at_end(is_real)
        x = residual
        for block in self.torso[layer:]:
            x = block(x)
        return F.log_softmax(self.lm_head(x), dim=-1)

    def activations(
        self, tok_ids: Tensor, layer: int, site: Site, is_real: Tensor | None = None
    ) -> Tensor:
        """The activations at a site of `layer`, [batch, seq, d_model]; no more is run than it
        needs. Raises `UserError` as `residual` does, and for a site that is none."""
        self.check_site(layer, site)
        if site == "resid_post":
            return self.residual(tok_ids, layer + 1, is_real)
        x = self.residual(tok_ids, layer, is_real)
        if site == "resid_pre":
            return x
        block = self.torso[layer]
        assert isinstance(block, Block)
        attn_out: Tensor = block.attn(x)
        if site == "attn_out":
            return attn_out
        mlp_out: Tensor = block.mlp(x + attn_out)
        return mlp_out

    def log_probs_with(
        self,
        tok_ids: Tensor,
        layer: int,
        site: Site,
        replace: Replace,
        is_real: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities, [batch, seq, d_vocab], with `replace(acts)` where a site's activations
        [batch, seq, d_model] were. Raises `UserError` as `activations` does."""
        self.check_site(layer, site)
        if site == "resid_post":
            return self.log_probs_with(tok_ids, layer + 1, "resid_pre", replace, is_real)
        x = self.residual(tok_ids, layer, is_real)
        if site == "resid_pre":
            return self.forward_from(replace(x), layer, is_real)
        block = self.torso[layer]
        assert isinstance(block, Block)
        attn_out = block.attn(x)
        x = x + (replace(attn_out) if site == "attn_out" else attn_out)
        mlp_out = block.mlp(x)
        x = x + (replace(mlp_out) if site == "mlp_out" else mlp_out)
        return self.forward_from(x, layer + 1, is_real)

    def forward(self, tok_ids: Tensor) -> Tensor:
        """Log-probabilities of each next token, [batch, seq, d_vocab], from ids [batch, seq]."""
        return self.forward_from(self.embed_tokens(tok_ids), layer=0)

    def check_layer(self, layer: int) -> None:
        """Raises `UserError` unless the model has a residual stream at `layer`."""
        self.check_site(layer, "resid_pre")

    def check_site(self, layer: int, site: str) -> None:
        """Raises `UserError` unless the model has this site at this layer."""
        check_site(layer, site, self.n_layers)

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of names, shapes and float32 values, sorted by name: 64 hex digits.

        The same weights have the same hash in whichever format or precision they were stored.
        Computed once: weights changed afterwards keep the old one.
        """
        return hash_of(self.state_dict())


def hash_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values, sorted by name: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for part in torch.split(tensor.detach().reshape(-1), HASHED_AT_ONCE):
            digest.update(part.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def require_padded_at_end(is_real: Tensor | None) -> None:
    """Raises `UserError` where a token follows padding: is_real is bool [batch, seq], or None."""
    if is_real is not None and bool((is_real[:, 1:] & ~is_real[:, :-1]).any()):
        raise UserError("rows of TinyModel can be padded at their end only")


def locate_weights(name_or_path: str | Path, revision: str | None) -> Path:
    """The weights' file on this machine, downloaded if it is the hub's. Raises `UserError`."""
    path, name = Path(name_or_path), str(name_or_path)
    if os.path.isdir(path):
        if not os.path.isfile(path / WEIGHTS_FILE):
            raise UserError(f"folder {name} holds no {WEIGHTS_FILE}")
        return path / WEIGHTS_FILE
    if os.path.exists(path):
        return path
    if name.count("/") != 1 or name[0] in "./~" or path.suffix in (".pt", ".safetensors"):
        raise UserError(f"there are no weights at {name}: no such file, and no hub repo's name")
    try:
        return Path(huggingface_hub.hf_hub_download(name, WEIGHTS_FILE, revision=revision))
    # The client lets a dozen unrelated classes through, its own and its HTTP library's.
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        reason = f"{type(error).__name__}: {error}"[:200]  # a full disk, a home that is read-only
        raise UserError(
            f"cannot get {WEIGHTS_FILE} of {name}{at} from the Hugging Face hub ({reason}); to use "
            f"a local copy, give the path of its {WEIGHTS_FILE} instead of the name"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pt file; no code in it is run. Raises `UserError`."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise UserError(f"weights {path} are not a state dict ({type(error).__name__})") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"weights {path} are not a safetensors file ({error})") from None
    is_state = isinstance(state, dict) and all(isinstance(t, Tensor) for t in state.values())
    if not is_state:
        raise UserError(f"weights {path} are not a state dict: expected names with tensors")
    weights: dict[str, Tensor] = state
    return weights


def expected_shapes(
    d_model: int, n_layers: int, d_mlp: int, d_vocab: int, max_seq_len: int
) -> dict[str, list[int]]:
    """Every name in a TinyModel's state dict, with its shape."""
    model = TinyModel(d_model, n_layers, 1, d_mlp, d_vocab, max_seq_len)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(state: dict[str, Tensor], source: str) -> dict[str, int]:
    """`TinyModel`'s arguments but n_heads, read off the weights. Raises `UserError`.

    The message says which tensor is wrong, what was expected and what was found.
    """

    def size(name: str, ndim: int, axis: int) -> int:
        if name not in state:
            raise UserError(f"weights {source}: expected a tensor {name}, found none of that name")
        if state[name].ndim != ndim:
            found = list(state[name].shape)
            raise UserError(f"weights {source}: {name}: expected {ndim} axes, found shape {found}")
        return state[name].shape[axis]

    blocks = [name.split(".")[1] for name in state if name.startswith("torso.")]
    shapes = {
        "d_vocab": size("embed.weight", 2, 0),
        "d_model": size("embed.weight", 2, 1),
        "max_seq_len": size("pos_embed", 3, 1),
        "d_mlp": size("torso.0.mlp.read_in.weight", 2, 0),
        # No more blocks than names: a stray torso.99999999 is a wrong name, not a huge model.
        "n_layers": min(len(state), 1 + max((int(b) for b in blocks if b.isdecimal()), default=0)),
    }
    if min(shapes.values()) < 1:
        raise UserError(f"weights {source}: expected sizes above zero, found {shapes}")
    expected = expected_shapes(**shapes)
    for name in [*expected, *state]:
        if name not in state:
            raise UserError(f"weights {source}: expected a tensor {name}, found none of that name")
        if name not in expected:
            raise UserError(f"weights {source}: found {name}, expected none of that name")
        found = list(state[name].shape)
        if found != expected[name]:
            raise UserError(f"weights {source}: {name}: expected {expected[name]}, found {found}")
        if not state[name].is_floating_point():
            raise UserError(f"weights {source}: {name}: expected floats, found {state[name].dtype}")
    return shapes
