"""The toy's ground truth: a tree of features, exact probabilities, fast samples, directions.

A node can be active only if its parent is active, and then is with probability `active_prob`.
Children that exclude each other are decided by one draw: it picks child c with probability
active_prob_c, and no child with the remaining probability. The features are the nodes with
`is_read_out`, in depth-first pre-order.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.joint_tables import Choice, Sampler, pack
from matryoshka.process import threads
from sae import seeded_generator

# Samples drawn at a time: few enough that intermediate results stay in the CPU's cache.
CHUNK = 2**15
# How far rounding may move the sum of probabilities that are meant to sum to 1.
TOLERANCE = 1e-9

# Streams of a seed's random numbers; other numbers than the streams of sae.py.
STREAM_DIRECTIONS, STREAM_SAMPLES, STREAM_HELD_OUT, STREAM_REFIT = 10, 11, 12, 13
STEPS_A_DRAW = 50  # batches whose samples are drawn in one call

KEYS = (
    "active_prob",
    "is_read_out",
    "mutually_exclusive_children",
    "is_binary",
    "scales_with_parent",
    "id",
    "children",
)


@dataclasses.dataclass(frozen=True)
class Node:
    """A node with the values of the file. `parent` is its index in pre-order, -1 for the root."""

    parent: int
    active_prob: float
    is_read_out: bool
    exclusive_children: bool
    is_binary: bool
    scales_with_parent: bool
    id: str


class FeatureTree:
    """A tree of features, with the exact probability that each is active.

    Attributes; features are in depth-first pre-order everywhere:
        n_features: how many nodes are features.
        ids: each feature's name: the node's `id`, or else its path, such as "node_2_0".
        marginals: float64 [n_features], the probability that each feature is active.
        second_moments: float64 [n_features], the expected square of each feature's activation.
        expected_l0: the expected number of active features in a sample, the sum of the marginals.
        parent: for each feature, the index of the nearest feature above it in the tree, or None.
        kind: for each feature, "parent" if there is a feature below it; otherwise "child" if there
            is a feature above it; otherwise "rare".
    """

    def __init__(self, nodes: list[Node]) -> None:
        """`nodes` are in pre-order and checked, as `from_json` and `from_dict` make them."""
        self._nodes = nodes
        self._read_out = [i for i, node in enumerate(nodes) if node.is_read_out]
        feature_of = {node: feature for feature, node in enumerate(self._read_out)}
        self.n_features = len(self._read_out)
        self.ids = [nodes[i].id for i in self._read_out]
        self.parent = self._features_above(feature_of)
        parents = set(self.parent)
        self.kind = [
            "parent" if i in parents else "rare" if above is None else "child"
            for i, above in enumerate(self.parent)
        ]
        choices = _choices(nodes)
        self.marginals = self._marginals(choices)  # float64 [n_features]
        self.expected_l0 = math.fsum(self.marginals.tolist())
        self._lay_out(choices, feature_of)
        self._samplers: dict[torch.device, list[Sampler]] = {}

    @classmethod
    def from_json(cls, path: str | Path) -> "FeatureTree":
        """Reads a tree from the JSON file `path`; `from_dict` has the format.

        Raises `UserError` if the file cannot be read, is not JSON, or does not describe a tree.
        """
        try:
            spec = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except RecursionError:
            raise UserError(f"{path}: is nested too deeply to be read") from None
        except ValueError as error:  # the base of JSONDecodeError and UnicodeDecodeError
            raise UserError(f"{path}: is not JSON: {error}") from None
        return cls.from_dict(spec, source=str(path))

    @classmethod
    def from_dict(cls, spec: Any, source: str = "tree") -> "FeatureTree":
        """Makes the tree whose root is `spec`. A node is an object with these keys:

            active_prob: the probability that it is active if its parent is, in [0, 1]. Required.
            is_read_out: whether it is a feature. Default true.
            mutually_exclusive_children: whether at most one child is active. Default false.
            is_binary: whether its activation is 1 when it is active; otherwise each activation is
                drawn uniformly from (0, 1]. Default true.
            scales_with_parent: whether its activation is multiplied by that of the nearest
                feature above it. Default false.
            id: its name. Default: made of its path.
            children: a list of nodes. Default empty.

        Raises `UserError`, which names `source`, the path in the tree and what is wrong.
        """
        return cls(_parse(spec, source))

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draws `n` independent samples of the features' activations, float32 [n, n_features].

        They are on the generator's device, and depend only on the generator's state and `n`.
        """
        device = generator.device
        if device not in self._samplers:
            self._samplers[device] = [
                Sampler.of(table, self._column_of, device) for table in self._tables
            ]
        samples = torch.empty(n, self.n_features, device=device)
        # Most of the work is drawing uniform numbers, which is serial: a second thread gains
        # nothing, and on a busy machine waiting for it can cost many times the work.
        with threads(1):
            for start in range(0, n, CHUNK):
                self._fill(samples[start : start + CHUNK], self._samplers[device], generator)
        return samples

    def _fill(self, out: torch.Tensor, samplers: list[Sampler], generator: torch.Generator) -> None:
        """Draws samples into `out` [n, n_features]."""
        n = len(out)
        if len(samplers) == 1:  # its columns are the features, in order
            torch.index_select(samplers[0].rows, 0, samplers[0].draw(n, generator), out=out)
        else:
            active = out.new_empty(n, self._n_columns)
            for sampler in samplers:
                states = sampler.draw(n, generator)
                active[:, sampler.columns] = sampler.rows.index_select(0, states)
            for column, gate in self._masks:
                active[:, column] *= active[:, gate]
            out.copy_(active[:, : self.n_features])
        for feature in self._graded:
            # 1 - u is in (0, 1]: an active feature is never 0.
            out[:, feature] *= 1 - torch.rand(n, device=out.device, generator=generator)
        for feature, above in self._scaled:  # from the top down
            out[:, feature] *= out[:, above]

    def _features_above(self, feature_of: dict[int, int]) -> list[int | None]:
        """For each feature, the nearest feature above it in the tree; None if there is none."""
        above: list[int | None] = []  # for each node; a parent comes before its children
        for node in self._nodes:
            is_top = node.parent < 0
            above.append(None if is_top else feature_of.get(node.parent, above[node.parent]))
        return [above[i] for i in self._read_out]

    def _marginals(self, choices: list[Choice]) -> torch.Tensor:
        """The features' probabilities, by P(node) = P(node | its parent) P(parent)."""
        active = {-1: 1.0}
        for choice in choices:  # a parent's choice comes before its children's
            for node, p in zip(choice.nodes, choice.probs, strict=True):
                active[node] = p * active[choice.gate]
        return torch.tensor([active[i] for i in self._read_out], dtype=torch.float64)

    def _second_moments(self) -> torch.Tensor:
        """E[f^2] of each feature: its probability times the mean square of its magnitude.

        The mean square of a uniform magnitude is 1/3; those of independent magnitudes multiply.
        """
        squares, scaled = torch.ones(self.n_features, dtype=torch.float64), dict(self._scaled)
        squares[self._graded] = 1 / 3
        for feature, above in scaled.items():
            squares[feature] *= squares[above]
        return self.marginals * squares

    def _lay_out(self, choices: list[Choice], feature_of: dict[int, int]) -> None:
        """Packs the choices into tables, and finds the nodes whose parent is in another table.

        Tables are drawn independently, so such a node is multiplied by its parent afterwards. The
        columns of an unfinished sample are the features, then the other nodes that are needed as
        such parents.
        """
        self._tables = pack(choices)
        table_of = {node: t for t, table in enumerate(self._tables) for node in table.nodes}
        masked: dict[int, int] = {}  # node -> its gate; gates come first
        for choice in choices:
            apart = choice.gate >= 0 and table_of[choice.gate] != table_of[choice.nodes[0]]
            if apart or choice.gate in masked:
                masked |= dict.fromkeys(choice.nodes, choice.gate)
        self._column_of = dict(feature_of)
        for gate in masked.values():
            self._column_of.setdefault(gate, len(self._column_of))
        self._n_columns = len(self._column_of)
        self._masks = [
            (self._column_of[node], self._column_of[gate])
            for node, gate in masked.items()
            if node in self._column_of
        ]
        self._graded = [f for f, i in enumerate(self._read_out) if not self._nodes[i].is_binary]
        self._scaled = [
            (f, above)
            for f, above in enumerate(self.parent)
            if above is not None and self._nodes[self._read_out[f]].scales_with_parent
        ]
        self.second_moments = self._second_moments()


def _choices(nodes: list[Node]) -> list[Choice]:
    """The independent draws that make a sample; a node's draw comes before its children's.

    A node without a feature in its subtree does not show in a sample, so it is left out. If it
    excludes its siblings, its probability becomes a part of that of drawing no child.
    """
    matters = [node.is_read_out for node in nodes]
    for i in range(len(nodes) - 1, 0, -1):  # pre-order backwards: children before parents
        matters[nodes[i].parent] |= matters[i]
    drawn_together: dict[tuple[int, int], list[int]] = {}
    for i, node in enumerate(nodes):
        if matters[i]:
            exclusive = node.parent >= 0 and nodes[node.parent].exclusive_children
            drawn_together.setdefault((node.parent, -1 if exclusive else i), []).append(i)
    choices = []
    for (gate, _), members in drawn_together.items():
        probs = tuple(nodes[i].active_prob for i in members)
        rest = 1 - math.fsum(probs)
        choices.append(Choice(gate, tuple(members), probs, rest if rest > TOLERANCE else 0.0))
    return choices


def _parse(spec: Any, source: str) -> list[Node]:
    """The checked nodes of `spec` in pre-order. Raises `UserError`.

    It keeps a stack instead of calling itself, so a tree may be of any depth.
    """
    nodes: list[Node] = []
    seen: set[str] = set()
    stack: list[tuple[Any, int, str, str]] = [(spec, -1, "root", f"{source}:")]
    while stack:
        spec, parent, name, where = stack.pop()
        node = _parse_node(spec, parent, name, where)
        if node.id in seen:
            raise UserError(f"{_at(where, 'id')} is {node.id!r}: another node has that id")
        seen.add(node.id)
        stem = "node" if parent < 0 else name
        stack += [
            (child, len(nodes), f"{stem}_{i}", _at(where, f"children[{i}]"))
            for i, child in reversed(list(enumerate(spec.get("children", []))))
        ]
        nodes.append(node)
    if not any(node.is_read_out for node in nodes):
        raise UserError(f"{source}: no node is read out: at least one is_read_out must be true")
    return nodes


def _at(where: str, key: str) -> str:
    return where + (" " if where.endswith(":") else ".") + key


def _parse_node(spec: Any, parent: int, name: str, where: str) -> Node:
    """Makes one node from `spec`, and checks it and the sum of exclusive children's probabilities.

    `name` is its id if it has none; `where` is its place in the file, for errors.
    """
    if not isinstance(spec, dict):
        subject = f"{where} the root" if parent < 0 else where
        raise UserError(f"{subject} is {reprlib.repr(spec)}: a node must be an object")
    for key in spec:
        if key not in KEYS:
            raise UserError(f"{_at(where, str(key))} is not a key: known are {', '.join(KEYS)}")
    if "active_prob" not in spec:
        raise UserError(f"{_at(where, 'active_prob')} is missing: every node needs one")
    node = Node(
        parent=parent,
        active_prob=_probability(spec["active_prob"], _at(where, "active_prob")),
        is_read_out=_typed(spec, "is_read_out", True, bool, "true or false", where),
        exclusive_children=_typed(
            spec, "mutually_exclusive_children", False, bool, "true or false", where
        ),
        is_binary=_typed(spec, "is_binary", True, bool, "true or false", where),
        scales_with_parent=_typed(spec, "scales_with_parent", False, bool, "true or false", where),
        id=_typed(spec, "id", name, str, "a string", where),
    )
    children = _typed(spec, "children", [], list, "a list", where)
    if node.exclusive_children:
        _check_exclusive(children, where)
    return node


def _typed(
    spec: dict[str, Any], key: str, default: Any, kind: type, wanted: str, where: str
) -> Any:
    value = spec.get(key, default)
    if not isinstance(value, kind):
        raise UserError(f"{_at(where, key)} is {reprlib.repr(value)}: it must be {wanted}")
    return value


def _probability(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{at} is {reprlib.repr(value)}: it must be a number")
    if not 0 <= value <= 1:  # written so that NaN fails too
        raise UserError(f"{at} is {reprlib.repr(value)}: it must be within [0, 1]")
    return float(value)


def _check_exclusive(children: list[Any], where: str) -> None:
    """Raises `UserError` if there are no children, or their probabilities sum to more than 1."""
    if not children:
        at = _at(where, "mutually_exclusive_children")
        raise UserError(f"{at} is true, but the node has no children")
    probs = [child.get("active_prob") for child in children if isinstance(child, dict)]
    # A child whose active_prob is no probability is reported when that child is parsed.
    total = math.fsum(p for p in probs if isinstance(p, int | float) and 0 <= p <= 1)
    if total > 1 + TOLERANCE:
        at = _at(where, "children")
        raise UserError(
            f"{at} exclude each other, and their active_prob sum to {total:.9g}: "
            "the sum must be at most 1"
        )


def true_directions(n_features: int, d_model: int, generator: torch.Generator) -> torch.Tensor:
    """Draws a direction for each feature, float32 [n_features, d_model], on the generator's device.

    Their norms are 1 + 0.05 N(0, 1). If n_features <= d_model they are orthogonal, and uniformly
    distributed among orthogonal sets; otherwise they are independent and uniform on the sphere.
    """
    kwargs: dict[str, Any] = {
        "dtype": torch.float64,
        "device": generator.device,
        "generator": generator,
    }
    gaussian = torch.randn(d_model, n_features, **kwargs)
    if n_features <= d_model:
        q, r = torch.linalg.qr(gaussian)
        unit = q * r.diagonal().sign()  # QR's convention for signs would make q not uniform
    else:
        unit = gaussian / gaussian.norm(dim=0)
    norms = 1 + 0.05 * torch.randn(n_features, **kwargs)
    directions: torch.Tensor = (unit * norms).T.float().contiguous()
    return directions


@dataclasses.dataclass(frozen=True)
class ToyData:
    """The toy's data, which is different for each seed: x = features @ directions."""

    tree: FeatureTree
    d_model: int

    def directions(self, seed: int) -> torch.Tensor:
        """The features' directions for `seed`: [n_features, d_model]."""
        generator = seeded_generator(seed, STREAM_DIRECTIONS)
        return true_directions(self.tree.n_features, self.d_model, generator)

    def held_out(self, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, n_features] and x [n, d_model] to score the SAEs of `seed` on."""
        features = self.tree.sample(n, seeded_generator(seed, STREAM_HELD_OUT))
        return features, features @ self.directions(seed)

    def for_refit(self, seed: int, n: int) -> torch.Tensor:
        """x [n, d_model] to refit the SAEs of `seed` on; not used to train or to score them."""
        features = self.tree.sample(n, seeded_generator(seed, STREAM_REFIT))
        return features @ self.directions(seed)

    def batches(
        self, seeds: Sequence[int], batch_size: int, device: torch.device, copies: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yields batches x [copies * n_seeds, batch_size, d_model] without end.

        The first n_seeds entries are a batch for each seed; then the same batches are repeated.
        """
        generators = [seeded_generator(seed, STREAM_SAMPLES) for seed in seeds]
        directions = torch.stack([self.directions(seed) for seed in seeds]).to(device)
        while True:
            n = STEPS_A_DRAW * batch_size
            features = torch.stack([self.tree.sample(n, g) for g in generators]).to(device)
            x = torch.bmm(features, directions)  # [n_seeds, n, d_model]
            x = x.reshape(len(seeds), STEPS_A_DRAW, batch_size, -1).transpose(0, 1)
            yield from torch.cat([x] * copies, dim=1)  # [STEPS_A_DRAW, copies * n_seeds, ...]
