"""Samples several dependent yes-or-no draws at once, from a table of their joint distribution.

The draws are `Choice`s, each of which may depend on the outcome of another. A table lists every
state that can occur, with its probability. A sample then costs one random number and one look-up.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# A joint table of at most this many states fits in a CPU's cache.
MAX_STATES = 2**16
# A joint table has at most this many nodes. A chain of n nodes has n + 1 states, so one table of it
# would take n^2 memory, and n^3 time to build.
MAX_NODES = 256


@dataclasses.dataclass(frozen=True)
class Choice:
    """A draw of at most one of `nodes`, made if the node `gate` is active (-1: always)."""

    gate: int
    nodes: tuple[int, ...]
    probs: tuple[float, ...]
    rest: float  # the probability that none of them is drawn

    @property
    def n_outcomes(self) -> int:
        return sum(p > 0 for p in self.probs) + (self.rest > 0)


class JointTable:
    """The joint distribution of some choices: every state that can occur, with its probability.

    A choice whose gate is not in the same table is drawn as if the gate were active.
    """

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.states = np.zeros((1, 0), dtype=bool)  # [n_states, n_nodes]
        self.probs = np.ones(1)  # [n_states]

    def _gated(self, choice: Choice) -> np.ndarray:
        """In which states the choice is made: bool [n_states]."""
        if choice.gate in self.nodes:
            return self.states[:, self.nodes.index(choice.gate)]
        return np.ones(len(self.states), dtype=bool)

    def size_with(self, choice: Choice) -> int:
        """How many states there would be with `choice` added."""
        n_open = int(self._gated(choice).sum())
        return len(self.states) - n_open + n_open * choice.n_outcomes

    def add(self, choice: Choice) -> None:
        """Adds a choice to the distribution. Outcomes of probability 0 add no states."""
        is_open = self._gated(choice)
        states = np.pad(self.states, ((0, 0), (0, len(choice.nodes))))
        parts = [(states[~is_open], self.probs[~is_open])]
        if choice.rest > 0:
            parts.append((states[is_open], self.probs[is_open] * choice.rest))
        for i, p in enumerate(choice.probs):
            if p > 0:
                chosen = states[is_open]
                chosen[:, len(self.nodes) + i] = True
                parts.append((chosen, self.probs[is_open] * p))
        self.nodes += choice.nodes
        self.states = np.concatenate([s for s, _ in parts])
        self.probs = np.concatenate([p for _, p in parts])


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws from one table on one device, by Walker's alias method."""

    columns: Tensor  # int64 [k]: the columns of the result that a state's row fills
    rows: Tensor  # float32 [n_states, k]: which of these nodes are active in each state
    cut: Tensor  # float64 [n_states]: i + the probability that bin i gives state i
    alias: Tensor  # int64 [n_states]: the state that bin i gives otherwise

    @classmethod
    def of(cls, table: JointTable, column_of: Mapping[int, int], device: torch.device) -> "Sampler":
        """column_of: the column of the result for each node that is wanted; others are dropped."""
        order = sorted((column_of[n], i) for i, n in enumerate(table.nodes) if n in column_of)
        share, alias = alias_table(table.probs)
        rows = np.ascontiguousarray(table.states[:, [i for _, i in order]], dtype=np.float32)
        return cls(
            columns=torch.tensor([c for c, _ in order], dtype=torch.long, device=device),
            rows=torch.from_numpy(rows).to(device),
            cut=torch.from_numpy(share + np.arange(len(share))).to(device),
            alias=torch.from_numpy(alias).to(device),
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The numbers of the states of `n` samples: int64 [n]. Uses one random number for each."""
        u = torch.rand(n, dtype=torch.float64, device=generator.device, generator=generator)
        u *= len(self.cut)  # its integer part is the bin, its fraction is uniform within the bin
        bins = u.long()
        # index_select is several times as fast on the CPU as indexing with brackets.
        return torch.where(
            u < self.cut.index_select(0, bins), bins, self.alias.index_select(0, bins)
        )


def alias_table(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias table of the distribution `probs` [n] (normalised here), by Vose's method.

    Returns share, float64 [n], and alias, int64 [n]. Of n equally likely bins, bin i gives state i
    with probability share_i and state alias_i otherwise, so that
    P(i) = (share_i + sum_{j: alias_j = i} (1 - share_j)) / n.
    """
    scaled = (probs / probs.sum() * len(probs)).tolist()
    share = [1.0] * len(scaled)
    alias = list(range(len(scaled)))
    small = [i for i, p in enumerate(scaled) if p < 1]
    large = [i for i, p in enumerate(scaled) if p >= 1]
    while small and large:
        i, j = small.pop(), large[-1]
        share[i], alias[i] = scaled[i], j
        scaled[j] -= 1 - scaled[i]
        if scaled[j] < 1:
            small.append(large.pop())
    return np.array(share), np.array(alias)  # the shares that are left are 1, up to rounding


def pack(choices: Sequence[Choice]) -> list[JointTable]:
    """Puts the choices into tables, in order, and begins a new table when one would be too large.

    A table has at most MAX_STATES states and MAX_NODES nodes, except that a single choice that has
    more than these has a table to itself.
    """
    tables = [JointTable()]
    for choice in choices:
        last = tables[-1]
        n_nodes = len(last.nodes) + len(choice.nodes)
        if last.nodes and (n_nodes > MAX_NODES or last.size_with(choice) > MAX_STATES):
            tables.append(JointTable())
        tables[-1].add(choice)
    return tables
