"""The prefixes of every step: drawn in blocks of steps, fixed, or the exact mean over the draws.

Lengths with weights enter a kernel as the reach of each place, and as where reaches end.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.kernels.layout import count_ends
from matryoshka.trainer_config import TrainerConfig
from sae import STREAM_PREFIXES, prefix_probabilities, sample_prefixes, seeded_generator

STEPS_A_BLOCK = 256  # prefixes are drawn for this many steps at once


class StepPrefixes(NamedTuple):
    """The prefixes of one step of a stack."""

    reach: Tensor  # [n_saes, n_latents], of places: the latent that comes first, second, ...
    ends: Sequence[Tensor]  # an SAE each: the places at which reaches end, int64 [n_reaches]


def reach(lengths: Tensor, n_latents: int) -> Tensor:
    """The share of `lengths` [..., n_prefixes] that contain the latent in each place.

    -> [..., n_latents], from 1 in the first place down to 1 / n_prefixes in the last.
    """
    places = torch.arange(1, n_latents + 1).expand(*lengths.shape[:-1], -1).contiguous()
    shorter: Tensor = torch.searchsorted(lengths, places) / lengths.shape[-1]
    return 1 - shorter


class PrefixRule(NamedTuple):
    """How the prefixes of one SAE are chosen."""

    n_prefixes: int
    seed: int = 0
    is_expected: bool = False  # the exact mean over what may be drawn
    widths: Sequence[int] = ()  # fixed lengths in place of drawn ones; 0 is the bias alone
    weights: Sequence[float] = ()  # of the widths; empty: all equal

    @classmethod
    def of(cls, config: TrainerConfig, seed: int, n_latents: int) -> "PrefixRule":
        """What the settings ask for. Raises `UserError` where widths are impossible."""
        is_expected, widths = config.prefixes == "expected", config.widths_of(n_latents)
        return cls(config.n_prefixes, seed, is_expected, widths, config.width_weights)

    def fixed_reach(self, n_latents: int) -> Tensor | None:
        """The reach of each place, float64 [n_latents], where it is the same in every step."""
        if self.widths:
            return width_reach(n_latents, self.widths, self.weights)
        return expected_reach(n_latents, self.n_prefixes) if self.is_expected else None


def width_reach(n_latents: int, widths: Sequence[int], weights: Sequence[float] = ()) -> Tensor:
    """The weight of the `widths` that contain the latent in each place: float64 [n_latents].

    Weights are divided by their sum. A width of 0 contains none: the bias alone reconstructs.
    """
    weights = weights or [1.0] * len(widths)
    reached = torch.zeros(n_latents + 1, dtype=torch.float64)
    for width, weight in zip(widths, weights, strict=True):
        reached[:width] += weight / sum(weights)
    return reached[:-1]


class PrefixDraws:
    """Each step's prefixes for a stack of SAEs, on the device that they train on.

    `whole` is one prefix of all latents.
    A function of the seeds and of the step alone, so a resumed run draws what it would have.
    """

    def __init__(
        self, n_latents: int, rules: Sequence[PrefixRule], like: Tensor, ends_on: torch.device
    ):
        """rules: an SAE each. like: of the dtype, and on the device, of what is trained. ends_on:
        where kernels read the ends, the host but for a step that a GPU replays."""
        self.n_latents, self.rules = n_latents, list(rules)
        self._like, self._ends_on = like, ends_on
        self._block, self._steps = -1, list[StepPrefixes]()
        # of each SAE whose prefixes are the same in every step
        self._fixed = [rule.fixed_reach(n_latents) for rule in rules]
        all_latents = torch.tensor([n_latents], device=ends_on)
        self.whole = StepPrefixes(like.new_ones(len(rules), n_latents), [all_latents] * len(rules))
        self._all_fixed = self._draw(0, 1)[0] if None not in self._fixed else None

    def of(self, step: int) -> StepPrefixes:
        """Those of step `step`, which counts from 0."""
        if self._all_fixed is not None:
            return self._all_fixed
        block, row = divmod(step, STEPS_A_BLOCK)
        if block != self._block:
            self._block, self._steps = block, self._draw(block)
        return self._steps[row]

    def lengths(self, rule: PrefixRule, block: int) -> Tensor:
        """An SAE's lengths for a block of steps: [STEPS_A_BLOCK, n_prefixes] on the CPU."""
        generator = seeded_generator(rule.seed, STREAM_PREFIXES, block)
        return sample_prefixes(self.n_latents, rule.n_prefixes, generator, STEPS_A_BLOCK)

    def _draw(self, block: int, n_steps: int = STEPS_A_BLOCK) -> list[StepPrefixes]:
        drawn = [
            self._drawn(rule, block) if fixed is None else self._repeated(fixed, n_steps)
            for rule, fixed in zip(self.rules, self._fixed, strict=True)
        ]
        reaches = torch.stack([reaches for reaches, _ in drawn], dim=1)
        reaches = reaches.to(self._like)  # [n_steps, n_saes, n_latents]
        ends = zip(*(ends for _, ends in drawn), strict=True)
        return [StepPrefixes(*step) for step in zip(reaches, ends, strict=True)]

    def _drawn(self, rule: PrefixRule, block: int) -> tuple[Tensor, Sequence[Tensor]]:
        lengths = self.lengths(rule, block)
        return reach(lengths, self.n_latents), lengths.to(self._ends_on).unbind()

    def _repeated(self, fixed: Tensor, n_steps: int) -> tuple[Tensor, Sequence[Tensor]]:
        ends = count_ends(fixed).to(self._ends_on)
        return fixed.expand(n_steps, -1), [ends] * n_steps


# --------------------------------------------------------------- the exact mean over the prefixes


def expected_reach(n_latents: int, n_prefixes: int) -> Tensor:
    """The mean of `reach` over all that `sample_prefixes` may draw: float64 [n_latents].

    The loss is linear in the reach, latents being in order, so its expectation over prefixes is the
    loss at this reach. With pi_m the probability that length m is among the n_prefixes - 1 drawn
    without replacement, place j is reached by (1 + sum_{m >= j} pi_m) / n_prefixes.

    Drawing without replacement is a race of exponential clocks, length m's of rate p_m, and

        pi_m = integral of p_m exp(-p_m t) P(fewer than n_prefixes - 1 others ring before t) dt,

    by the trapezoidal rule in log t, whose error is below 1e-9. Raises ValueError where n_prefixes
    is not within 1 .. n_latents.
    """
    if not 1 <= n_prefixes <= n_latents:
        raise ValueError(f"n_prefixes must be within 1 and {n_latents}, got {n_prefixes}")
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

    def with_clock(counts: np.ndarray, m: int) -> np.ndarray:
        """P(0, 1, .. n_drawn - 1 have rung) [n_drawn, n_times], with length m's clock added."""
        more: np.ndarray = counts * (1 - rung[m])
        more[1:] += counts[:-1] * rung[m]
        return more

    none_rung = np.zeros((n_drawn, len(t)))
    none_rung[0] = 1
    below = [none_rung]  # counts of the lengths below m
    for m in range(len(p) - 1):
        below.append(with_clock(below[-1], m))
    above, integrals = none_rung, np.empty(len(p))  # counts of the lengths above m
    for m in reversed(range(len(p))):
        fewer = (below[m] * above.cumsum(axis=0)[::-1]).sum(axis=0)
        integrals[m] = (t * p[m] * np.exp(-p[m] * t) * fewer).sum()
        above = with_clock(above, m)
    return integrals
