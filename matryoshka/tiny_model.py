"""TinyModel: a small language model, its activations, and how its weights are loaded.

It is a transformer without LayerNorm, trained on TinyStories (N. Nabeshima; 4 layers, d_model 768,
16 heads, 10,000 tokens):

    x = embed[tok_ids] + pos_embed
    x = x + attn(x),  x = x + mlp(x)     in each block
    log-probabilities = log_softmax(x W_head + b_head)

The residual stream at layer L is the input of block L, counted from 0; at L = n_layers it is the
input of the head. Sizes are taken from the weights' shapes, so weights of other sizes load, too.
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
BEGIN, PAD = 9996, 9998  # the token ids that a row begins with, and that it is padded with
HASHED_AT_ONCE = 2**24  # values; a float32 copy of all weights of a large model may not fit
SPECIAL_TEXTS = {BEGIN: "[BEGIN]", 9997: "[END]", PAD: "[PAD]", 9999: "[UNK]"}


class Linear(nn.Linear):
    """A linear map that is not initialized, because its values are loaded: that saves seconds."""

    def reset_parameters(self) -> None:
        """Does nothing."""


class Embedding(nn.Embedding):
    """An embedding that is not initialized, like `Linear`."""

    def reset_parameters(self) -> None:
        """Does nothing."""


class Attention(nn.Module):
    """Causal attention, scaled by 1/sqrt(d_head). Q, K and V have no biases; O has one."""

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
    """The MLP: a linear map, ReLU, and another linear map."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.read_in = Linear(d_model, d_mlp)
        self.write_out = Linear(d_mlp, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, d_model] to the same shape."""
        out: Tensor = self.write_out(F.relu(self.read_in(x)))
        return out


class Block(nn.Module):
    """Attention and then the MLP; the output of each is added to the stream."""

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
    """The whole model, a `language_models.LanguageModel`.

    Make it with `from_pretrained`; `TinyModel(...)` has shapes but no values. Rows can only be
    padded at their end, where no real position attends to padding.
    """

    has_head = stream_is_all = True
    tokenizer = None  # the weights come without one
    texts: Sequence[str] = ()  # the text of each token id: see `tiny_tokens.load_texts`
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
        with torch.device("meta"):  # shapes only, so that it cannot be run without weights
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
        """Loads the model from a file, a folder or a repo on the hub.

        `name_or_path`: a `.pt` or `.safetensors` file, or a folder or hub repo that has
        `tiny_model.pt`. `revision`: the hub repo's branch, tag or commit. All sizes are taken from
        the weights' shapes, except the number of heads. Weights are converted to float32, and do
        not require gradients. Raises `UserError` if there are no weights, the hub cannot be
        reached, or names or shapes are not those of a TinyModel.
        """
        path = locate_weights(name_or_path, revision)
        return cls.from_state_dict(read_weights(path), str(name_or_path), n_heads).to(device)

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Tensor], source: str = "state dict", n_heads: int = 16
    ) -> "TinyModel":
        """Makes the model with these weights, in float32. Raises `UserError`, naming `source`."""
        shapes = check_weights(state, source)
        model = cls(n_heads=n_heads, **shapes)
        # .clone(): a change of this model must not change the file, or another model of `state`.
        weights = {name: tensor.to(torch.float32).clone() for name, tensor in state.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    def embed_tokens(self, tok_ids: Tensor) -> Tensor:
        """The residual stream at layer 0, [batch, seq, d_model], from token ids [batch, seq].

        Raises `UserError` if seq is above `max_seq_len`.
        """
        seq = tok_ids.shape[1]
        if seq > self.max_seq_len:
            raise UserError(f"rows of {seq} tokens: the model has {self.max_seq_len} positions")
        embedded: Tensor = self.embed(tok_ids)
        return embedded + self.pos_embed[:, :seq]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pos_embed.device

    def text_of(self, tok_id: int) -> str:
        """The name of a special token, or else the text in `texts`, or else the id as text."""
        text = self.texts[tok_id] if 0 <= tok_id < len(self.texts) else ""
        return SPECIAL_TEXTS.get(tok_id, text or str(tok_id))

    def residual(self, tok_ids: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """The residual stream at `layer`, [batch, seq, d_model]. Only the blocks before it are run.

        `tok_ids`: integers [batch, seq], from 0 to d_vocab - 1 (not checked, because on a GPU each
        check would wait for it). Raises `UserError` for a layer or a length that the model does not
        have, and if padding, False in `is_real`, comes before a token.
        """
        self.check_layer(layer)
        require_padded_at_end(is_real)
        x = self.embed_tokens(tok_ids)  # [batch, seq, d_model]
        for block in self.torso[:layer]:
            x = block(x)
        return x

    def forward_from(self, residual: Tensor, layer: int, is_real: Tensor | None = None) -> Tensor:
        """Log-probabilities, [batch, seq, d_vocab], from the residual stream at `layer`.

        With an SAE's reconstruction as `residual` [batch, seq, d_model], they show how much the SAE
        costs the model. Raises `UserError` as the method `residual` does.
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
        """The activations at a site of `layer`, [batch, seq, d_model].

        The forward pass stops there. Raises `UserError` as `residual` does, and for unknown sites.
        """
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
        """Log-probabilities, [batch, seq, d_vocab], if `replace(acts)` replaces the activations.

        acts, at a site of `layer`, are [batch, seq, d_model]. Raises `UserError` as `activations`.
        """
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
        """Raises `UserError` if the model does not have a residual stream at `layer`."""
        self.check_site(layer, "resid_pre")

    def check_site(self, layer: int, site: str) -> None:
        """Raises `UserError` if the model does not have this site at this layer."""
        check_site(layer, site, self.n_layers)

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights' names, shapes and float32 values, by name: 64 hex digits.

        It does not depend on the file's format. It is computed once, and does not change if the
        weights are changed afterwards.
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
    """Raises `UserError` if a token follows padding. is_real: bool [batch, seq], or None."""
    if is_real is not None and bool((is_real[:, 1:] & ~is_real[:, :-1]).any()):
        raise UserError("rows of TinyModel can only be padded at their end")


def locate_weights(name_or_path: str | Path, revision: str | None) -> Path:
    """The path of the file of weights; downloads it if it is on the hub. Raises `UserError`."""
    path, name = Path(name_or_path), str(name_or_path)
    if os.path.isdir(path):
        if not os.path.isfile(path / WEIGHTS_FILE):
            raise UserError(f"folder {name} holds no {WEIGHTS_FILE}")
        return path / WEIGHTS_FILE
    if os.path.exists(path):
        return path
    if name.count("/") != 1 or name[0] in "./~" or path.suffix in (".pt", ".safetensors"):
        raise UserError(
            f"there are no weights at {name}: it is neither a file nor the name of a hub repo"
        )
    try:
        return Path(huggingface_hub.hf_hub_download(name, WEIGHTS_FILE, revision=revision))
    # The client raises errors of many classes, its own and those of its HTTP library.
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        reason = f"{type(error).__name__}: {error}"[:200]  # such as a full disk
        raise UserError(
            f"cannot get {WEIGHTS_FILE} of {name}{at} from the Hugging Face hub ({reason}); to use "
            f"a local copy, give the path of its {WEIGHTS_FILE} instead of the name"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the state dict in a .safetensors or .pt file; runs no code. Raises `UserError`."""
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
    """The name and the shape of every tensor in a TinyModel's state dict."""
    model = TinyModel(d_model, n_layers, 1, d_mlp, d_vocab, max_seq_len)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(state: dict[str, Tensor], source: str) -> dict[str, int]:
    """The arguments of `TinyModel` except n_heads, from the weights' shapes.

    Raises `UserError` that says which tensor is wrong, what was expected and what was found.
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
        # A limit, so that a wrong name such as torso.99999999 does not make a huge model.
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
