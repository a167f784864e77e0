"""The prefixes of every step: drawn at random, fixed, or the exact mean over all random draws.

A kernel takes the lengths and weights of the prefixes as the reach of each place, which is the
total weight of the prefixes that contain it, and as the places at which the reach drops.
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

STEPS_A_BLOCK = 256  # how many steps' prefixes are drawn at once


class StepPrefixes(NamedTuple):
    """The prefixes of one step, for a stack of SAEs."""

    reach: Tensor  # [n_saes, n_latents]: the reach of each place in the order of latents
    ends: Sequence[Tensor]  # for each SAE, int64 [n_reaches]: the prefix lengths, rising


def reach(lengths: Tensor, n_latents: int) -> Tensor:
    """The share of `lengths` [..., n_prefixes] that contain the latent in each place.

    -> [..., n_latents], from 1 in the first place down to 1 / n_prefixes in the last.
    """
    places = torch.arange(1, n_latents + 1).expand(*lengths.shape[:-1], -1).contiguous()
    # searchsorted counts the lengths shorter than the place, which do not contain it
    too_short: Tensor = torch.searchsorted(lengths, places) / lengths.shape[-1]
    return 1 - too_short


class PrefixRule(NamedTuple):
    """How the prefixes of one SAE are chosen."""

    n_prefixes: int
    seed: int = 0
    is_expected: bool = False  # whether to take the exact mean over all random draws
    widths: Sequence[int] = ()  # fixed lengths instead of random ones; 0 is the bias alone
    weights: Sequence[float] = ()  # the widths' weights; empty if all are equal

    @classmethod
    def of(cls, config: TrainerConfig, seed: int, n_latents: int) -> "PrefixRule":
        """The rule that the settings describe. Raises `UserError` where widths are impossible."""
        is_expected, widths = config.prefixes == "expected", config.widths_of(n_latents)
        return cls(config.n_prefixes, seed, is_expected, widths, config.width_weights)

    def fixed_reach(self, n_latents: int) -> Tensor | None:
        """The reach of each place, float64 [n_latents], or None if each step draws its own."""
        if self.widths:
            return width_reach(n_latents, self.widths, self.weights)
        return expected_reach(n_latents, self.n_prefixes) if self.is_expected else None


def width_reach(n_latents: int, widths: Sequence[int], weights: Sequence[float] = ()) -> Tensor:
    """The weight of the `widths` that contain the latent in each place: float64 [n_latents].

    Weights are divided by their sum. A width of 0 is the bias alone, and contains no latent.
    """
    weights = weights or [1.0] * len(widths)
    reached = torch.zeros(n_latents + 1, dtype=torch.float64)
    for width, weight in zip(widths, weights, strict=True):
        reached[:width] += weight / sum(weights)
    return reached[:-1]


class PrefixDraws:
    """The prefixes of each step for a stack of SAEs, on the device that they train on.

    They depend on the seeds and the step alone, so that a resumed run draws the same.
    `all_latents` is the single prefix of all latents, for each SAE.
    """

    def __init__(
        self, n_latents: int, rules: Sequence[PrefixRule], like: Tensor, ends_on: torch.device
    ):
        """`rules`: one for each SAE. `like`: a tensor of the dtype, and on the device, of the
        parameters. `ends_on`: where `ends` are, the GPU if it replays steps, else the host."""
        self.n_latents, self.rules = n_latents, list(rules)
        self._like, self._ends_on = like, ends_on
        self._block, self._steps = -1, list[StepPrefixes]()  # the block that was drawn last
        # [n_latents] for each SAE; None if its prefixes are random
        self._fixed = [rule.fixed_reach(n_latents) for rule in rules]
        ends = [torch.tensor([n_latents], device=ends_on)] * len(rules)
        self.all_latents = StepPrefixes(like.new_ones(len(rules), n_latents), ends)
        self._all_fixed = self._draw(0, 1)[0] if None not in self._fixed else None

    def of(self, step: int) -> StepPrefixes:
        """The prefixes of step `step`, which counts from 0."""
        if self._all_fixed is not None:
            return self._all_fixed
        block, row = divmod(step, STEPS_A_BLOCK)
        if block != self._block:
            self._block, self._steps = block, self._draw(block)
        return self._steps[row]

    def lengths(self, rule: PrefixRule, block: int) -> Tensor:
        """One SAE's random lengths for a block of steps: [STEPS_A_BLOCK, n_prefixes] on the CPU."""
        generator = seeded_generator(rule.seed, STREAM_PREFIXES, block)
        return sample_prefixes(self.n_latents, rule.n_prefixes, generator, STEPS_A_BLOCK)

    def _draw(self, block: int, n_steps: int = STEPS_A_BLOCK) -> list[StepPrefixes]:
        """The prefixes of each step of a block."""
        of_saes = [
            self._random(rule, block) if fixed is None else self._repeated(fixed, n_steps)
            for rule, fixed in zip(self.rules, self._fixed, strict=True)
        ]
        reaches = torch.stack([reaches for reaches, _ in of_saes], dim=1)
        reaches = reaches.to(self._like)  # [n_steps, n_saes, n_latents]
        ends = zip(*(ends for _, ends in of_saes), strict=True)  # for each step, every SAE's ends
        return [StepPrefixes(*of_step) for of_step in zip(reaches, ends, strict=True)]

    def _random(self, rule: PrefixRule, block: int) -> tuple[Tensor, Sequence[Tensor]]:
        """One SAE's reaches [STEPS_A_BLOCK, n_latents], and its ends for each step."""
        lengths = self.lengths(rule, block)
        return reach(lengths, self.n_latents), lengths.to(self._ends_on).unbind()

    def _repeated(self, fixed: Tensor, n_steps: int) -> tuple[Tensor, Sequence[Tensor]]:
        """The same, [n_steps, n_latents], if the reach is `fixed` [n_latents]."""
        ends = count_ends(fixed).to(self._ends_on)
        return fixed.expand(n_steps, -1), [ends] * n_steps


# --------------------------------------------------------------- the exact mean over the prefixes


def expected_reach(n_latents: int, n_prefixes: int) -> Tensor:
    """The mean of `reach` over everything that `sample_prefixes` may draw: float64 [n_latents].

    Given the order of the latents, the loss is linear in the reach. So its expectation over random
    prefixes is the loss at the mean reach. Let pi_m be the probability that length m is among the
    n_prefixes - 1 lengths that are drawn without replacement. Then the mean reach of place j is
    (1 + sum_{m >= j} pi_m) / n_prefixes.

    Drawing without replacement is a race of exponential clocks, in which length m's clock has the
    rate p_m and the first n_prefixes - 1 that ring are drawn. So

        pi_m = integral of p_m exp(-p_m t) P(fewer than n_prefixes - 1 others ring before t) dt,

    which is computed by the trapezoidal rule in log t, with an error below 1e-9. Raises ValueError
    where n_prefixes is not within 1 .. n_latents.
    """
    if not 1 <= n_prefixes <= n_latents:
        raise ValueError(f"n_prefixes must be within 1 and {n_latents}, got {n_prefixes}")
    n_drawn = n_prefixes - 1
    if n_drawn == 0:
        return torch.ones(n_latents, dtype=torch.float64)
    p = prefix_probabilities(n_latents).numpy()
    included = np.ones(n_latents - 1)  # pi_m
    if n_drawn < n_latents - 1:
        width = min(0.2, 0.6 / math.sqrt(n_prefixes))
        log_t = np.arange(-40.0, math.log(45 / p.min()), width)
        parts = [_inclusion(p, n_drawn, np.exp(part)) for part in np.array_split(log_t, 16)]
        included = np.sum(parts, axis=0) * width
    reached = 1 + np.append(np.cumsum(included[::-1])[::-1], 0)
    return torch.from_numpy(reached / n_prefixes)


def _inclusion(p: np.ndarray, n_drawn: int, t: np.ndarray) -> np.ndarray:
    """The integrand of `expected_reach` with respect to log t, summed over the times t [n_times]:
    [n_lengths].

    Row n of `counts`, `below` and `above` is the probability that n of some clocks have rung by t,
    for n = 0 .. n_drawn - 1: [n_drawn, n_times].
    """
    rung = -np.expm1(-p[:, None] * t)  # [n_lengths, n_times]: P(length m's clock has rung by t)

    def with_clock(counts: np.ndarray, m: int) -> np.ndarray:
        """`counts` with length m's clock added to those that are counted."""
        more: np.ndarray = counts * (1 - rung[m])
        more[1:] += counts[:-1] * rung[m]
        return more

    no_clocks = np.zeros((n_drawn, len(t)))
    no_clocks[0] = 1
    below = [no_clocks]  # below[m] counts the clocks of the lengths below m
    for m in range(len(p) - 1):
        below.append(with_clock(below[-1], m))
    above, integrals = no_clocks, np.empty(len(p))  # `above` counts the clocks above m
    for m in reversed(range(len(p))):
        fewer = (below[m] * above.cumsum(axis=0)[::-1]).sum(axis=0)
        integrals[m] = (t * p[m] * np.exp(-p[m] * t) * fewer).sum()
        above = with_clock(above, m)
    return integrals
