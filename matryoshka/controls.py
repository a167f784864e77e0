"""What accompanies a step of training: its numbers and its phase, the inputs' scale, the sparsity
weight that steers L0, and the order of the latents.

Each of the last three holds tensors [n_saes, ...] that it updates in place and that a checkpoint
keeps: its `state`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.trainer_config import TrainerConfig

MIN_MEAN_NORM = 1e-30  # inputs that are all zero stay zero


class StepNumbers(NamedTuple):
    """The numbers of one step that follow from how many were done before: Python's, or tensors []
    where a GPU replays the step."""

    norm_share: float | Tensor  # of this batch in the running mean norm
    lr: float | Tensor
    next_warmup_weight: float | Tensor  # the next step's sparsity weight, if it is in the warm-up

    @classmethod
    def of(cls, config: TrainerConfig, step: int) -> "StepNumbers":
        """Those of step `step`, which counts from 0."""
        return cls(
            max(1 - config.norm_decay, 1 / (step + 1)),
            config.learning_rate(step),
            config.weight_in_warmup(step + 1),
        )


class Phase(NamedTuple):
    """What one step does and another does not. A GPU records and replays one step of each phase."""

    is_tied: bool  # it trains the whole SAE with its encoder tied; see unhedged.py
    may_restart_last: bool  # the latent that comes last may start anew; see restart.py
    may_resample_dead: bool  # so may all that have been silent for long; see dead_latents.py
    next_is_in_warmup: bool  # the next step's sparsity weight is still the warm-up's

    @classmethod
    def of(cls, config: TrainerConfig, step: int) -> "Phase":
        """That of step `step`, which counts from 0."""
        return cls(
            config.is_tied_at(step),
            config.restarts_at(step),
            config.resamples_at(step),
            step + 1 < config.n_warmup_steps,
        )


class InputScale:
    """Divides inputs by their running mean norm / sqrt(d_model).

    The mean is plain over the first steps and exponential after them, so that it is right from the
    first step on; the original starts it at 0 and needs about 200.
    """

    def __init__(self, d_model: int, like: Tensor):
        """`like` [n_saes, ...]: of the dtype, and on the device, of what is trained."""
        self.d_model = d_model
        self.state = {"mean_norm": like.new_zeros(len(like))}

    def update(self, x: Tensor, share: float | Tensor) -> Tensor:
        """The running mean [n_saes], after the norm of x has entered it by `share`."""
        return self.state["mean_norm"].copy_(self.mean_with(x, share))

    def mean_with(self, x: Tensor, share: float | Tensor) -> Tensor:
        """What `update` would make the running mean [n_saes]."""
        return self.state["mean_norm"].lerp(torch.linalg.vector_norm(x, dim=2).mean(dim=1), share)

    def scaled_by(self, mean_norm: Tensor, x: Tensor) -> Tensor:
        """x [n_saes, batch, d_model], scaled for a mean norm [n_saes]."""
        return x * (math.sqrt(self.d_model) / mean_norm.clamp_min(MIN_MEAN_NORM))[:, None, None]


class SparsityController:
    """Sets the next step's sparsity weight from this step's batch L0.

    "original": a linear warm-up, then up or down by 3e-4 of itself a step. That is slow, and in the
    toy, whose SAEs do not reach their target, it lets the weight go to 0.

    "steady": the warm-up ends early where L0 falls to the target, so that too high a weight kills
    nothing; then a PI controller on the weight's logarithm. With e = L0 / target - 1,

        settled_weight *= exp(clip(0.02 e, +-10 / n_steps)),  weight = settled_weight exp(e / 2)

    e clipped to +-1/2. The clip is the original's 3e-4 a step where there are 30,000 steps, and
    moves the weight by up to e^10 however many there are.
    """

    def __init__(self, config: TrainerConfig, like: Tensor, is_priced: bool = True):
        """`like` [n_saes, ...]: of the dtype, and on the device, of what is trained. is_priced:
        False where L0 is given, and the weight is 0."""
        self.config, self.is_priced = config, is_priced
        start = like.new_full((len(like),), config.weight_in_warmup(0) if is_priced else 0.0)
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
        """Sets the next step's weight from this one's l0 [n_saes]."""
        config, weight = self.config, self.weight
        if not self.is_priced:
            return
        if config.l0_control == "original":
            if next_is_in_warmup:
                weight.fill_(next_warmup_weight)
            else:
                weight.mul_(1 - 3e-4 + 6e-4 * (l0 >= config.target_l0))
            return
        settled = self.state["settled_weight"]
        error = (l0 / config.target_l0 - 1).clamp_(-0.5, 0.5)
        warming_up = self.state["warming_up"].logical_and_((error > 0) & next_is_in_warmup)
        rate = (0.02 * error).clamp_(-10 / config.n_steps, 10 / config.n_steps)
        risen = next_warmup_weight if next_is_in_warmup else config.sparsity_weight
        settled.copy_(torch.where(warming_up, risen, settled * rate.exp()))
        weight.copy_(torch.where(warming_up, settled, settled * (error / 2).exp()))


class LatentOrder:
    """Which latent is in which place: the larger its running mean square of a_j ||d_j||, the
    earlier.

    Where an SAE's widths are fixed, its latents keep the places that they began in. An unhedged SAE
    finds its features before there are prefixes, so that its latents are ordered even then.
    """

    def __init__(self, configs: Sequence[TrainerConfig], n_latents: int, like: Tensor):
        """configs: an SAE each. `like` [n_saes, ...]: of the dtype, and on the device, of what is
        trained."""
        self._keeps_places = [bool(config.widths) and not config.unhedged for config in configs]
        self._is_kept = torch.tensor(self._keeps_places, device=like.device)[:, None]
        self._places = torch.arange(n_latents, device=like.device).expand(len(like), -1)
        self.state = {"mean_square": like.new_zeros(len(like), n_latents)}

    def update(self, mean_square: Tensor, decay: float) -> None:
        """mean_square: this step's, [n_saes, n_latents]."""
        self.state["mean_square"].lerp_(mean_square, 1 - decay)

    def latents(self) -> Tensor:
        """The latent in each place: [n_saes, n_latents]."""
        if all(self._keeps_places):
            return self._places
        order = self.state["mean_square"].sort(dim=1, descending=True, stable=True).indices
        if any(self._keeps_places):
            order = torch.where(self._is_kept, self._places, order)
        return order
