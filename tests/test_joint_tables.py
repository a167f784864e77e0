"""Joint tables and Walker's aliases, against enumeration and their definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import joint_tables
from matryoshka.joint_tables import Choice, JointTable, Sampler, alias_table, pack

PAIR = Choice(-1, (0, 1), (0.2, 0.3), 0.5)  # either of two nodes, or none
BELOW = Choice(1, (2,), (0.25,), 0.75)  # a node below the second of them
APART = Choice(-1, (3,), (0.6,), 0.4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda p: sum(p) > 0.01))
@settings(deadline=None, derandomize=True)
def test_alias_table_gives_back_its_distribution(probs):
    share, alias = alias_table(np.array(probs))
    mass = share.copy()
    np.add.at(mass, alias, 1 - share)
    np.testing.assert_allclose(mass / len(probs), np.array(probs) / sum(probs), atol=1e-12)
    assert (share >= 0).all()
    assert (share <= 1).all()


def test_a_table_lists_every_state_once_with_its_probability():
    table = JointTable()
    for choice in (PAIR, BELOW, APART):
        expected = table.size_with(choice)
        table.add(choice)
        assert len(table.states) == len(table.probs) == expected
    law = {}
    for pair, below, apart in itertools.product((None, 0, 1), (False, True), (False, True)):
        p = {None: 0.5, 0: 0.2, 1: 0.3}[pair] * (0.6 if apart else 0.4)
        if pair == 1:
            p *= 0.25 if below else 0.75
        elif below:
            continue
        law[(pair == 0, pair == 1, below, apart)] = p
    found = dict(zip(map(tuple, table.states.tolist()), table.probs, strict=True))
    assert table.nodes == [0, 1, 2, 3]
    assert found == pytest.approx(law)
    assert len(found) == len(table.states)


def test_outcomes_of_probability_zero_make_no_states():
    table = JointTable()
    table.add(Choice(-1, (0, 1), (0.0, 1.0), 0.0))
    assert table.states.tolist() == [[False, True]]
    assert table.probs.tolist() == [1.0]
    assert Choice(-1, (0, 1), (0.0, 1.0), 0.0).n_outcomes == 1
    assert PAIR.n_outcomes == 3


@pytest.mark.parametrize(
    ("limit", "nodes"),
    [(8, [[0, 1, 2, 3]]), (7, [[0, 1, 2], [3]]), (4, [[0, 1, 2], [3]]), (3, [[0, 1], [2], [3]])],
)
def test_choices_are_packed_in_turn_into_tables_of_limited_size(monkeypatch, limit, nodes):
    monkeypatch.setattr(joint_tables, "MAX_STATES", limit)
    assert [table.nodes for table in pack([PAIR, BELOW, APART])] == nodes


def test_a_sampler_puts_nodes_into_their_columns_and_drops_the_others():
    table = JointTable()
    table.add(PAIR)
    table.add(APART)
    sampler = Sampler.of(table, {3: 0, 0: 5}, torch.device("cpu"))
    assert sampler.columns.tolist() == [0, 5]
    states = sampler.draw(100_000, torch.Generator().manual_seed(0))
    rows = sampler.rows[states]
    means = rows.double().mean(dim=0).tolist()
    assert means == pytest.approx([0.6, 0.2], abs=6 * 0.5 / 100_000**0.5)
    assert (rows[:, 0] * rows[:, 1]).double().mean() == pytest.approx(0.12, abs=0.01)
