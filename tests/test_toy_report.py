"""The toy's tables: their figures, and that they fit in a terminal."""

from typing import Any

from matryoshka.toy_report import figures_of, summary


def run_of(sae: str, seed: int, clean: int, **changed: Any) -> dict[str, Any]:
    return {
        "sae": sae,
        "seed": seed,
        "fvu": 0.02 + 0.01 * seed,
        "l0": 1.2,
        "clean_features": clean,
        "n_features": 20,
        "clean_at": {"0.9": clean, "0.95": 8, "0.99": 5},
        "lost": {"parent": 0, "child": 20 - clean, "rare": 0},
        "absorption": [None, 0.5, 0.25],
        "edges": {"found": 9, "wrong": 1, "missing": 0},
    } | changed


def results_of(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"config": {"threshold": 0.9}, "runs": list(runs)}


def cells(text: str) -> dict[str, dict[str, str]]:
    """By the first column, then by heading: every cell of the tables."""
    found: dict[str, dict[str, str]] = {}
    for part in text.split("\n\n"):
        heads, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")
        ]
        for row in rows:
            found.setdefault(row[0], {}).update(zip(heads[1:], row[1:], strict=True))
    return found


def test_one_seed_is_given_as_it_is():
    found = cells(summary(results_of(run_of("matryoshka", 3, 19))))
    assert found["matryoshka"] == {
        "FVU": "0.0500",
        "L0": "1.200",
        "clean > 0.9 of 20": "19",
        "clean > 0.9": "19.00",
        "clean > 0.95": "8.00",
        "clean > 0.99": "5.00",
        "parent lost": "0.00",
        "child lost": "1.00",
        "rare lost": "0.00",
        "absorption": "0.375",
        "found": "9.00",
        "wrong": "1.00",
        "missing": "0.00",
        "the whole tree, none wrong": "0 of 1",
    }
    assert "seed 3" in summary(results_of(run_of("matryoshka", 3, 19)))


def test_several_seeds_are_mean_and_spread_and_how_often():
    runs = [run_of("a", 0, 20), run_of("a", 1, 16), run_of("a", 2, 20, absorption=[None])]
    text = summary(results_of(*runs))
    found = cells(text)["a"]
    assert "3 seeds" in text
    assert found["FVU"] == "0.0300 ± 0.0100"
    assert found["clean > 0.9 of 20"] == "20 in 2, 16 in 1"
    assert found["clean > 0.9"] == "18.67"
    assert found["child lost"] == "1.33"
    assert found["absorption"] == "0.375", "a child's rate that is not known does not count"
    assert "2 seeds" in summary(results_of(*runs[:2]))
    assert cells(summary(results_of(runs[2])))["a"]["absorption"] == "-"


def test_a_tree_is_whole_where_no_edge_is_wrong_or_missing():
    edges = [(9, 0, 0), (9, 1, 0), (8, 0, 1), (9, 0, 0)]
    runs = [
        run_of("a", seed, 20, edges=dict(zip(("found", "wrong", "missing"), e, strict=True)))
        for seed, e in enumerate(edges)
    ]
    found = cells(summary(results_of(*runs)))["a"]
    assert (found["found"], found["wrong"], found["missing"]) == ("8.75", "0.25", "0.25")
    assert found["the whole tree, none wrong"] == "2 of 4"


def test_any_tables_fit_in_80_columns_and_have_every_sae():
    names = [
        f"{name}{how}" for name in ("matryoshka", "x", "vanilla") for how in ("", ", refit both")
    ]
    runs = [run_of(name, seed, 20 - seed % 9) for name in names for seed in range(100)]
    text = summary(results_of(*runs))
    assert max(map(len, text.split("\n"))) <= 80
    assert cells(text).keys() == set(names)
    counted = cells(text)["x"]["clean > 0.9 of 20"]
    assert counted == "20 in 12, 19 in 11, 18 in 11, others in 66"


def test_the_figure_over_seeds_needs_several():
    assert set(figures_of(2)) - set(figures_of(1)) == {"seeds.png"}
