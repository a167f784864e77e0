"""The tables are what the kept files say, on files that are made up here."""

import json

import numpy as np
import pytest

from matryoshka import toy_report
from matryoshka.errors import UserError
from matryoshka.files import json_text
from studies import kept_results, standin_tables, tables, toy_tables


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Writes made-up files in place of results/: kept(name, runs=[...], **of_the_source)."""
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)

    def write(name, runs=(), **source):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {"device": "cpu, x86_64", "threads": 1, "torch": "2.0"}
        sources = [{"environment": environment, **source}]
        path.write_text(json.dumps({"sources": sources, "runs": list(runs)}))

    return write


def cells(table):
    """The cells of a table in Markdown, a list a row, without the rule under its head."""
    head, _, *rows = table.splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]


def column(table, header):
    head, *rows = cells(table)
    return [row[head.index(header)] for row in rows]


def toy_run(sae, seed, clean, fvu=0.25, **more):
    run = {"sae": sae, "seed": seed, "clean_features": clean, "n_features": 20, "fvu": fvu}
    at = {"0.9": clean, "0.95": clean - 1, "0.99": clean - 2}
    run |= {"l0": 1.0, "clean_at": at, "best_cosine": [0.5, 1.0], "absorption": [None, 0.5]}
    return run | {"steps_to": dict.fromkeys(at)} | more


def test_a_missing_file_is_named(kept):
    with pytest.raises(UserError, match=r"results/toy/sampled.json is not there"):
        tables.toy()
    with pytest.raises(UserError, match=r"results/toy/\*.json is not there"):
        tables.where("toy/*.json")


@pytest.mark.parametrize(
    "content",
    [
        '{"sources": [{"torch": "2',
        "",
        "\x00",
        "{}",
        "[]",
        "7",
        '{"sources": [], "runs": []}',
        '{"sources": null, "runs": 3}',
        '{"sources": [1], "runs": [2]}',
    ],
)
def test_a_damaged_file_is_named(kept, tmp_path, content):
    kept("toy/sampled.json")
    (tmp_path / "toy" / "sampled.json").write_text(content)
    for make in (tables.toy, lambda: tables.named("toy"), lambda: tables.where("toy/*.json")):
        with pytest.raises(UserError, match=r"results/toy/sampled\.json is damaged"):
            make()


def test_a_folder_in_the_place_of_a_file_is_named(kept, tmp_path):
    (tmp_path / "toy" / "sampled.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"results/toy/sampled\.json is damaged"):
        tables.toy()


def test_edges_are_shown_where_they_were_counted(kept):
    found = {"found": 9, "wrong": 0, "missing": 0}
    runs = [{"sae": sae, "edges": found} for sae in ("matryoshka", "matryoshka, refit both")]
    old = [{"sae": "matryoshka"}]
    kept("toy/sampled.json", runs)
    for file in ("toy/restarts", "toy/unhedged"):
        kept(f"{file}.json", old)
    for name in toy_tables.TREES:
        for ending in ("0", "100", "unhedged"):
            kept(f"trees/{name}_{ending}.json", runs[:1] if ending == "unhedged" else old)
    rows = cells(toy_tables.edges())[1:]
    titles = ["the paper's tree", "the paper's tree, refit both"]
    titles += [f"{title}, unhedged" for title in toy_tables.TREES.values()]
    assert [row[0] for row in rows] == titles
    assert rows[0][1:] == ["9.0 / 0.0 / 0.0", toy_report.share(1, 1), "", ""]


@pytest.mark.parametrize("name", tables.TABLES)
def test_files_that_lack_what_a_table_shows_are_named(name, tmp_path, monkeypatch):
    """Every file that is kept, with its keys or its runs gone."""
    for path in tables.RESULTS.rglob("*.json"):
        copy = tmp_path / path.relative_to(tables.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text('{"sources": [{}], "runs": [{}]}')
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=rf"`results/\S+\.json`.* lacks what table {name} shows"):
        tables.named(name)


def test_where_names_each_place_once(kept):
    place = {"device": "cpu, x86_64", "threads": 2, "torch": "2.9", "cpu": "A", "commit": "f" * 40}
    kept("toy/a.json", environment=place)
    kept("toy/b.json", environment=place)
    kept("toy/c.json", environment={**place, "commit": "e" * 40 + "+changes"})
    kept("toy/d.json", environment={**place, "device": "H100", "commit": None})
    kept("other/a.json", environment={**place, "cpu": None})
    first = "A, 2 threads, torch 2.9, commit fffffff"
    second = "A, 2 threads, torch 2.9, commit eeeeeee+changes"
    assert tables.where("toy/a.json") == tables.where("toy/a.json", "toy/b.json") == first
    assert tables.where("toy/*.json") == f"{first}; {second}; H100, 2 threads, torch 2.9"
    assert tables.where("other/a.json") == "CPU, 2 threads, torch 2.9, commit fffffff"


def test_a_count_has_its_exact_interval():
    assert toy_report.share(88, 100) == "88 of 100 (80-94%)"
    for n in (2, 7, 40):  # where none or all succeed, the interval has a closed form
        limit = 0.025 ** (1 / n)
        assert toy_report.share(0, n) == f"0 of {n} (0-{100 * (1 - limit):.0f}%)"
        assert toy_report.share(n, n) == f"{n} of {n} ({100 * limit:.0f}-100%)"


def test_a_spread_is_mean_and_standard_deviation():
    assert kept_results.spread([1.0, 2.0, 6.0], 3) == "3.000 ± 2.646"  # sqrt((4 + 1 + 9) / 2)
    assert kept_results.spread([1.0], 3) == "1.000"


def test_seeds_that_never_come_to_it_have_no_steps():
    runs = [{"steps_to": {"0.9": steps}} for steps in (100, None, 400, 1000)]
    assert toy_tables.median_steps(runs, "0.9") == 400


def test_the_toys_table_counts_as_many_as_reported(kept):
    runs = [toy_run("matryoshka", seed, clean) for seed, clean in enumerate((20, 20, 20, 17))]
    runs += [toy_run("vanilla", seed, 11, fvu=seed / 10) for seed in range(4)]
    runs += [toy_run("vanilla, refit", seed, 12) for seed in range(4)]
    kept("toy/sampled.json", runs)
    shown = tables.toy()
    assert cells(shown)[0][0] == "4 seeds"
    counts = column(shown, "as many clean as reported")
    assert counts[:2] == [
        f"20/20 in {toy_report.share(3, 4)}",
        f"11/20 in {toy_report.share(4, 4)}",
    ]
    assert column(shown, "clean > 0.9")[:2] == ["19.25", "11.00"]
    assert column(shown, "clean > 0.99")[:2] == ["17.25", "9.00"]
    assert column(shown, "FVU")[1] == kept_results.spread([0, 0.1, 0.2, 0.3], 4)


def test_recipes_take_each_files_seeds_and_each_kinds_time(kept):
    times = {"of matryoshka": {"median": 2.0}, "of matryoshka, expected prefixes": {"median": 3.0}}
    kept("bench/toy.json", toy=times)
    for file in tables.RECIPES.values():
        runs = []
        for seed, clean in ((5, 20), (6, 19), (7, 20)):
            steps = {"0.9": 1000 * seed if clean == 20 else None}
            runs.append(toy_run("matryoshka", seed, clean, fvu=0.1 * seed, steps_to=steps))
            runs.append(toy_run("matryoshka, refit", seed, clean, steps_to={"0.9": 100}))
        kept(f"toy/{file}.json", runs)
    first, *_, last = cells(tables.recipes())[1:]
    shown = ["5 to 7", toy_report.share(2, 3), "0.6000", "0.7000", "1.000", "6,000"]
    assert first == ["sampled prefixes (the paper)", *shown, "12.0", "100"]
    assert last == ["expected prefixes", *shown, "18.0", "100"]


def test_starred_columns_of_the_refits_are_over_the_seeds_that_had_all_features(kept):
    for file in ("sampled", "expected", "restarts", "restarts_unseen"):
        runs = []
        for sae in ("matryoshka", "vanilla"):
            for how in toy_tables.REFITS:
                whole = toy_run(sae + how, 0, 20, 0.25, best_cosine=[0.75, 1.0])
                whole["clean_at"] = {"0.9": 20, "0.95": 20, "0.99": 19}
                runs += [whole, toy_run(sae + how, 1, 17, 0.75, best_cosine=[0.1, 1.0])]
        kept(f"toy/{file}.json", runs)
    shown = tables.refitted()
    assert set(column(shown, "FVU")) == {"0.5000"}
    assert set(column(shown, "worst FVU*")) == {"0.2500"}
    assert set(column(shown, "all 20 > 0.95*")) == {"1 of 1 (2-100%)"}
    assert set(column(shown, "all 20 > 0.99*")) == {"0 of 1 (0-98%)"}
    assert set(column(shown, "worst cosine*")) == {"0.750"}
    assert set(column(shown, "absorption")) == {"0.500"}


def test_trees_show_whatever_kinds_there_are(kept):
    for name in tables.TREES:
        for every in (0, 100):
            runs = []
            for i, sae in enumerate("abc"):
                for how in toy_tables.REFITS:
                    runs += [toy_run(sae + how, seed, 10 + i + seed, i / 4) for seed in (0, 1)]
            kept(f"trees/{name}_{every}.json", runs)
    head, *rows = cells(tables.trees())
    assert head[0] == "a / b / c"
    assert len(rows) == 2 * len(tables.TREES)
    for row in rows:
        assert row[1] == "10.5 / 11.5 / 12.5"
        assert row[4] == "0 of 2 (0-84%)"
        assert row[5] == "0.0000 / 0.2500 / 0.5000"


def test_unhedged_training_beside_the_write_ups(kept):
    names = {"toy/unhedged": "toy/sampled"}
    names |= {f"trees/{name}_unhedged": f"trees/{name}_0" for name in tables.TREES}
    for file, usual in names.items():
        found = [toy_run("matryoshka", seed, n, 0.25) for seed, n in ((7, 20), (8, 19))]
        for run in found:
            run["clean_at"] = dict.fromkeys(("0.9", "0.95", "0.99"), run["clean_features"])
        kept(f"{file}.json", found)
        of_kinds = [(sae, n) for sae in ("matryoshka", "vanilla") for n in (11, 12)]
        kept(f"{usual}.json", [toy_run(sae, 0, n, 0.5) for sae, n in of_kinds])
    rows = cells(tables.unhedged())[1:]
    assert len(rows) == 1 + len(tables.TREES)
    for row in rows:
        assert row[1:] == [
            "7 to 8",
            "19.50",
            "19.50",
            "19.50",
            "1 of 2 (1-99%)",
            "0.25000",
            "0.500",
            "11.5",
            "11.5",
        ]


def evaluated(source, sae, absorption=(0.5,), **more):
    concepts = [
        {"concept": f"c{i}", "tokens": 10, "absorption": rate} for i, rate in enumerate(absorption)
    ]
    run = {"source": source, "sae": sae, "concepts": concepts, "fvu": 0.25, "l0": 20.0}
    run |= {"dead_share": 0.0, "loss_recovered": 1.0, "mean_highest_cosine": 0.5}
    return run | {"absorption": 0.125} | more


def test_the_stand_ins_runs_are_found_by_their_recipe(kept):
    names = ["sampled_seed1", "sampled_seed0", "sampled_seed0/refit", "unsampled_seed0"]
    kept("standin/evaluation.json", [evaluated(f, sae) for f in names for sae in "ab"])
    found = standin_tables.standin_runs("a", "sampled")
    assert [run["source"] for run in found] == ["sampled_seed0", "sampled_seed1"]
    assert {run["sae"] for run in found} == {"a"}
    (refitted,) = standin_tables.standin_runs("b", "sampled", "/refit")
    assert refitted["source"] == "sampled_seed0/refit"


def test_concepts_that_no_latent_detects_are_not_counted_as_0(kept):
    runs = [
        evaluated("sampled_seed0", "a", (0.5, None, None)),
        evaluated("sampled_seed1", "a", (0.25, 0.25, None)),
        evaluated("sampled_seed0", "b", (0.0, 0.0, 0.0)),
        evaluated("sampled_seed1", "b", (0.0, 0.0, 0.0)),
    ]
    kept("standin/evaluation.json", runs)
    assert cells(tables.concepts()) == [
        ["concept", "tokens", "a", "of its total", "b", "of its total", "a, by seed", "b, by seed"],
        ["c0", "10", "37.5%", "75%", "0.0%", "0%", "50% / 25%", "0% / 0%"],
        ["c1", "10", "25.0%", "25%", "0.0%", "0%", "- / 25%", "0% / 0%"],
        ["c2", "10", "-", "0%", "0.0%", "0%", "- / -", "0% / 0%"],
    ]


def test_growth_leaves_out_what_was_not_measured(kept):
    times = {name: {"median": ms} for name, ms in (("8 latents", 4.0), ("L0 3", 2.0))}
    times |= {"8 latents, five products": {"median": 16.0}}
    kept("bench/growth.json", growth=times)
    assert cells(tables.growth())[1:] == [
        ["8 latents", "4", "-", "16", "0.25"],
        ["L0 3", "2", "-", "-", "-"],
    ]


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="no table nonsense, only toy, "):
        tables.named("nonsense")


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made_from_what_is_kept(name):
    """With as many cells in each row, and under it where it was made."""
    *shown, _, place = tables.named(name).splitlines()
    rows = cells("\n".join(shown))
    assert len(rows) > 1
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(f"results/{file}" in place for file in tables.TABLES[name][1])
    assert "torch" in place


@pytest.mark.parametrize("path", sorted(tables.RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_every_kept_file_has_sources_and_runs_and_no_path(path):
    content = json.loads(path.read_text())
    assert set(content) == {"sources", "runs"}
    assert content["sources"]
    names = {source["source"] for source in content["sources"]}
    assert len(names) == len(content["sources"])
    assert {run["source"] for run in content["runs"]} <= names
    for forbidden in ("/home/", "/tmp/", "/root/", "/work/"):
        assert forbidden not in path.read_text()
    assert path.read_text() == json_text(content)  # a line a run


def test_what_is_clean_is_what_best_cosines_say():
    """The kept counts and the kept cosines are of the same SAEs."""
    for path in sorted((tables.RESULTS / "toy").glob("*.json")):
        for run in json.loads(path.read_text())["runs"]:
            best = np.array(run["best_cosine"], dtype=float)
            for threshold, count in run["clean_at"].items():
                assert count == (best > float(threshold)).sum()
