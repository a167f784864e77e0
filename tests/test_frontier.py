"""Frontiers: lines of SAEs by kind, their table, their figure."""

from matryoshka import frontier_plot
from matryoshka.frontier import frontier_table, is_frontier, lines_of


def run_of(kind="matryoshka", activation="relu", target=20.0, seed=0, **more):
    scores = {"l0": target * 1.01, "fvu": 1 / target, "dead_share": 0.25, "seed": seed}
    scores |= {"loss_recovered": 0.5, "absorption": 0.125, "mean_highest_cosine": 0.5}
    about = {"sae": kind, "kind": kind, "activation": activation, "target_l0": target}
    return about | scores | more


RUNS = [
    run_of(kind, activation, target, seed)
    for kind in ("vanilla", "matryoshka")
    for activation in ("relu", "batchtopk")
    for target in (40.0, 10.0)
    for seed in (0, 1)
]


def test_a_line_is_a_kind_with_one_activation_function_in_order_of_l0():
    lines = lines_of(RUNS)
    assert set(lines) == {
        f"{kind}, {how}" for kind in ("vanilla", "matryoshka") for how in ("relu", "batchtopk")
    }
    for points in lines.values():
        assert [run["target_l0"] for run in points] == [10, 10, 40, 40]


def test_one_l0_is_no_frontier():
    assert is_frontier(RUNS)
    assert not is_frontier([run_of(), run_of("vanilla")])
    assert not is_frontier([{"sae": "refit", "l0": 3.0, "fvu": 0.1}])


def test_a_row_is_the_mean_of_its_saes():
    runs = [run_of(fvu=0.1), run_of(fvu=0.3, absorption=None), run_of("vanilla", absorption=None)]
    rows = [line.split("|")[1:-1] for line in frontier_table(lines_of(runs)).splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0][:4] == ["SAE", "asked L0", "L0", "FVU"]
    expected = ["matryoshka, relu", "20", "20.20", "0.2000", "25.0%", "50.0%", "0.500", "12.5%"]
    assert cells[2] == expected
    assert cells[3][-1] == "-"


def test_the_figure_is_drawn_with_whatever_scores_there_are(tmp_path):
    lines = lines_of([*RUNS, run_of("another tool", loss_recovered=None, absorption=None)])
    frontier_plot.draw(tmp_path / "frontier.png", lines)
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
