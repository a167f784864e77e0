"""The tree's samples and probabilities against enumeration, written here independently."""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_model
from matryoshka import joint_tables
from matryoshka.errors import UserError
from toy_model import FeatureTree, ToyData, true_directions

PAPER = Path(__file__).parent.parent / "tree.json"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- brute force: features are numbered by a walk, a law is {set of active features: probability}


def numbered(spec: dict, count: list[int]) -> dict:
    """A copy of `spec` with `feature`: its number in pre-order, or None."""
    own = dict(spec, feature=None)
    if spec.get("is_read_out", True):
        own["feature"] = count[0]
        count[0] += 1
    own["children"] = [numbered(child, count) for child in spec.get("children", [])]
    return own


def law(node: dict) -> dict[frozenset[int], float]:
    """P(set of active features below and at `node`), given that the parent of `node` is active."""
    alone = frozenset() if node["feature"] is None else frozenset([node["feature"]])
    if node.get("mutually_exclusive_children", False):
        below: dict[frozenset[int], float] = {}
        for child in node["children"]:
            for active, p in law(dict(child, active_prob=1.0)).items():
                below[active] = below.get(active, 0) + child["active_prob"] * p
        none = 1 - sum(child["active_prob"] for child in node["children"])
        below[frozenset()] = below.get(frozenset(), 0) + max(0.0, none)
    else:
        below = {frozenset(): 1.0}
        for child in node["children"]:
            product: dict[frozenset[int], float] = {}
            for a, p in below.items():
                for b, q in law(child).items():
                    product[a | b] = product.get(a | b, 0) + p * q
            below = product
    result = {frozenset(): 1 - node["active_prob"]}
    for active, p in below.items():
        result[active | alone] = result.get(active | alone, 0) + node["active_prob"] * p
    return result


def assert_counts(counts: np.ndarray, probs: np.ndarray, n: int) -> None:
    """Counts within 6 sigma of n p, plus what a Poisson tail needs; exact where p is 0 or 1."""
    sigma = np.sqrt(n * np.clip(probs * (1 - probs), 0, None))
    certain = (probs < 1e-15) | (probs > 1 - 1e-15)
    slack = np.where(certain, 1e-3, 6 * sigma + 12)
    off = np.abs(counts - n * probs)
    assert (off <= slack).all(), (counts, n * probs)


probabilities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.05, 0.95))


@st.composite
def trees(draw, depth: int = 4, prob=probabilities) -> dict:
    """A tree of depth up to `depth`, at most 3 children a node, every flag drawn."""
    n_children = draw(st.integers(0, 3 if depth > 2 else 2)) if depth > 1 else 0
    exclusive = n_children > 0 and draw(st.booleans())
    children = [draw(trees(depth=depth - 1)) for _ in range(n_children)]
    if exclusive:  # often sums to 1 exactly, or nearly
        total = sum(child["active_prob"] for child in children)
        scale = max(total, 1.0) if draw(st.booleans()) else (total or 1.0)
        for child in children:
            child["active_prob"] /= scale
    return {
        "active_prob": draw(prob),
        "is_read_out": draw(st.booleans()),
        "is_binary": draw(st.booleans()),
        "mutually_exclusive_children": exclusive,
        "children": children,
    }


def small_enough(spec: dict) -> bool:
    count = [0]
    numbered(spec, count)
    return 1 <= count[0] <= 10


@given(
    spec=trees().filter(small_enough), max_states=st.sampled_from([2, 7, 2**16]), seed=st.integers()
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_samples_and_marginals_follow_the_enumerated_law(spec, max_states, seed):
    n, count = 20_000, [0]
    exact = law(numbered(spec, count))
    n_features = count[0]
    states = np.zeros((len(exact), n_features))
    for row, active in zip(states, exact, strict=True):
        row[list(active)] = 1
    probs = np.array(list(exact.values()))

    with mock.patch.object(joint_tables, "MAX_STATES", max_states):  # a small limit: many tables
        tree = FeatureTree.from_dict(spec)
        samples = tree.sample(n, generator(seed % 2**63)).double().numpy()

    assert samples.shape == (n, n_features)
    assert tree.n_features == n_features
    marginals = probs @ states
    np.testing.assert_allclose(tree.marginals.numpy(), marginals, atol=1e-12)
    assert tree.expected_l0 == pytest.approx(marginals.sum(), abs=1e-12)

    active = (samples > 0).astype(float)
    assert_counts(active.sum(0), marginals, n)
    together = states.T @ (states * probs[:, None])
    assert_counts(active.T @ active, together, n)
    bits = 2 ** np.arange(n_features)
    joint = np.zeros(2**n_features)
    np.add.at(joint, (states @ bits).astype(int), probs)
    found = np.bincount((active @ bits).astype(int), minlength=2**n_features)
    assert_counts(found, joint, n)


def test_the_papers_tree():
    tree = FeatureTree.from_json(PAPER)
    assert tree.n_features == 20
    assert tree.expected_l0 == pytest.approx(1.12, abs=1e-12)
    block = [0.15, 0.03, 0.03, 0.03]
    np.testing.assert_allclose(tree.marginals.numpy(), block * 3 + [0.05] * 8, atol=1e-15)
    assert tree.kind == (["parent"] + ["child"] * 3) * 3 + ["rare"] * 8
    assert tree.parent == [None, 0, 0, 0, None, 4, 4, 4, None, 8, 8, 8] + [None] * 8
    assert tree.ids[:5] == ["parent_0", "child_0_0", "child_0_1", "child_0_2", "parent_1"]
    assert tree.ids[-1] == "rare_7"


@pytest.mark.parametrize("max_states", [2**16, 100, 2])
def test_children_imply_their_parent_and_exclude_each_other(max_states):
    with mock.patch.object(joint_tables, "MAX_STATES", max_states):
        tree = FeatureTree.from_json(PAPER)
        samples = tree.sample(500_000, generator())
    assert samples.dtype == torch.float32
    assert samples.is_contiguous()
    assert_counts(samples.double().sum(0).numpy(), tree.marginals.numpy(), 500_000)
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    for parent in (0, 4, 8):
        children = samples[:, parent + 1 : parent + 4].sum(1)
        assert children.max() == 1
        assert (samples[:, parent] >= children).all()


def test_a_group_larger_than_a_table_is_still_exclusive():
    spec = {
        "active_prob": 1,
        "is_read_out": False,
        "mutually_exclusive_children": True,
        "children": [{"active_prob": 0.1} for _ in range(10)],
    }
    with mock.patch.object(joint_tables, "MAX_STATES", 4):
        samples = FeatureTree.from_dict(spec).sample(1000, generator())
    assert (samples.sum(1) == 1).all()


def test_graded_features_are_uniform_and_never_zero_when_active():
    spec = {
        "active_prob": 1,
        "is_binary": False,
        "children": [{"active_prob": 0.5}, {"active_prob": 0.5, "is_binary": False}],
    }
    samples = FeatureTree.from_dict(spec).sample(200_000, generator())
    assert (samples[:, 0] > 0).all()
    assert set(samples[:, 1].unique().tolist()) == {0.0, 1.0}
    child = samples[:, 2][samples[:, 2] > 0]
    for graded in (samples[:, 0], child):
        empirical = (torch.arange(len(graded)) + 0.5) / len(graded)
        # Kolmogorov-Smirnov: P(distance > 3 / sqrt(n)) = 2 exp(-18)
        assert (graded.sort().values - empirical).abs().max() < 3 / math.sqrt(len(graded))
    both = torch.stack([samples[:, 0], samples[:, 2]])[:, samples[:, 2] > 0]
    assert abs(torch.corrcoef(both)[0, 1]) < 6 / math.sqrt(both.shape[1])  # drawn apart


def test_a_magnitude_may_scale_with_the_parents():
    """The nearest feature above, over a hidden node; and that one's with its own parent's."""
    grandchild = {"active_prob": 0.5, "scales_with_parent": True}
    hidden = {"active_prob": 0.9, "is_read_out": False, "children": [grandchild]}
    child = {"active_prob": 0.5, "is_binary": False, "scales_with_parent": True}
    spec = {"active_prob": 1, "is_binary": False, "children": [child | {"children": [hidden]}]}
    tree = FeatureTree.from_dict(spec)
    top, middle, low = tree.sample(200_000, generator()).double().T
    assert torch.equal(low[low > 0], middle[low > 0])  # binary, so as its parent is
    ratio = middle[middle > 0] / top[middle > 0]
    empirical = (torch.arange(len(ratio)) + 0.5) / len(ratio)
    assert (ratio.sort().values - empirical).abs().max() < 3 / math.sqrt(len(ratio))
    assert abs(torch.corrcoef(torch.stack([ratio, top[middle > 0]]))[0, 1]) < 0.02


@pytest.mark.parametrize("name", ["four_levels", "correlated", "scaled", "graded"])
def test_the_statistics_of_the_trees_are_those_of_samples(name):
    tree = FeatureTree.from_json(PAPER.parent / "studies" / "trees" / f"{name}.json")
    samples = tree.sample(100_000, generator()).double()
    for found, exact in (
        ((samples > 0).double(), tree.marginals),
        (samples.square(), tree.second_moments),
    ):
        error = found.std(dim=0) / math.sqrt(len(samples))
        assert ((found.mean(dim=0) - exact).abs() < 6 * error).all()
    assert tree.n_features == 20
    assert math.isclose(tree.expected_l0, float(tree.marginals.sum()))


def test_siblings_under_a_hidden_node_are_correlated():
    tree = FeatureTree.from_json(PAPER.parent / "studies" / "trees" / "correlated.json")
    active = (tree.sample(100_000, generator()) > 0).double()
    first, second = (tree.ids.index(f"rare_0_{i}") for i in range(2))
    together = (active[:, first] * active[:, second]).mean()
    assert abs(together - 0.08 * 0.6**2) < 0.003  # 0.0023 if they were independent


def test_samples_depend_on_the_generator_alone():
    tree = FeatureTree.from_json(PAPER)
    n = 3 * toy_model.CHUNK + 5
    first = tree.sample(n, generator(7))
    # The original's defect was to draw from NumPy's global generator.
    np.random.seed(123)  # noqa: NPY002
    torch.manual_seed(456)
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_before = torch.get_rng_state()
    again = FeatureTree.from_json(PAPER).sample(n, generator(7))
    assert torch.equal(first, again)
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_before, torch.get_rng_state())
    assert not torch.equal(first, tree.sample(n, generator(8)))
    chunk = toy_model.CHUNK
    assert not torch.equal(first[:chunk], first[chunk : 2 * chunk])
    on = generator(7)
    assert not torch.equal(tree.sample(100, on), tree.sample(100, on))  # it moves the generator


def test_sampling_does_not_walk_the_tree_in_python():
    """Fails on a sampler that calls a function a sample: it would make over 100,000 calls."""
    tree = FeatureTree.from_json(PAPER)
    tree.sample(1, generator())  # the tables are built once
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    rng = generator()
    sys.setprofile(count)
    try:
        tree.sample(100_000, rng)
    finally:
        sys.setprofile(None)
    assert 0 < calls < 1000


def test_no_samples_and_deep_trees():
    tree = FeatureTree.from_json(PAPER)
    assert tree.sample(0, generator()).shape == (0, 20)
    spec: dict = {"active_prob": 0.999}
    for _ in range(1200):  # Python has no more than 1000 calls within each other
        spec = {"active_prob": 0.999, "is_read_out": False, "children": [spec]}
    assert FeatureTree.from_dict(spec).expected_l0 == pytest.approx(0.999**1201)


def test_a_deep_chain_is_split_into_small_tables_and_sampled_as_one():
    depth, p = 2000, 0.9995
    spec: dict = {"active_prob": p}
    for _ in range(depth - 1):
        spec = {"active_prob": p, "children": [spec]}
    tree = FeatureTree.from_dict(spec)
    assert [len(table.nodes) for table in tree._tables] == [256] * 7 + [208]
    assert tree.parent == [None, *range(depth - 1)]
    assert tree.ids[:3] == ["root", "node_0", "node_0_0"]
    torch.testing.assert_close(tree.marginals, p ** torch.arange(1.0, depth + 1).double())
    active = tree.sample(2000, generator())
    assert (active[:, 1:] <= active[:, :-1]).all()  # a node is active only if its parent is
    l0 = active.sum(1).double()
    assert abs(l0.mean() - tree.expected_l0) < 4 * l0.std() / 2000**0.5


def test_kinds_and_ids_in_a_deeper_tree():
    spec = {
        "active_prob": 0.5,
        "children": [
            {
                "active_prob": 0.5,
                "is_read_out": False,
                "children": [
                    {"active_prob": 0.5, "id": "middle", "children": [{"active_prob": 1}]}
                ],
            },
            {"active_prob": 0.5},
        ],
    }
    tree = FeatureTree.from_dict(spec)
    assert tree.ids == ["root", "middle", "node_0_0_0", "node_1"]
    assert tree.parent == [None, 0, 1, 0]
    assert tree.kind == ["parent", "parent", "child", "child"]


def test_a_parent_is_the_nearest_feature_above_however_many_hidden_nodes_lie_between():
    hidden = {"active_prob": 0.5, "is_read_out": False}
    below = hidden | {"children": [hidden | {"children": [{"active_prob": 0.5, "id": "deep"}]}]}
    top = {"active_prob": 0.5, "id": "top", "children": [below, {"active_prob": 0.1}]}
    tree = FeatureTree.from_dict(hidden | {"children": [hidden | {"children": [top]}]})
    assert tree.ids[:2] == ["top", "deep"]
    assert tree.parent == [None, 0, 0]
    assert tree.kind == ["parent", "child", "child"]
    np.testing.assert_allclose(tree.marginals.numpy(), [0.5**3, 0.5**6, 0.5**3 * 0.1])
    with mock.patch.object(joint_tables, "MAX_STATES", 2):  # a table a node: gates in others
        samples = FeatureTree.from_dict(hidden | {"children": [hidden | {"children": [top]}]})
    for one in (tree, samples):
        drawn = one.sample(200_000, generator()).double().numpy()
        assert_counts(drawn.sum(0), tree.marginals.numpy(), len(drawn))
        assert (drawn[:, 0] >= drawn[:, 1:].max(axis=1)).all()


# --------------------------------------------------------------------------- what SAEs of it see


DATA = ToyData(FeatureTree.from_json(PAPER), 20)


def test_batches_are_new_samples_of_each_seeds_tree_the_same_in_every_copy():
    batches = DATA.batches([3, 4], 50, torch.device("cpu"), copies=3)
    first = [next(batches) for _ in range(toy_model.STEPS_A_DRAW + 1)]  # more than one draw
    assert {tuple(x.shape) for x in first} == {(6, 50, 20)}
    for x in first:
        assert torch.equal(x[:2], x[2:4])
        assert torch.equal(x[:2], x[4:])
    assert len({tuple(x[k].ravel().tolist()) for x in first for k in range(2)}) == 2 * len(first)
    for k, seed in enumerate((3, 4)):
        x = torch.cat([one[k] for one in first]).double()
        features = torch.linalg.lstsq(DATA.directions(seed).double().T, x.T).solution.T
        torch.testing.assert_close(features, features.round(), atol=1e-4, rtol=0)
        again = next(DATA.batches([seed], 50, torch.device("cpu")))
        torch.testing.assert_close(again[0], first[0][k])


def test_training_scoring_and_refitting_are_on_different_samples_in_one_space():
    n = 200
    trained = next(DATA.batches([3], n, torch.device("cpu")))[0]
    features, scored = DATA.held_out(3, n)
    refitted = DATA.for_refit(3, n)
    torch.testing.assert_close(scored, features @ DATA.directions(3))
    for one, other in ((trained, scored), (trained, refitted), (scored, refitted)):
        assert not torch.equal(one, other)
    for x in (trained, scored, refitted):
        found = torch.linalg.lstsq(DATA.directions(3).double().T, x.double().T).solution
        torch.testing.assert_close(found, found.round(), atol=1e-4, rtol=0)
    assert not torch.equal(DATA.directions(3), DATA.directions(4))
    assert torch.equal(DATA.held_out(3, n)[1], scored)
    assert not torch.equal(DATA.held_out(4, n)[0], features)


def test_streams_are_pinned():
    """Other streams would be other samples: every result in results/ would move."""
    streams = (
        toy_model.STREAM_DIRECTIONS,
        toy_model.STREAM_SAMPLES,
        toy_model.STREAM_HELD_OUT,
        toy_model.STREAM_REFIT,
    )
    assert streams == (10, 11, 12, 13)
    assert toy_model.STEPS_A_DRAW == 50
    assert toy_model.CHUNK == 2**15
    assert toy_model.TOLERANCE == 1e-9


def test_true_directions():
    directions = true_directions(20, 24, generator(3))
    assert directions.shape == (20, 24)
    assert directions.dtype == torch.float32
    norms = directions.double().norm(dim=1)
    unit = directions.double() / norms[:, None]
    torch.testing.assert_close(unit @ unit.T, torch.eye(20).double(), atol=1e-6, rtol=0)
    many = true_directions(4000, 3, generator(3)).double()  # more features than dimensions
    norms = many.norm(dim=1)
    assert abs(norms.mean() - 1) < 6 * 0.05 / math.sqrt(4000)
    assert abs(norms.std() - 0.05) < 6 * 0.05 / math.sqrt(8000)
    unit = many / norms[:, None]
    assert unit.mean(0).abs().max() < 6 / math.sqrt(3 * 4000)
    assert torch.equal(directions, true_directions(20, 24, generator(3)))
    # Uniform: without QR's signs put right, R's diagonal would fix the sign of each Q[i, i].
    first = torch.stack([true_directions(2, 2, generator(s))[0, 0] for s in range(200)])
    assert 50 < (first > 0).sum() < 150


# --- bad input: (what is wrong, what the message says after the file's name)

NODE = {"active_prob": 0.5}


def with_leaf(leaf: object) -> dict:
    return {"active_prob": 1, "children": [NODE, {"active_prob": 1, "children": [leaf]}]}


EXCLUSIVE = NODE | {"mutually_exclusive_children": True}
LEAF = "children[1].children[0]"
BAD = {
    "above 1": (with_leaf({"active_prob": 1.3}), f"{LEAF}.active_prob is 1.3: it must be within"),
    "below 0": (with_leaf({"active_prob": -1}), f"{LEAF}.active_prob is -1: it must be within"),
    "nan": (with_leaf({"active_prob": math.nan}), f"{LEAF}.active_prob is nan: it must be within"),
    "bool": (with_leaf({"active_prob": True}), f"{LEAF}.active_prob is True: it must be a number"),
    "text": (with_leaf({"active_prob": "1"}), f"{LEAF}.active_prob is '1': it must be a number"),
    "missing": (with_leaf({}), f"{LEAF}.active_prob is missing"),
    "unknown": (with_leaf(NODE | {"prob": 1}), f"{LEAF}.prob is not a key: known are active_prob,"),
    "no object": (with_leaf([1]), f"{LEAF} is [1]: a node must be an object"),
    "flag": (with_leaf(NODE | {"is_read_out": 1}), f"{LEAF}.is_read_out is 1: it must be true or"),
    "binary": (with_leaf(NODE | {"is_binary": "no"}), f"{LEAF}.is_binary is 'no': it must be true"),
    "scales": (
        with_leaf(NODE | {"scales_with_parent": 2}),
        f"{LEAF}.scales_with_parent is 2: it must be true or false",
    ),
    "id": (with_leaf(NODE | {"id": 3}), f"{LEAF}.id is 3: it must be a string"),
    "children": (with_leaf(NODE | {"children": {}}), f"{LEAF}.children is {{}}: it must be a list"),
    "no children": (
        with_leaf(NODE | {"mutually_exclusive_children": True}),
        f"{LEAF}.mutually_exclusive_children is true, but the node has no children",
    ),
    "sum": (
        with_leaf(NODE | {"mutually_exclusive_children": True, "children": [NODE, NODE, NODE]}),
        f"{LEAF}.children exclude each other, and their active_prob sum to 1.5:",
    ),
    "text among exclusive ones": (
        with_leaf(EXCLUSIVE | {"children": [NODE, {"active_prob": "1"}]}),
        f"{LEAF}.children[1].active_prob is '1': it must be a number",
    ),
    "above 1 among exclusive ones": (
        with_leaf(EXCLUSIVE | {"children": [{"active_prob": 0}, {"active_prob": 1.5}]}),
        f"{LEAF}.children[1].active_prob is 1.5: it must be within",
    ),
    "twice": (with_leaf(NODE | {"id": "node_0"}), f"{LEAF}.id is 'node_0': another node has"),
    "root is a list": ([1], "the root is [1]: a node must be an object"),
    "root's probability": ({"active_prob": 2}, "active_prob is 2: it must be within [0, 1]"),
    "none read out": ({"active_prob": 1, "is_read_out": False}, "no node is read out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_trees_are_named_in_one_line(case, tmp_path):
    spec, message = BAD[case]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError) as error:
        FeatureTree.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is not JSON: "),
        (b"\xff\xfe{}", "is not JSON: "),
        (b"[" * 200_000, "is nested too deeply"),
    ],
)
def test_bad_files_are_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        FeatureTree.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_rounding_in_an_exclusive_sum_is_no_error():
    children = [{"active_prob": p} for p in (0.1, 0.2, 0.3, 0.4 + 5e-10)]
    spec = {"active_prob": 1, "is_read_out": False, "mutually_exclusive_children": True}
    samples = FeatureTree.from_dict(spec | {"children": children}).sample(1000, generator())
    assert (samples.sum(1) == 1).all()
