"""The toy's ground truth: a tree of features, exact probabilities, fast samples, directions.

A node is active with its `active_prob` given that its parent is active, never otherwise. Children
that exclude each other are one draw: child c with probability active_prob_c, none with the rest.
The features are the read-out nodes, in depth-first pre-order.
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

# Samples drawn at a time: what is in flight stays in the cache too.
CHUNK = 2**15
# What rounding may add to, or leave of, probabilities that are meant to sum to 1.
TOLERANCE = 1e-9

# Streams of a seed's random numbers, apart from those of sae.py.
STREAM_DIRECTIONS, STREAM_SAMPLES, STREAM_HELD_OUT, STREAM_REFIT = 10, 11, 12, 13
STEPS_A_DRAW = 50  # batches drawn at once

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
    """A node as the file has it. `parent` is an index into the list of nodes, -1 for the root."""

    parent: int
    active_prob: float
    is_read_out: bool
    exclusive_children: bool
    is_binary: bool
    scales_with_parent: bool
    id: str


class FeatureTree:
    """A tree of features and how often each is active.

    Attributes, features in depth-first pre-order throughout:
        n_features: how many nodes are read out.
        ids: a name a feature, the node's `id` or else its path, such as "node_2_0".
        marginals: float64 [n_features], the exact probability that each is active.
        second_moments: float64 [n_features], the exact mean square of each one's activation.
        expected_l0: the sum of the marginals, the expected number of active features a sample.
        parent: a feature's nearest read-out ancestor, as a feature index, or None.
        kind: "parent" (has a read-out descendant), else "child" (has a read-out ancestor), else
            "rare".
    """

    def __init__(self, nodes: list[Node]) -> None:
        """`nodes` in pre-order, checked: `from_json` and `from_dict` make them."""
        self._nodes = nodes
        self._read_out = [i for i, node in enumerate(nodes) if node.is_read_out]
        feature_of = {node: feature for feature, node in enumerate(self._read_out)}
        self.n_features = len(self._read_out)
        self.ids = [nodes[i].id for i in self._read_out]
        self.parent = [self._feature_above(i, feature_of) for i in self._read_out]
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
        """The tree in the file `path`; see `from_dict`.

        Raises `UserError` where the file cannot be read, is not JSON, or is no tree.
        """
        try:
            spec = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except RecursionError:
            raise UserError(f"{path}: is nested too deeply to be read") from None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
            raise UserError(f"{path}: is not JSON: {error}") from None
        return cls.from_dict(spec, source=str(path))

    @classmethod
    def from_dict(cls, spec: Any, source: str = "tree") -> "FeatureTree":
        """The tree that `spec`, its root, describes. A node is an object of

            active_prob: number in [0, 1], given that the parent is active; required.
            is_read_out: whether it is a feature. Default true.
            mutually_exclusive_children: whether at most one child is active. Default false.
            is_binary: 1 when active; else uniform on (0, 1], drawn afresh. Default true.
            scales_with_parent: whether that is multiplied by the magnitude of the nearest
                feature above. Default false.
            id: its name.
            children: a list of nodes.

        Raises `UserError` naming `source`, the path in the tree and what is wrong.
        """
        return cls(_parse(spec, source))

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """`n` independent samples of the features' activations, float32 [n, n_features].

        They are on the generator's device and depend on nothing but the generator's state and `n`.
        """
        device = generator.device
        if device not in self._samplers:
            self._samplers[device] = [
                Sampler.of(table, self._column_of, device) for table in self._tables
            ]
        samples = torch.empty(n, self.n_features, device=device)
        # Drawing uniforms is serial, and most of the work: a second thread gains nothing, and on a
        # busy machine waiting for it costs many times the work.
        with threads(1):
            for start in range(0, n, CHUNK):
                self._fill(samples[start : start + CHUNK], self._samplers[device], generator)
        return samples

    def _fill(self, out: torch.Tensor, samplers: list[Sampler], generator: torch.Generator) -> None:
        """Draws samples into `out` [n, n_features]."""
        n = len(out)
        if len(samplers) == 1:  # then its columns are the features, in order
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

    def _feature_above(self, node: int, feature_of: dict[int, int]) -> int | None:
        above = self._nodes[node].parent
        while above >= 0 and above not in feature_of:
            above = self._nodes[above].parent
        return feature_of.get(above)

    def _marginals(self, choices: list[Choice]) -> torch.Tensor:
        """P(node) = P(node | its gate) P(gate), down the tree; of the read-out nodes."""
        active = {-1: 1.0}
        for choice in choices:  # gates come before what they gate
            for node, p in zip(choice.nodes, choice.probs, strict=True):
                active[node] = p * active[choice.gate]
        return torch.tensor([active[i] for i in self._read_out], dtype=torch.float64)

    def _second_moments(self) -> torch.Tensor:
        """E[f^2] of each feature: its probability times the mean square of its magnitude. A
        uniform's is 1/3, and independent magnitudes multiply."""
        squares, scaled = torch.ones(self.n_features, dtype=torch.float64), dict(self._scaled)
        squares[self._graded] = 1 / 3
        for feature, above in scaled.items():
            squares[feature] *= squares[above]
        return self.marginals * squares

    def _lay_out(self, choices: list[Choice], feature_of: dict[int, int]) -> None:
        """Packs the choices into tables, and notes what is to be masked by another table's nodes.

        The columns of a sample under way are the features, then those hidden nodes that mask.
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
    """The independent draws that make a sample, gates before what they gate.

    A node with no read-out in its subtree shows nowhere and is left out: where it excluded its
    siblings its probability goes to none of them.
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
    """`spec` as checked nodes in pre-order. Raises `UserError`. A stack: any depth will do."""
    nodes: list[Node] = []
    seen: set[str] = set()
    stack: list[tuple[Any, int, tuple[int, ...]]] = [(spec, -1, ())]
    while stack:
        spec, parent, path = stack.pop()
        where = source + ":" + "".join(f".children[{i}]" for i in path).replace(".", " ", 1)
        node = _parse_node(spec, parent, path, where)
        if node.id in seen:
            raise UserError(f"{_at(where, 'id')} is {node.id!r}: another node has that id")
        seen.add(node.id)
        children = spec.get("children", [])
        stack += [(child, len(nodes), (*path, i)) for i, child in enumerate(children)][::-1]
        nodes.append(node)
    if not any(node.is_read_out for node in nodes):
        raise UserError(f"{source}: no node is read out: at least one is_read_out must be true")
    return nodes


def _at(where: str, key: str) -> str:
    return where + (" " if where.endswith(":") else ".") + key


def _parse_node(spec: Any, parent: int, path: tuple[int, ...], where: str) -> Node:
    """One node, checked on its own and against its children's probabilities."""
    if not isinstance(spec, dict):
        subject = f"{where} the root" if not path else where
        raise UserError(f"{subject} is {reprlib.repr(spec)}: a node must be an object")
    for key in spec:
        if key not in KEYS:
            raise UserError(f"{_at(where, str(key))} is not a key: known are {', '.join(KEYS)}")
    if "active_prob" not in spec:
        raise UserError(f"{_at(where, 'active_prob')} is missing: every node needs one")
    name = "node" + "".join(f"_{i}" for i in path) if path else "root"
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
    """Raises `UserError` where there are none, or their probabilities sum to more than 1."""
    if not children:
        at = _at(where, "mutually_exclusive_children")
        raise UserError(f"{at} is true, but the node has no children")
    probs = [child.get("active_prob") for child in children if isinstance(child, dict)]
    # One that is no number, or no probability, is reported by name when its turn comes.
    total = math.fsum(p for p in probs if isinstance(p, int | float) and 0 <= p <= 1)
    if total > 1 + TOLERANCE:
        at = _at(where, "children")
        raise UserError(
            f"{at} exclude each other, and their active_prob sum to {total:.9g}: "
            "the sum must be at most 1"
        )


def true_directions(n_features: int, d_model: int, generator: torch.Generator) -> torch.Tensor:
    """A direction a feature, float32 [n_features, d_model], on the generator's device.

    Their norms are 1 + 0.05 N(0, 1). They are orthogonal, and uniform among such sets, where
    n_features <= d_model; with more features than dimensions that cannot be, and each is an
    independent uniform direction.
    """
    kwargs: dict[str, Any] = {
        "dtype": torch.float64,
        "device": generator.device,
        "generator": generator,
    }
    gaussian = torch.randn(d_model, n_features, **kwargs)
    if n_features <= d_model:
        q, r = torch.linalg.qr(gaussian)
        unit = q * r.diagonal().sign()  # without the signs QR's convention shows in the directions
    else:
        unit = gaussian / gaussian.norm(dim=0)
    norms = 1 + 0.05 * torch.randn(n_features, **kwargs)
    directions: torch.Tensor = (unit * norms).T.float().contiguous()
    return directions


@dataclasses.dataclass(frozen=True)
class ToyData:
    """What SAEs of the toy see, for each seed its own: x = features @ directions."""

    tree: FeatureTree
    d_model: int

    def directions(self, seed: int) -> torch.Tensor:
        """The features' directions for `seed`: [n_features, d_model]."""
        generator = seeded_generator(seed, STREAM_DIRECTIONS)
        return true_directions(self.tree.n_features, self.d_model, generator)

    def held_out(self, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, n_features] and x [n, d_model] of `seed` that no SAE was trained on."""
        features = self.tree.sample(n, seeded_generator(seed, STREAM_HELD_OUT))
        return features, features @ self.directions(seed)

    def for_refit(self, seed: int, n: int) -> torch.Tensor:
        """x [n, d_model] of `seed` to refit an SAE on, neither trained nor scored on."""
        features = self.tree.sample(n, seeded_generator(seed, STREAM_REFIT))
        return features @ self.directions(seed)

    def batches(
        self, seeds: Sequence[int], batch_size: int, device: torch.device, copies: int = 1
    ) -> Iterator[torch.Tensor]:
        """Endless batches for all `seeds`, each time `copies` of them, one after another.

        Yields x [copies * n_seeds, batch_size, d_model].
        """
        generators = [seeded_generator(seed, STREAM_SAMPLES) for seed in seeds]
        directions = torch.stack([self.directions(seed) for seed in seeds]).to(device)
        while True:
            n = STEPS_A_DRAW * batch_size
            features = torch.stack([self.tree.sample(n, g) for g in generators]).to(device)
            x = torch.bmm(features, directions)  # [n_seeds, n, d_model]
            x = x.reshape(len(seeds), STEPS_A_DRAW, batch_size, -1).transpose(0, 1)
            yield from torch.cat([x] * copies, dim=1)  # [STEPS_A_DRAW, copies * n_seeds, ...]
