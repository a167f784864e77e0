"""The Matryoshka sparse autoencoder: the SAE, the prefix losses, the trainer.

    acts  = ReLU(x W_enc + b_enc)                             x in units of its mean norm / sqrt(d)
    x_hat = acts W_dec + b_dec

A Matryoshka SAE is trained so that the first m latents alone reconstruct x, for prefix lengths m
drawn afresh each step. With P_m = b_dec + sum_{j <= m} a_j d_j (d_j a row of W_dec):

    loss = mean over prefixes m of   ||x - P_m||^2  +  sparsity_weight * sum_{j <= m} a_j ||d_j||

A latent enters this only through its *reach* s_j, the share of the step's prefixes that contain it.
Whichever of two latents is reached less decides whether they meet, so (x now less b_dec)

    loss = ||x||^2 - 2 sum_j s_j a_j <d_j, x> + sum_ij min(s_i, s_j) a_i a_j <d_i, d_j>
           + sparsity_weight * sum_j s_j a_j ||d_j||

and no prefix is ever formed. A vanilla SAE has one prefix: every reach is 1.

Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning Multi-Level Features with Matryoshka Sparse
Autoencoders" (arXiv 2503.17547).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

import gradients
from cuda_graph import CudaGraph
from gradients import Params, Products, Sparsity, Workspace, write_gradient


def seeded_generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that is a function of `seed` and `stream` alone, whatever their size.

    Streams are as independent as PyTorch allows: it takes 32 bits of a seed, so two of them share
    their numbers with a probability of 2^-32.
    """
    name = " ".join(str(int(part)) for part in (seed, *stream))
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# One stream of random numbers a purpose, so that no two purposes of a seed share numbers.
STREAM_INIT, STREAM_PREFIXES = 0, 1


class SAE(nn.Module):
    """A sparse autoencoder, or a stack of independent ones: every tensor may lead with [n_saes].

    Parameters: W_enc [d_model, n_latents], b_enc [n_latents], W_dec [n_latents, d_model],
    b_dec [d_model]. The buffer mean_norm [] is the mean norm of the inputs trained on: inside, an
    input is divided by mean_norm / sqrt(d_model). x and x_hat are in the units of the data.

    Initialised as the original: W_enc ~ N(0, 1 / d_model), each row of W_dec 0.1 times the unit
    vector along its latent's column of W_enc, biases 0.
    """

    mean_norm: Tensor

    def __init__(self, d_model: int, n_latents: int, seed: int = 0):
        super().__init__()
        generator = seeded_generator(seed, STREAM_INIT)
        W_enc = torch.randn(d_model, n_latents, generator=generator) / math.sqrt(d_model)
        W_dec = 0.1 * (W_enc / W_enc.norm(dim=0)).T
        self._set(W_enc, torch.zeros(n_latents), W_dec, torch.zeros(d_model), torch.tensor(1.0))

    def _set(
        self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, mean_norm: Tensor
    ) -> None:
        self.W_enc = nn.Parameter(W_enc.contiguous())
        self.b_enc = nn.Parameter(b_enc.contiguous())
        self.W_dec = nn.Parameter(W_dec.contiguous())
        self.b_dec = nn.Parameter(b_dec.contiguous())
        self.register_buffer("mean_norm", mean_norm.contiguous())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SAE":
        """An SAE of copies of `tensors`: W_enc, b_enc, W_dec, b_dec, mean_norm."""
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae._set(**{name: tensor.detach().clone() for name, tensor in tensors.items()})
        return sae

    @classmethod
    def stack(cls, saes: Sequence["SAE"]) -> "SAE":
        """Several SAEs of one shape as one whose tensors lead with [n_saes]."""
        states = [sae.state_dict() for sae in saes]
        return cls.from_tensors(
            {name: torch.stack([s[name] for s in states]) for name in states[0]}
        )

    def unstack(self) -> list["SAE"]:
        """The SAEs of a stack, one by one."""
        state = self.state_dict()
        return [
            SAE.from_tensors({name: tensor[i] for name, tensor in state.items()})
            for i in range(len(self.W_enc))
        ]

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[-2]

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[-1]

    @property
    def scale(self) -> Tensor:
        """What an input is multiplied by: sqrt(d_model) / mean_norm. [1, 1], or [n_saes, 1, 1]."""
        return (math.sqrt(self.d_model) / self.mean_norm)[..., None, None]

    def encode(self, x: Tensor) -> Tensor:
        """x [batch, d_model] -> acts [batch, n_latents], not negative, mostly zero."""
        return torch.relu((x * self.scale) @ self.W_enc + self.b_enc[..., None, :])

    def decode(self, acts: Tensor, prefix: int | None = None) -> Tensor:
        """acts [batch, n_latents] -> x_hat [batch, d_model], from the first `prefix` latents."""
        x_hat = acts[..., :prefix] @ self.W_dec[..., :prefix, :] + self.b_dec[..., None, :]
        return x_hat / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, d_model] -> x_hat [batch, d_model]."""
        return self.decode(self.encode(x))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with d_model and n_latents in its metadata."""
        config = {"d_model": self.d_model, "n_latents": self.n_latents}
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()},
            path,
            metadata={"sae": json.dumps(config)},  # one key: their order in the file is not fixed
        )

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SAE":
        """The SAE in a file written by `save`.

        Raises ValueError where the file is no such SAE, OSError where it cannot be read.
        """
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        expected = {"W_enc", "b_enc", "W_dec", "b_dec", "mean_norm"}
        if set(tensors) != expected:
            raise ValueError(f"{path} is not an SAE: it holds {sorted(tensors)}, not {expected}")
        return cls.from_tensors(tensors)


# ------------------------------------------------------------------------------------- prefixes


def prefix_probabilities(n_latents: int) -> Tensor:
    """P(l) for l = 1 .. n_latents - 1, proportional to sqrt(l) - sqrt(l - 1). float64.

    A Pareto law of power 0.5 and minimum length 1, as in the original: short prefixes are favoured.
    """
    roots = torch.arange(n_latents, dtype=torch.float64).sqrt()
    return roots.diff() / roots[-1]


def sample_prefixes(
    n_latents: int, n_prefixes: int, generator: torch.Generator, n_draws: int | None = None
) -> Tensor:
    """Sorted prefix lengths [n_prefixes], or [n_draws, n_prefixes]: the last is n_latents.

    The others are drawn without replacement from 1 .. n_latents - 1 by `prefix_probabilities`.
    Raises ValueError where n_prefixes is not within 1 .. n_latents.
    """
    if not 1 <= n_prefixes <= n_latents:
        raise ValueError(f"n_prefixes is {n_prefixes}: it must be within 1 and {n_latents}")
    rows = 1 if n_draws is None else n_draws
    prefixes = torch.full((rows, n_prefixes), n_latents)
    if n_prefixes > 1:
        weights = prefix_probabilities(n_latents).expand(rows, -1)
        drawn = torch.multinomial(weights, n_prefixes - 1, generator=generator)
        prefixes[:, :-1] = 1 + drawn.sort(dim=-1).values
    return prefixes[0] if n_draws is None else prefixes


def reach(prefixes: Tensor, n_latents: int) -> Tensor:
    """The share of `prefixes` [..., n_prefixes] that contain the latent in each place.

    -> [..., n_latents], from 1 in the first place down to 1 / n_prefixes in the last.
    """
    places = torch.arange(1, n_latents + 1).expand(*prefixes.shape[:-1], -1).contiguous()
    return 1 - torch.searchsorted(prefixes, places) / prefixes.shape[-1]


def expected_reach(n_latents: int, n_prefixes: int) -> Tensor:
    """The mean of `reach` over all that `sample_prefixes` may draw: float64 [n_latents].

    The loss is linear in the reach, latents being in order, so its expectation over prefixes is the
    loss at this reach. With pi_m the probability that length m is among the n_prefixes - 1 drawn
    without replacement, place j is reached by (1 + sum_{m >= j} pi_m) / n_prefixes.

    Drawing without replacement is a race of exponential clocks, length m's of rate p_m, and

        pi_m = integral of p_m exp(-p_m t) P(fewer than n_prefixes - 1 others ring before t) dt,

    by the trapezoidal rule in log t, whose error is below 1e-9.
    """
    n_drawn = n_prefixes - 1
    if n_drawn == 0:
        return torch.ones(n_latents, dtype=torch.float64)
    p = prefix_probabilities(n_latents).numpy()
    included = np.ones(n_latents - 1)
    if n_drawn < n_latents - 1:
        width = min(0.2, 0.6 / math.sqrt(n_prefixes))
        log_t = np.arange(-40.0, math.log(45 / p.min()), width)
        parts = [_inclusion(p, n_drawn, np.exp(part)) for part in np.array_split(log_t, 16)]
        included = np.sum(parts, axis=0) * width
    reached = 1 + np.append(np.cumsum(included[::-1])[::-1], 0)
    return torch.from_numpy(reached / n_prefixes)


def _inclusion(p: np.ndarray, n_drawn: int, t: np.ndarray) -> np.ndarray:
    """The integrand of `expected_reach` in log t, summed over the times t: [n_lengths]."""
    rung = -np.expm1(-p[:, None] * t)  # [n_lengths, n_times]: P(rung by t)

    def ring(counts: np.ndarray, m: int) -> np.ndarray:
        """P(0, 1, .. n_drawn - 1 have rung) [n_drawn, n_times], with length m's clock added."""
        more = counts * (1 - rung[m])
        more[1:] += counts[:-1] * rung[m]
        return more

    nobody = np.zeros((n_drawn, len(t)))
    nobody[0] = 1
    before = [nobody]  # of the lengths below m
    for m in range(len(p) - 1):
        before.append(ring(before[-1], m))
    after, integrals = nobody, np.empty(len(p))  # of the lengths above m
    for m in reversed(range(len(p))):
        fewer = (before[m] * after.cumsum(axis=0)[::-1]).sum(axis=0)
        integrals[m] = (t * p[m] * np.exp(-p[m] * t) * fewer).sum()
        after = ring(after, m)
    return integrals


# --------------------------------------------------------------------------------------- trainer


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How an SAE is trained. The defaults are the original's for the toy."""

    n_steps: int
    target_l0: float
    lr: float = 3e-2
    prefixes: Literal["sampled", "expected"] = "sampled"  # or the exact mean over what is sampled
    sparsity: Sparsity = "l1"
    sparsity_weight: float = 0.2  # where the adaptive weight starts
    sparsity_warmup: float = 0.2  # share of the steps over which it rises from 0 to there
    l0_control: Literal["original", "steady"] = "original"  # how it moves; see `Trainer._control`
    lr_warmup_steps: int = 100
    lr_decay: float = 0.2  # share of the steps
    lr_end: float = 0.1  # the last learning rate, as a share of lr
    betas: tuple[float, float] = (0.5, 0.9375)
    restart_every: int = 0  # steps between chances to restart the last latent; 0: never
    restart_window: tuple[float, float] = (0.2, 0.8)  # share of the steps with such chances
    max_grad_norm: float = 1.0
    norm_decay: float = 0.99  # of the running mean of the inputs' norm
    order_decay: float = 0.95  # of the running mean square that orders the latents
    products: Products = "float32"  # operands of a step's matrix products; see gradients.py
    dense: bool = False  # as on a GPU, whatever the activations; a CPU is slower for it

    @property
    def n_warmup_steps(self) -> int:
        """Steps over which the sparsity weight rises."""
        return max(1, int(self.sparsity_warmup * self.n_steps))

    def weight_in_warmup(self, step: int) -> float:
        """The sparsity weight of step `step` of the warm-up, which counts from 0."""
        return self.sparsity_weight * min(1.0, (step + 1) / self.n_warmup_steps)

    def restarts_at(self, step: int) -> bool:
        """Whether step `step` is followed by a chance to restart; see `Trainer._restart_last`."""
        begin, end = (share * self.n_steps for share in self.restart_window)
        return self.restart_every > 0 and begin <= step <= end and step % self.restart_every == 0

    def learning_rate(self, step: int) -> float:
        """Warm-up, stable, decay: the learning rate of step `step`, which counts from 0."""
        warmup = min(self.lr_warmup_steps, self.n_steps // 20)
        decay_steps = self.lr_decay * self.n_steps
        into_decay = max(0.0, step - (self.n_steps - decay_steps)) / max(decay_steps, 1e-9)
        return self.lr * min(1.0, step / max(warmup, 1)) * (1 - (1 - self.lr_end) * into_decay)


class Schedule(NamedTuple):
    """The numbers of a step that follow from how many were done: Python's, or 0-dim tensors."""

    norm_share: float | Tensor  # of this batch in the running mean norm
    lr: float | Tensor
    next_weight: float | Tensor  # sparsity weight of the next step, if that is in the warm-up


class Trainer:
    """Trains a stack of independent SAEs, stepped together.

    Each has its own seed, prefixes, sparsity weight, latent order and gradient clipping, and ends
    where it would have ended alone, to float tolerance. `n_prefixes` is one number an SAE.

    Latents are never moved. Their order, by the running mean square of a_j ||d_j||, decides the
    reach of each, and that is all it does; so Adam's moments and the running means stay with their
    latents. `sae` hands out a copy whose latents are in order.
    """

    BLOCK = 256  # prefixes are drawn for this many steps at once

    def __init__(
        self,
        saes: SAE,
        config: TrainerConfig,
        seeds: Sequence[int],
        n_prefixes: Sequence[int],
    ):
        """`saes`: a stack as long as `seeds` and `n_prefixes`. Raises ValueError where it is not,
        where n_prefixes is not within 1 .. n_latents, or where d_model is not a multiple of 8 for
        products in bfloat16."""
        if not len(saes.W_enc) == len(seeds) == len(n_prefixes) or saes.W_enc.dim() != 3:
            raise ValueError(
                f"a stack of {tuple(saes.W_enc.shape)} for {len(seeds)} seeds and "
                f"{len(n_prefixes)} numbers of prefixes: the three must be as many"
            )
        self._require_eights("d_model", saes.d_model, config)
        self.config, self.seeds, self.n_prefixes = config, list(seeds), list(n_prefixes)
        self.d_model, self.n_latents = saes.d_model, saes.n_latents
        n_saes, device = len(seeds), saes.W_enc.device

        parts = (saes.W_enc.mT, saes.b_enc, saes.W_dec, saes.b_dec)
        flat = torch.cat([part.detach().flatten(1) for part in parts], dim=1)
        self._state = {
            "params": flat,
            "adam_mean": torch.zeros_like(flat),
            "adam_square": torch.zeros_like(flat),
            "adam_step": torch.zeros((), device=device),
            "mean_norm": torch.zeros(n_saes, device=device),
            "mean_square": torch.zeros(n_saes, self.n_latents, device=device),
            "sparsity_weight": torch.full((n_saes,), config.weight_in_warmup(0), device=device),
            "settled_weight": torch.full((n_saes,), config.weight_in_warmup(0), device=device),
            "warming_up": torch.ones(n_saes, dtype=torch.bool, device=device),
        }
        self.n_steps_done = 0
        self._grads = torch.zeros_like(flat)
        self._params_by_name = Params.of(flat, self.d_model, self.n_latents)
        self._grads_by_name = Params.of(self._grads, self.d_model, self.n_latents)
        self._workspace = Workspace()
        self._block = -1  # of steps, whose prefixes are drawn
        self._graphs: dict[tuple[object, ...], CudaGraph] = {}
        if config.prefixes == "expected":
            reaches = [expected_reach(self.n_latents, k) for k in self.n_prefixes]
            ends_on = device if self._is_replayed else torch.device("cpu")
            self._expected_ends = [gradients.count_ends(one).to(ends_on) for one in reaches]
            self._expected_reach = torch.stack(reaches).to(device, flat.dtype)

    @torch.inference_mode()
    def step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of Adam on x, [batch, d_model] for all SAEs or [n_saes, batch, d_model].

        Returns tensors on x's device, before the step: l0 [n_saes], sparsity_weight [n_saes],
        grad_norm [n_saes] (before clipping), mean_square [n_saes, n_latents] of a_j ||d_j||.
        Raises ValueError where batch is not a multiple of 8 for products in bfloat16.
        """
        config, t = self.config, self.n_steps_done
        self._require_eights("the batch", x.shape[-2], config)
        phase = (t + 1 < config.n_warmup_steps, config.restarts_at(t))
        block, row = divmod(t, self.BLOCK)
        if self._block != block:
            self._draw(block)
        reach, ends = self._reaches[row], self._ends[row]
        if self._is_replayed:
            metrics = self._replay([x, reach, self._schedules[row], *ends], *phase)
        else:
            metrics = self._step(x, reach, ends, self._schedule(t), *phase)
        self.n_steps_done += 1
        return metrics

    @staticmethod
    def _require_eights(what: str, size: int, config: TrainerConfig) -> None:
        if config.products == "bfloat16" and size % 8:
            raise ValueError(f"products in bfloat16: {what} is {size}, not a multiple of 8")

    @property
    def _is_replayed(self) -> bool:
        """Whether a step can be one CUDA graph: in bfloat16, on compute capability 9 or 10.

        Those are H100, H200 and B200. Elsewhere PyTorch's grouped product reads where its blocks
        end back to the host.
        """
        if not self._grads.is_cuda or self.config.products == "float32" or torch.version.hip:
            return False
        return torch.cuda.get_device_capability(self._grads.device)[0] in (9, 10)

    def _replay(
        self, inputs: Sequence[Tensor], in_warmup: bool, restarts: bool
    ) -> dict[str, Tensor]:
        """`_step`, of which there is one graph for each shape of x and phase of training."""

        def step(x: Tensor, reach: Tensor, schedule: Tensor, *ends: Tensor) -> dict[str, Tensor]:
            return self._step(x, reach, ends, Schedule(*schedule.unbind()), in_warmup, restarts)

        key = (inputs[0].shape, in_warmup, restarts)
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(inputs)
        return self._graphs[key](step, inputs)

    def _step(
        self,
        x: Tensor,
        reach: Tensor,
        ends: Sequence[Tensor],
        schedule: Schedule,
        in_warmup: bool,
        restarts: bool,
    ) -> dict[str, Tensor]:
        """A step but for its count. reach [n_saes, n_latents] belongs to places; the prefixes'
        ends, as `write_gradient` has them."""
        config, state = self.config, self._state
        x = self._scaled(x.expand(len(self.seeds), -1, -1), schedule.norm_share)
        reach = self._to_latents(reach)

        stats = write_gradient(
            self._grads_by_name,
            self._params_by_name,
            x,
            reach,
            state["sparsity_weight"][:, None] * reach,
            config.sparsity,
            ends,
            "dense" if config.dense else None,
            self._workspace,
            config.products,
        )
        grad_norm = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)
        self._grads.mul_((config.max_grad_norm / (grad_norm + 1e-6)).clamp_(max=1))
        self._adam(schedule.lr)

        state["mean_square"].lerp_(stats.mean_square, 1 - config.order_decay)
        if restarts:
            self._restart_last(x)
        weight = state["sparsity_weight"].clone()
        self._control(stats.l0, in_warmup, schedule.next_weight)
        return {
            "l0": stats.l0,
            "sparsity_weight": weight,
            "grad_norm": grad_norm[:, 0],
            "mean_square": stats.mean_square,
        }

    def _restart_last(self, x: Tensor) -> None:
        """Moves each SAE's last latent to where the residual is worth more than the latent is.

        A latent that fires on none of a feature's samples gets no gradient from them, so a feature
        that no latent has found stays lost, while the last latent may serve something smaller: in
        the toy, the error that hedging makes where a parent is active without a child. A latent is
        worth its running mean square of a_j ||d_j||. The residual r is worth, along the direction u
        of its largest sample in the batch, mean relu(<u, r>)^2; where that is more, the latent
        starts anew with encoder and decoder u, bias 0, and nothing in Adam's moments.
        """
        params, state = self._params_by_name, self._state
        acts = torch.baddbmm(params.b_enc, x, params.W_enc.mT).relu_()
        residual = x - params.b_dec - torch.bmm(acts, params.W_dec)  # [n_saes, batch, d_model]
        size, worst = residual.norm(dim=2).max(dim=1)  # [n_saes]
        u = residual.take_along_dim(worst[:, None, None], dim=1) / size[:, None, None]
        worth = torch.bmm(residual, u.mT).relu_().square().mean(dim=1)  # [n_saes, 1]

        last = self.order()[:, -1:]  # [n_saes, 1]
        moves = worth > state["mean_square"].gather(1, last)
        rows = last[..., None].expand_as(u)  # [n_saes, 1, d_model]
        for name, row in (("params", u), ("adam_mean", 0 * u), ("adam_square", 0 * u)):
            part = Params.of(state[name], self.d_model, self.n_latents)
            for tensor in (part.W_enc, part.W_dec):
                tensor.scatter_(1, rows, torch.where(moves[..., None], row, tensor.gather(1, rows)))
            bias = part.b_enc[:, 0]
            bias.scatter_(1, last, bias.gather(1, last) * ~moves)
        worth = torch.where(moves, worth, state["mean_square"].gather(1, last))
        state["mean_square"].scatter_(1, last, worth)

    def _control(self, l0: Tensor, in_warmup: bool, next_weight: float | Tensor) -> None:
        """Sets the next step's sparsity weight from this step's batch L0: [n_saes].

        "original": a linear warm-up, then up or down by 3e-4 of itself a step. That is slow, and
        in the toy, whose SAEs do not reach their target, it lets the weight go to 0.

        "steady": the warm-up ends early where L0 falls to the target, so that too high a weight
        kills nothing; then a PI controller on the weight's logarithm. With e = L0 / target - 1,

            settled_weight *= exp(clip(0.02 e, +-10 / n_steps)),  weight = settled_weight exp(e / 2)

        e clipped to +-1/2. The clip is the original's 3e-4 a step where there are 30,000 steps, and
        moves the weight by up to e^8 after the warm-up however many there are.
        """
        config, state = self.config, self._state
        weight, settled = state["sparsity_weight"], state["settled_weight"]
        if config.l0_control == "original":
            if in_warmup:
                weight.fill_(next_weight)
            else:
                weight.mul_(1 - 3e-4 + 6e-4 * (l0 >= config.target_l0))
            return
        error = (l0 / config.target_l0 - 1).clamp_(-0.5, 0.5)
        warming_up = state["warming_up"].logical_and_((error > 0) & in_warmup)
        rate = (0.02 * error).clamp_(-10 / config.n_steps, 10 / config.n_steps)
        risen = next_weight if in_warmup else config.sparsity_weight
        settled.copy_(torch.where(warming_up, risen, settled * rate.exp()))
        weight.copy_(torch.where(warming_up, settled, settled * (error / 2).exp()))

    def _scaled(self, x: Tensor, share: float | Tensor) -> Tensor:
        """x in units of its running mean norm / sqrt(d_model), after updating that mean.

        The mean is plain over the first steps and exponential after them, so that it is right from
        the first step on; the original starts it at 0 and needs about 200.
        """
        mean_norm = self._state["mean_norm"]
        mean_norm.lerp_(torch.linalg.vector_norm(x, dim=2).mean(dim=1), share)
        return x * (math.sqrt(self.d_model) / mean_norm)[:, None, None]

    def _schedule(self, step: int) -> Schedule:
        """The numbers of step `step`, which counts from 0."""
        config = self.config
        return Schedule(
            max(1 - config.norm_decay, 1 / (step + 1)),
            config.learning_rate(step),
            config.weight_in_warmup(step + 1),
        )

    def _draw(self, block: int) -> None:
        """What a block of steps needs that follows from their numbers alone, where they read it."""
        self._block, device = block, self._grads.device
        if self.config.prefixes == "expected":
            ends = [ends.expand(self.BLOCK, -1) for ends in self._expected_ends]
            self._reaches = self._expected_reach.expand(self.BLOCK, -1, -1)
        else:
            ends = self._draw_prefixes(block)  # a prefix's length is where its latents end
            reaches = torch.stack([reach(one, self.n_latents) for one in ends], dim=1)
            self._reaches = reaches.to(device)  # [BLOCK, n_saes, n_latents]
        if self._is_replayed:
            steps = range(block * self.BLOCK, (block + 1) * self.BLOCK)
            self._schedules = torch.tensor([self._schedule(t) for t in steps]).to(device)
            ends = [one.to(device) for one in ends]
        # a step's, one an SAE: [n_reaches] each
        self._ends = list(zip(*(one.unbind() for one in ends), strict=True))

    def _to_latents(self, by_place: Tensor) -> Tensor:
        """What belongs to places [n_saes, n_latents], handed to the latents in them."""
        return torch.empty_like(by_place).scatter_(1, self.order(), by_place)

    def order(self) -> Tensor:
        """Which latent is in each place: [n_saes, n_latents], largest running mean square first."""
        return self._state["mean_square"].sort(dim=1, descending=True, stable=True).indices

    def _draw_prefixes(self, block: int) -> list[Tensor]:
        """Each SAE's prefixes for a block of steps: [BLOCK, n_prefixes] on the CPU.

        A function of the seeds and of `block` alone, so a resumed run draws what it would have.
        """
        return [
            sample_prefixes(
                self.n_latents,
                n_prefixes,
                seeded_generator(seed, STREAM_PREFIXES, block),
                self.BLOCK,
            )
            for seed, n_prefixes in zip(self.seeds, self.n_prefixes, strict=True)
        ]

    def _adam(self, lr: float | Tensor) -> None:
        state, (beta1, beta2) = self._state, self.config.betas
        adam(
            [state["params"]],
            [self._grads],
            [state["adam_mean"]],
            [state["adam_square"]],
            [],
            [state["adam_step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    @property
    def sae(self) -> SAE:
        """A copy of the stack as it stands, its latents in order: largest mean square first."""
        state = self._state
        W_enc, b_enc, W_dec, b_dec = self._params_by_name
        order = self.order()
        return SAE.from_tensors(
            {
                "W_enc": W_enc.take_along_dim(order[:, :, None], dim=1).mT,
                "b_enc": b_enc[:, 0].take_along_dim(order, dim=1),
                "W_dec": W_dec.take_along_dim(order[:, :, None], dim=1),
                "b_dec": b_dec[:, 0],
                "mean_norm": state["mean_norm"],
            }
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs, copied: tensors only, so it saves as safetensors."""
        state = {name: tensor.clone() for name, tensor in self._state.items()}
        return state | {"n_steps_done": torch.tensor(self.n_steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where `state` is not of a trainer of this shape."""
        for name, tensor in self._state.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"trainer state {name}: {tuple(tensor.shape)} wanted, {found} found"
                )
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self.n_steps_done = int(state["n_steps_done"])
