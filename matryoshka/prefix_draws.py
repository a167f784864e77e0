"""The prefixes of every step: drawn in blocks of steps, or the exact mean over what may be drawn.

Lengths with weights enter a kernel as the reach of each place, and as where reaches end.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.kernels.layout import count_ends
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


class PrefixDraws:
    """Each step's prefixes for a stack of SAEs, on the device that they train on.

    A function of the seeds and of the step alone, so a resumed run draws what it would have.
    """

    def __init__(
        self,
        n_latents: int,
        n_prefixes: Sequence[int],
        seeds: Sequence[int],
        expected: bool,
        like: Tensor,
        ends_on: torch.device,
    ):
        """n_prefixes and seeds: an SAE each. expected: the exact mean over what may be drawn.
        like: of the dtype, and on the device, of what is trained. ends_on: where kernels read the
        ends, the host but for a step that a GPU replays."""
        self.n_latents, self.n_prefixes, self.seeds = n_latents, list(n_prefixes), list(seeds)
        self._like, self._ends_on = like, ends_on
        self._block, self._steps = -1, list[StepPrefixes]()
        self._expected = self._expected_prefixes() if expected else None

    def of(self, step: int) -> StepPrefixes:
        """Those of step `step`, which counts from 0."""
        if self._expected is not None:
            return self._expected
        block, row = divmod(step, STEPS_A_BLOCK)
        if block != self._block:
            self._block, self._steps = block, self._draw(block)
        return self._steps[row]

    def lengths(self, block: int) -> list[Tensor]:
        """Each SAE's lengths for a block of steps: [STEPS_A_BLOCK, n_prefixes] on the CPU."""
        return [
            sample_prefixes(
                self.n_latents,
                n_prefixes,
                seeded_generator(seed, STREAM_PREFIXES, block),
                STEPS_A_BLOCK,
            )
            for seed, n_prefixes in zip(self.seeds, self.n_prefixes, strict=True)
        ]

    def _draw(self, block: int) -> list[StepPrefixes]:
        lengths = self.lengths(block)
        reaches = torch.stack([reach(one, self.n_latents) for one in lengths], dim=1)
        reaches = reaches.to(self._like)  # [STEPS_A_BLOCK, n_saes, n_latents]
        ends = zip(*(one.to(self._ends_on).unbind() for one in lengths), strict=True)
        return [StepPrefixes(*step) for step in zip(reaches, ends, strict=True)]

    def _expected_prefixes(self) -> StepPrefixes:
        reaches = [expected_reach(self.n_latents, k) for k in self.n_prefixes]
        ends = [count_ends(one).to(self._ends_on) for one in reaches]
        return StepPrefixes(torch.stack(reaches).to(self._like), ends)


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
