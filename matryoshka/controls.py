"""What a training step needs beside the gradient: its schedule and phase, the scale of the inputs,
the sparsity weight that steers L0, and the order of the latents.

`InputScale`, `SparsityController` and `LatentOrder` each have a `state`: tensors [n_saes, ...] that
they update in place and that a checkpoint keeps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.trainer_config import TrainerConfig

MIN_MEAN_NORM = 1e-30  # replaces a mean norm of 0, so that inputs of 0 stay 0


class Schedule(NamedTuple):
    """The values of one step that depend on its index alone. They are Python numbers, or tensors []
    where a GPU replays the step."""

    batch_share: float | Tensor  # weight of this batch in the running means of norm and threshold
    lr: float | Tensor
    next_warmup_weight: float | Tensor  # the next step's sparsity weight, if it is in the warm-up

    @classmethod
    def of(cls, config: TrainerConfig, step: int) -> "Schedule":
        """The values of step `step`, which counts from 0."""
        return cls(
            max(1 - config.norm_decay, 1 / (step + 1)),
            config.learning_rate(step),
            config.weight_in_warmup(step + 1),
        )


class Phase(NamedTuple):
    """Which operations a step has. Steps of the same phase differ only in their tensors, so that a
    GPU can record one of them and replay it."""

    is_tied: bool  # one prefix of all latents, and the encoder stays tied; see unhedged.py
    may_restart_last: bool  # the last latent may be moved after the step; see restart.py
    may_resample_dead: bool  # dead latents are moved after the step; see dead_latents.py
    next_is_in_warmup: bool  # the next step's sparsity weight is still the warm-up's

    @classmethod
    def of(cls, config: TrainerConfig, step: int) -> "Phase":
        """The phase of step `step`, which counts from 0."""
        return cls(
            config.is_tied_at(step),
            config.restarts_at(step),
            config.resamples_at(step),
            step + 1 < config.n_warmup_steps,
        )


class InputScale:
    """Scales inputs by sqrt(d_model) / their running mean norm, so that their RMS is near 1.

    The running mean is a plain average over the first steps and exponential after them, so that it
    is right from the first step on. The original starts it at 0 and needs about 200 steps.
    """

    def __init__(self, d_model: int, like: Tensor):
        """The state has the dtype, the device and the first size of `like` [n_saes, ...]."""
        self.d_model = d_model
        self.state = {"mean_norm": like.new_zeros(len(like))}

    def update(self, x: Tensor, share: float | Tensor) -> Tensor:
        """Updates the running mean by the batch x, whose weight in it is `share`: [n_saes]."""
        return self.state["mean_norm"].copy_(self.mean_with(x, share))

    def mean_with(self, x: Tensor, share: float | Tensor) -> Tensor:
        """What `update` would return, without the update: [n_saes]."""
        batch_mean = torch.linalg.vector_norm(x, dim=2).mean(dim=1)  # [n_saes]
        return self.state["mean_norm"].lerp(batch_mean, share)

    def scaled_by(self, mean_norm: Tensor, x: Tensor) -> Tensor:
        """x [n_saes, batch, d_model] times sqrt(d_model) / mean_norm [n_saes]."""
        return x * (math.sqrt(self.d_model) / mean_norm.clamp_min(MIN_MEAN_NORM))[:, None, None]


class SparsityController:
    """Sets the next step's sparsity weight from this step's L0, a mean over the batch.

    "original": a linear warm-up; then each step multiplies the weight by 1 + 3e-4 or 1 - 3e-4. This
    is slow, and in the toy, whose SAEs do not reach their target, the weight falls to 0.

    "steady": the warm-up ends early if L0 falls to the target, so that too high a weight kills no
    latents. Then a PI controller steers the weight's logarithm. With e = L0 / target - 1, clipped
    to +-1/2,

        settled_weight *= exp(clip(0.02 e, +-10 / n_steps))
        weight = settled_weight * exp(e / 2)

    Over 30,000 steps the clip is about the original's 3e-4 a step. Over any number of steps it lets
    the settled weight change by a factor of up to exp(10).
    """

    def __init__(self, config: TrainerConfig, like: Tensor, has_sparsity_loss: bool = True):
        """The state has the dtype, the device and the first size of `like` [n_saes, ...].

        Without a sparsity loss, as where the activation function fixes L0, the weight stays 0.
        """
        self.config, self.has_sparsity_loss = config, has_sparsity_loss
        start = like.new_full(
            (len(like),), config.weight_in_warmup(0) if has_sparsity_loss else 0.0
        )
        self.state = {
            "sparsity_weight": start,
            "settled_weight": start.clone(),
            "warming_up": torch.ones_like(start, dtype=torch.bool),
        }

    @property
    def weight(self) -> Tensor:
        """This step's sparsity weight: [n_saes]."""
        return self.state["sparsity_weight"]

    def update(
        self, l0: Tensor, next_is_in_warmup: bool, next_warmup_weight: float | Tensor
    ) -> None:
        """Sets the next step's weight from this step's l0 [n_saes]."""
        if not self.has_sparsity_loss:
            return
        if self.config.l0_control == "steady":
            self._update_steady(l0, next_is_in_warmup, next_warmup_weight)
        elif next_is_in_warmup:
            self.weight.fill_(next_warmup_weight)
        else:
            self.weight.mul_(1 - 3e-4 + 6e-4 * (l0 >= self.config.target_l0))

    def _update_steady(
        self, l0: Tensor, next_is_in_warmup: bool, next_warmup_weight: float | Tensor
    ) -> None:
        """`update` for "steady": each SAE is in its warm-up, or under the PI controller."""
        config, settled = self.config, self.state["settled_weight"]
        error = (l0 / config.target_l0 - 1).clamp_(-0.5, 0.5)
        warming_up = self.state["warming_up"].logical_and_((error > 0) & next_is_in_warmup)
        rate = (0.02 * error).clamp_(-10 / config.n_steps, 10 / config.n_steps)
        risen = next_warmup_weight if next_is_in_warmup else config.sparsity_weight
        settled.copy_(torch.where(warming_up, risen, settled * rate.exp()))
        self.weight.copy_(torch.where(warming_up, settled, settled * (error / 2).exp()))


class LatentOrder:
    """The place of each latent: latents come in falling order of the running mean square of
    a_j ||d_j||.

    With fixed widths, latent j stays in place j. An unhedged SAE is the exception: its latents find
    their features before there are prefixes, so they are ordered with fixed widths, too.
    """

    def __init__(self, configs: Sequence[TrainerConfig], n_latents: int, like: Tensor):
        """`configs`: one for each SAE. The state has the dtype, the device and the first size of
        `like` [n_saes, ...]."""
        self._is_fixed = [bool(config.widths) and not config.unhedged for config in configs]
        self._fixed_mask = torch.tensor(self._is_fixed, device=like.device)[:, None]  # [n_saes, 1]
        self._places = torch.arange(n_latents, device=like.device).expand(len(like), -1)
        self.state = {"mean_square": like.new_zeros(len(like), n_latents)}

    def update(self, mean_square: Tensor, decay: float) -> None:
        """Updates the running mean by a step's mean square, [n_saes, n_latents]."""
        self.state["mean_square"].lerp_(mean_square, 1 - decay)

    def latents(self) -> Tensor:
        """The index of the latent in each place: int64 [n_saes, n_latents]."""
        if all(self._is_fixed):
            return self._places
        order = self.state["mean_square"].sort(dim=1, descending=True, stable=True).indices
        if any(self._is_fixed):
            order = torch.where(self._fixed_mask, self._places, order)
        return order
