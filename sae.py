"""The Matryoshka sparse autoencoder: what it is, the loss that it is trained on, its file.

    acts  = activation(s x W_enc + b_enc)            s = sqrt(d_model) / mean norm of the inputs
    x_hat = (acts W_dec + b_dec) / s

A Matryoshka SAE is trained so that the first m latents alone reconstruct x, for several prefix
lengths m at once. With x already scaled by s, d_j row j of W_dec, and w_m the weight of length m,
the loss of one sample is

    sum over lengths m of  w_m ( ||x - b_dec - sum_{j <= m} a_j d_j||^2
                                 + sparsity_weight * sum_{j <= m} a_j ||d_j|| )

`matryoshka_loss` computes it. The lengths are drawn at random in each step (`sample_prefixes`), or
fixed, or all of them weighted by their probability (matryoshka/prefix_draws.py). A single length,
all of the latents, makes a vanilla SAE.

Training computes the gradient of this loss with the formulas in matryoshka/kernels/, which are
faster than autograd and tested against it.

Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning Multi-Level Features with Matryoshka Sparse
Autoencoders" (arXiv 2503.17547).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

STREAM_INIT, STREAM_PREFIXES = 0, 1  # each purpose has its own stream of a seed's random numbers
FIRST_THRESHOLD = 0.1  # where jumprelu's thresholds start, in the units of activations

Sparsity = Literal["l1", "log"]


def seeded_generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends on `seed` and `stream` alone, which may be of any size.

    PyTorch uses 32 bits of a seed, so two streams are the same with a probability of 2^-32.
    """
    name = " ".join(str(int(part)) for part in (seed, *stream))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# ------------------------------------------------------------------------- activation functions


class Gate(NamedTuple):
    """What an activation function may need beside the pre-activations, to which these broadcast."""

    norms: Tensor | None  # ||d_j||, [..., n_latents]; training leaves it out for relu and jumprelu
    k: float | None = None  # active latents a sample, for topk and batchtopk
    threshold: Tensor | None = None  # [..., n_latents], for jumprelu and a trained batchtopk SAE


def relu(preacts: Tensor, gate: Gate) -> Tensor:
    """max(preacts, 0), in place."""
    return preacts.relu_()


def topk(preacts: Tensor, gate: Gate) -> Tensor:
    """a = relu(preacts), of which each sample keeps the k with the largest a_j ||d_j||.

    Gao et al. 2024 (arXiv 2406.04093), except that decoder rows may have any norm.
    """
    assert gate.norms is not None
    assert gate.k is not None
    acts = preacts.relu()
    scores = acts * gate.norms
    least_kept = scores.topk(int(gate.k), dim=-1).values[..., -1:]
    return torch.where(scores >= least_kept, acts, 0)


def batchtopk(preacts: Tensor, gate: Gate) -> Tensor:
    """a = relu(preacts), of which a batch keeps the batch * k with the largest a_j ||d_j||.

    preacts [..., batch, n_latents]. A trained SAE has a threshold in place of the comparison with
    the rest of the batch, so that each sample is encoded by itself. Bussmann, Leask, Nanda 2024
    (arXiv 2412.06410).
    """
    if gate.threshold is not None:
        return jumprelu(preacts, gate)
    assert gate.norms is not None
    assert gate.k is not None
    acts = preacts.relu()
    if not acts.numel():
        return acts
    scores = acts * gate.norms
    n_kept = max(1, round(gate.k * acts.shape[-2]))
    least_kept = scores.flatten(-2).topk(n_kept, dim=-1).values[..., -1:, None]
    return torch.where(scores >= least_kept, acts, 0)


def jumprelu(preacts: Tensor, gate: Gate) -> Tensor:
    """preacts_j where it is above threshold_j >= 0, and 0 elsewhere.

    Rajamanoharan et al. 2024 (arXiv 2407.14435). How the thresholds are trained is in
    matryoshka/kernels/jumprelu.py.
    """
    assert gate.threshold is not None
    return torch.where(preacts > gate.threshold, preacts, 0)


# Every activation function, by its name in an SAE's file. It takes pre-activations
# [..., n_latents], which it may overwrite, and returns activations of the same shape, none of them
# negative. Whatever else it needs is a field of Gate. The kernels' gradients are right if its slope
# is 1 where it is not 0, and 0 where it is; any other trains with `gradient="autograd"`.
Activation = Callable[[Tensor, Gate], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": relu,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
}
WITH_K = ("topk", "batchtopk")  # they fix L0 at k, and have no sparsity loss that steers it


def _check_activation(name: str, k: float | None, threshold: Tensor | None, n_latents: int) -> None:
    """Raises ValueError where the activation function is unknown, or lacks what it needs."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if name in WITH_K and not (k is not None and 0 < k <= n_latents):
        raise ValueError(f"k of {name} must be above 0 and at most {n_latents}, got {k}")
    if name == "topk" and k != int(k or 0):
        raise ValueError(f"topk needs a whole number of active latents a sample, got {k}")
    if name == "jumprelu" and threshold is None:
        raise ValueError("threshold missing, which jumprelu needs")


# ----------------------------------------------------------------------- prefixes and their loss


def prefix_probabilities(n_latents: int) -> Tensor:
    """P(m) for the lengths m = 1 .. n_latents - 1, proportional to sqrt(m) - sqrt(m - 1). float64.

    This is the original's Pareto law of power 0.5 and minimum length 1: it favours short prefixes.
    """
    roots = torch.arange(n_latents, dtype=torch.float64).sqrt()
    return roots.diff() / roots[-1]


def sample_prefixes(
    n_latents: int, n_prefixes: int, generator: torch.Generator, n_draws: int | None = None
) -> Tensor:
    """Rising prefix lengths, int64 [n_prefixes], or [n_draws, n_prefixes] if n_draws is given.

    The last length is n_latents. The others are drawn without replacement from 1 .. n_latents - 1,
    with the probabilities of `prefix_probabilities`. Raises ValueError where n_prefixes is not
    within 1 .. n_latents.
    """
    if not 1 <= n_prefixes <= n_latents:
        raise ValueError(f"n_prefixes must be within 1 and {n_latents}, got {n_prefixes}")
    rows = 1 if n_draws is None else n_draws
    lengths = torch.full((rows, n_prefixes), n_latents)
    if n_prefixes > 1:
        probabilities = prefix_probabilities(n_latents).expand(rows, -1)
        drawn = torch.multinomial(probabilities, n_prefixes - 1, generator=generator)
        lengths[:, :-1] = 1 + drawn.sort(dim=-1).values
    return lengths[0] if n_draws is None else lengths


def matryoshka_loss(
    x: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    lengths: Sequence[int] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
    sparsity_weight: float | Tensor = 0.0,
    sparsity: Sparsity | Tensor = "l1",
) -> Tensor:
    """The loss at the head of this file, averaged over the batch: [].

    x [batch, d_model] is already scaled; acts [batch, n_latents]. `lengths` rise from 0 (b_dec
    alone) or more; `weights` are theirs, by default equal and of sum 1. `sparsity` is what an
    activation costs: a_j ||d_j|| ("l1"), log((a_j ||d_j|| + 0.1) / 0.1) ("log"), or the cost of
    each, [batch, n_latents].
    """
    lengths = [int(m) for m in lengths]
    weights = [1 / len(lengths)] * len(lengths) if weights is None else list(weights)
    if isinstance(sparsity, Tensor):
        cost = sparsity
    else:
        cost = acts * W_dec.norm(dim=1)  # [batch, n_latents]
        cost = ((cost + 0.1) / 0.1).log() if sparsity == "log" else cost
    loss, x_hat, begin = x.new_zeros(()), b_dec.expand_as(x), 0
    for m, weight in zip(lengths, weights, strict=True):
        x_hat = x_hat + acts[:, begin:m] @ W_dec[begin:m]  # what the first m latents decode to
        error = (x - x_hat).square().sum(dim=1)
        loss = loss + weight * (error + sparsity_weight * cost[:, :m].sum(dim=1)).mean()
        begin = m
    return loss


# ------------------------------------------------------------------------------------------- SAE


class SAE(nn.Module):
    """A sparse autoencoder.

    Parameters: W_enc [d_model, n_latents], b_enc [n_latents], W_dec [n_latents, d_model],
    b_dec [d_model]. The buffer mean_norm [] is the mean norm of the training inputs. x and x_hat
    are in the units of the data; `encode` multiplies x by `scale`, and `decode` divides by it.
    `activation` is a key of ACTIVATIONS. Some activation functions need `k`, or the buffer
    `threshold` [n_latents] in the units of activations; otherwise these are None. `about` says
    what the SAE was trained on and how, in values that JSON can hold.

    Initialised as in the original code: W_enc ~ N(0, 1 / d_model); each row of W_dec is 0.1 times
    the unit vector along its latent's column of W_enc; biases are 0.
    """

    mean_norm: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        seed: int = 0,
        activation: str = "relu",
        k: float | None = None,
    ):
        """`k`: active latents a sample, for topk and batchtopk. Raises ValueError where the
        activation function is unknown, or k is impossible for it."""
        super().__init__()
        W_enc = torch.randn(d_model, n_latents, generator=seeded_generator(seed, STREAM_INIT))
        W_enc /= math.sqrt(d_model)
        tensors = {
            "W_enc": W_enc,
            "b_enc": torch.zeros(n_latents),
            "W_dec": 0.1 * (W_enc / W_enc.norm(dim=0)).T.contiguous(),
            "b_dec": torch.zeros(d_model),
            "mean_norm": torch.tensor(1.0),
        }
        if activation == "jumprelu":
            tensors["threshold"] = torch.full((n_latents,), FIRST_THRESHOLD)
        self._take(tensors, activation, {}, k)

    @property
    def scale(self) -> Tensor:
        """The factor of the inputs, sqrt(d_model) / mean_norm: a tensor []."""
        return math.sqrt(self.d_model) / self.mean_norm

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> acts [..., n_latents], none negative, most of them 0.

        x may be of any floating dtype; acts are of the SAE's. A batchtopk SAE that is not yet
        trained has no threshold, and treats all samples of x as one batch.
        """
        scaled = x.to(self.W_enc.dtype).reshape(-1, self.d_model) * self.scale
        gate = Gate(self.W_dec.norm(dim=1), self.k, self.threshold)
        acts = ACTIVATIONS[self.activation](scaled @ self.W_enc + self.b_enc, gate)
        return acts.reshape(*x.shape[:-1], self.n_latents)

    def decode(self, acts: Tensor, prefix: int | None = None) -> Tensor:
        """acts [..., n_latents] -> x_hat [..., d_model], from the first `prefix` latents or all.

        Raises ValueError where prefix is not within 0 .. n_latents.
        """
        m = self.n_latents if prefix is None else prefix
        if not 0 <= m <= self.n_latents:
            raise ValueError(f"prefix must be within 0 and {self.n_latents}, got {prefix}")
        acts = acts.to(self.W_dec.dtype)
        return (acts[..., :m] @ self.W_dec[:m] + self.b_dec) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> x_hat [..., d_model]."""
        return self.decode(self.encode(x))

    def _take(
        self,
        tensors: Mapping[str, Tensor],
        activation: str,
        about: Mapping[str, Any],
        k: float | None,
    ) -> None:
        """Sets every attribute; the tensors are not copied. Raises as `_check_activation`."""
        _check_activation(activation, k, tensors.get("threshold"), tensors["b_enc"].numel())
        self.activation, self.about, self.k = activation, dict(about), k
        self.W_enc, self.b_enc = nn.Parameter(tensors["W_enc"]), nn.Parameter(tensors["b_enc"])
        self.W_dec, self.b_dec = nn.Parameter(tensors["W_dec"]), nn.Parameter(tensors["b_dec"])
        self.d_model, self.n_latents = self.W_enc.shape
        self.register_buffer("mean_norm", tensors["mean_norm"])
        self.register_buffer("threshold", tensors.get("threshold"))

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        activation: str = "relu",
        about: Mapping[str, Any] | None = None,
        k: float | None = None,
    ) -> "SAE":
        """An SAE of copies of `tensors`: W_enc, b_enc, W_dec, b_dec, mean_norm, maybe threshold.

        Raises ValueError where one is missing, or has an impossible shape or dtype.
        """
        from matryoshka import sae_checks

        sae_checks.check_shapes(tensors)
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)  # not `__init__`: it would draw weights to throw away
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        sae._take(copies, activation, about or {}, k)
        return sae

    def with_tensors(self, **tensors: Tensor) -> "SAE":
        """A copy in which `tensors` replace those of the same names."""
        tensors = {**self.state_dict(), **tensors}
        return SAE.from_tensors(tensors, self.activation, self.about, self.k)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, of the format in docs/files.md.

        Raises OSError where it cannot be written; then nothing is left half written.
        """
        from matryoshka import sae_files  # here, not above: this file needs nothing but torch

        sae_files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SAE":
        """Reads a file that `save` of this or an earlier version wrote, or a folder that SAELens,
        dictionary_learning or sparsify wrote.

        Raises ValueError where it holds no such SAE, OSError where it cannot be read.
        """
        from matryoshka import sae_files

        return sae_files.load(Path(path), torch.device(device))

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        name: str = "sae.safetensors",
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "SAE":
        """Loads an SAE from the repository "OWNER/NAME" of the Hugging Face hub; see
        matryoshka/hub.py. Raises ValueError where it has none, or the hub cannot be reached."""
        from matryoshka import hub

        return hub.from_pretrained(repo, name, revision).to(device)
