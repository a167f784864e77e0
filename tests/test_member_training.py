"""Many SAEs in one pass: each as alone, one that diverges, held-out figures, the recipes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import run_factory
import torch
from training_cases import (
    N_TOKENS,
    argv_for,
    config_for,
    contents,
    flip,
    kill,
    records_of,
    refused,
    resumed,
    write_cache,
)

import evaluate
import train
import train_tinystories
from matryoshka import training
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import parse
from matryoshka.errors import UserError
from matryoshka.metrics import fvu
from matryoshka.saved_runs import METRICS, load_saes, training_curves, training_results
from matryoshka.training_config import RECIPES
from matryoshka.training_report import BAR_WIDTH, bar_text
from sae import SAE
from train import run
from train_tinystories import Config

MIXED: list[dict[str, Any]] = [
    {"name": "a", "n_latents": 20, "resample_every": 7, "dead_after": 500},
    {"name": "b", "kind": "vanilla", "activation": "batchtopk", "n_latents": 28, "target_l0": 4.5},
    {
        **{"name": "c", "activation": "topk", "target_l0": 2, "lr": 1e-3, "widths": [0.25, 1]},
        **{"auxiliary": "level", "dead_after": 500},
    },
    {"name": "d", "activation": "jumprelu", "n_latents": 300, "prefixes": "expected"},
]
WILD = {"name": "wild", "lr": 1e30}  # diverges at once


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", N_TOKENS)


def config_of(
    cache: Path, out: Path, tables: list[dict[str, Any]], **settings: Any
) -> train_tinystories.Config:
    """A run of the SAEs `tables`, whose file lies beside `out`."""
    path = out.with_suffix(".json")
    path.write_text(json.dumps({"sae": tables}))
    return config_for(cache, out, members=str(path), **settings)


def learnt_by_sae(folder: Path) -> dict[str, tuple[bytes, list[dict[str, Any]]]]:
    """Of each SAE its tensors' bytes, without the header, and its records."""
    records, learnt = records_of(folder), {}
    for path in folder.glob("[!.]*.safetensors"):
        if path.stem != "checkpoint":
            data = path.read_bytes()
            own = [record for record in records if record["sae"] == path.stem]
            learnt[path.stem] = data[8 + int.from_bytes(data[:8], "little") :], own
    return learnt


@pytest.fixture(scope="module")
def mixed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of MIXED, which nothing interrupted."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    run(config_of(cache, out, MIXED))
    return out


@pytest.mark.parametrize("table", MIXED, ids=lambda table: table["name"])
def test_an_sae_in_company_ends_at_the_bytes_of_alone(
    cache: Path, tmp_path: Path, mixed: Path, table: dict[str, Any]
) -> None:
    run(config_of(cache, tmp_path / "alone", [table]))
    name = table["name"]
    assert learnt_by_sae(tmp_path / "alone") == {name: learnt_by_sae(mixed)[name]}
    sae = SAE.load(mixed / f"{name}.safetensors")
    assert sae.activation == table.get("activation", "relu")
    assert sae.n_latents == table.get("n_latents", 20)


def test_what_a_mixed_run_reports(mixed: Path) -> None:
    results = json.loads((mixed / "results.json").read_text())
    found = [
        tuple(result[key] for key in ("sae", "kind", "activation", "n_latents", "target_l0"))
        for result in results["runs"]
    ]
    assert found == [
        ("a", "matryoshka", "relu", 20, 3.0),
        ("b", "vanilla", "batchtopk", 28, 4.5),
        ("c", "matryoshka", "topk", 20, 2.0),
        ("d", "matryoshka", "jumprelu", 300, 3.0),
    ]
    assert results["dropped"] == {}
    assert [table["name"] for table in results["config"]["members"]] == ["a", "b", "c", "d"]
    assert SAE.load(mixed / "c.safetensors").about["widths"] == [5, 20]
    for name, k in (("b", 4.5), ("c", 2.0)):  # the trainer's own choice is of k a sample
        (result,) = (result for result in results["runs"] if result["sae"] == name)
        assert result["final_l0"] == pytest.approx(k, abs=0.01)


@pytest.mark.processes
@pytest.mark.parametrize(("moment", "nth"), [("step", 37), ("half written", 3)])
def test_a_mixed_run_that_is_killed_ends_at_the_same_bytes(
    cache: Path, tmp_path: Path, mixed: Path, moment: str, nth: int
) -> None:
    config = config_of(cache, tmp_path / "out", MIXED)
    kill(config, moment, nth)
    results = run(resumed(config))
    assert learnt_by_sae(tmp_path / "out") == learnt_by_sae(mixed)
    assert results["runs"] == json.loads((mixed / "results.json").read_text())["runs"]


def test_a_file_of_members_that_was_changed_is_not_gone_on_with(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    kill(config_of(cache, out, [{"name": "a", "lr": 0.01}]), "step", 20)
    config = config_of(cache, out, [{"name": "a", "lr": 0.02}])
    before = contents(out)
    said = refused(resumed(config), capsys)
    assert "is from a run with other SAEs than --members asks for" in said
    assert contents(out) == before
    config_of(cache, tmp_path / "moved", [{"lr": 0.01, "name": "a"}])  # the same, elsewhere
    moved = config_for(cache, out, members=str(tmp_path / "moved.json"))
    assert run(resumed(moved))["runs"]


# ---------------------------------------------------------------------------------- one diverges


@pytest.mark.parametrize(  # killed before the drop is in a checkpoint, after, and not at all
    "nth", [5, 40, pytest.param(None, marks=pytest.mark.slow)]
)
def test_an_sae_that_diverges_is_dropped_and_the_others_go_on(
    cache: Path,
    tmp_path: Path,
    mixed: Path,
    capsys: pytest.CaptureFixture[str],
    nth: int | None,
) -> None:
    config = config_of(cache, tmp_path / "out", [MIXED[0], WILD, *MIXED[1:]])
    if nth is not None:
        kill(config, "step", nth)
    capsys.readouterr()
    train_tinystories.main(argv_for(resumed(config)))
    printed = capsys.readouterr()
    assert "dropped" not in printed.out
    said = [line for line in printed.err.splitlines() if "warning: dropped:" in line]
    assert len(said) == 1
    assert "the wild SAE has an FVU of" in said[0]
    out = tmp_path / "out"
    assert learnt_by_sae(out) == learnt_by_sae(mixed)
    results = training_results(out)
    assert list(results["dropped"]) == ["wild"]
    assert "Try a lower --lr" in results["dropped"]["wild"]
    assert [result["sae"] for result in results["runs"]] == ["a", "b", "c", "d"]
    assert list(load_saes(out, torch.device("cpu"), results)) == ["a", "b", "c", "d"]
    steps, curves = training_curves(out / METRICS, results["dropped"])
    assert (steps, list(curves)) == (list(range(1, 51)), ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="a line for each SAE and step"):
        training_curves(out / METRICS)
    assert run(resumed(config)) == results, "it is finished"


def test_where_all_diverge_there_is_nothing_to_go_on_with(cache: Path, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path / "out", [WILD, WILD | {"name": "wilder"}])
    with pytest.raises(UserError, match=r"the wild SAE has .*the wilder SAE has"):
        run(config)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_run_of_which_one_was_dropped_is_evaluated(tmp_path: Path) -> None:
    folder = run_factory.write_run(tmp_path)
    (folder / "saes.json").write_text(json.dumps({"sae": [{"name": "good"}, WILD]}))
    settings: dict[str, Any] = {"n_latents": 40, "target_l0": 5.0, "n_steps": 30, "device": "cpu"}
    config = train.Config(
        cache=str(folder / "train"),
        members=str(folder / "saes.json"),
        batch_size=256,
        out=str(folder / "dropped"),
        **settings,
    )
    assert list(run(config)["dropped"]) == ["wild"]
    evaluated = evaluate.run(
        evaluate.Config(run=config.out, cache=str(folder / "validation"), device="cpu")
    )
    assert "good" in json.dumps(evaluated)
    assert "wild" not in json.dumps(evaluated)
    assert list(folder.rglob("dropped/**/training_curves.png"))


# ------------------------------------------------------------------------------ held-out figures


def test_held_out_figures_are_what_a_recomputation_gives(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "N_VALIDATION", 700)
    other = write_cache(tmp_path / "other", 2_000, seed=1)
    results = run(config_of(cache, tmp_path / "out", MIXED, validation_cache=str(other)))
    x = ActivationCache(other).acts(0, 700)
    last = records_of(tmp_path / "out")[-4:]
    for record, result in zip(last, results["runs"], strict=True):
        acts = (sae := SAE.load(tmp_path / "out" / f"{result['sae']}.safetensors")).encode(x)
        l0 = (acts > 0).double().sum(1).mean().item()
        for key, value in (("fvu", fvu(x, sae.decode(acts)).item()), ("l0", l0)):
            assert record[f"validation_{key}"] == pytest.approx(value, rel=1e-5)
            assert result[f"validation_{key}"] == record[f"validation_{key}"]


def test_a_look_at_held_out_activations_changes_nothing_that_is_learnt(
    cache: Path, tmp_path: Path, mixed: Path
) -> None:
    other = write_cache(tmp_path / "other", 500, seed=1)
    run(config_of(cache, tmp_path / "out", MIXED, validation_cache=str(other)))
    ours, theirs = learnt_by_sae(tmp_path / "out"), learnt_by_sae(mixed)
    assert {name: data for name, (data, _) in ours.items()} == {
        name: data for name, (data, _) in theirs.items()
    }


def with_recipe(folder: Path, **recipe: Any) -> Path:
    """The cache `folder`, whose manifest says so of where it is from."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["make"] |= recipe
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def damaged(folder: Path) -> Path:
    flip(folder / "00000.acts")
    return folder


def test_activations_of_something_else_are_no_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"model": "m", "layer": 3, "weights_hash": "ab"}
    cache = with_recipe(write_cache(tmp_path / "cache", 1_000), **same)
    layer = with_recipe(write_cache(tmp_path / "layer", 500), **same | {"layer": 4})
    site = with_recipe(write_cache(tmp_path / "site", 500), **same, site="mlp_out")
    model = with_recipe(write_cache(tmp_path / "model", 500), **same | {"weights_hash": "cd"})
    wide = with_recipe(write_cache(tmp_path / "wide", 500, d_model=13), **same)
    broken = damaged(with_recipe(write_cache(tmp_path / "broken", 500), **same))
    for other, said in (
        (layer, "its layer is 4, expected 3"),
        (site, "its site is mlp_out, expected resid_pre"),
        (model, "its weights_hash is cd, expected ab"),
        (wide, "its d_model is 13, expected 12"),
        (broken, "shard 00000 is damaged"),
        (tmp_path / "nowhere", "nowhere holds no finished cache"),
    ):
        config = config_for(cache, tmp_path / "out", validation_cache=str(other))
        assert said in refused(config, capsys)
        assert not contents(tmp_path / "out") if (tmp_path / "out").exists() else True


# ------------------------------------------------------------------------------------- the recipes


def test_the_papers_recipe_is_what_it_says() -> None:
    """Bussmann et al. 2025, section 4: nothing of it is changed without this being seen."""
    config = parse(Config, "", ["--recipe", "paper"], RECIPES)
    assert (config.activation, config.auxiliary) == ("batchtopk", "all")
    assert (config.lr, config.batch_size) == (3e-4, 2048)
    assert config.widths_of(3072) == [96, 288, 672, 1440, 3072]
    assert config.width_weights == ()
    changed = {"recipe", "activation", "auxiliary", "lr", "batch_size", "widths"}
    plain = parse(Config, "", [], RECIPES)
    assert plain == Config()
    assert {name for name, v in config.as_json().items() if plain.as_json()[name] != v} == changed


@pytest.mark.parametrize("flags_first", [True, False])
def test_a_flag_that_is_given_counts_more_than_the_recipe(flags_first: bool) -> None:
    flags = ["--lr", "0.001", "--widths", "0.5", "1", "--activation", "relu"]  # 0.001: the default
    named = ["--recipe", "paper"]
    argv = [*flags, *named] if flags_first else [*named, *flags]
    config = parse(Config, "", argv, RECIPES)
    assert (config.lr, config.widths, config.activation) == (1e-3, (0.5, 1.0), "relu")
    assert (config.batch_size, config.auxiliary) == (2048, "all")


def test_the_unhedged_recipe_is_the_papers_but_for_that() -> None:
    paper, unhedged = (
        parse(Config, "", ["--recipe", name], RECIPES) for name in ("paper", "unhedged")
    )
    assert unhedged == dataclasses.replace(paper, recipe="unhedged", unhedged=0.5)


@pytest.mark.parametrize("recipe", ["paper", "unhedged"])
def test_a_recipe_trains(cache: Path, tmp_path: Path, recipe: str) -> None:
    flags = ["--n-latents", "64", "--n-steps", "20", "--batch-size", "128", "--device", "cpu"]
    flags += ["--target-l0", "3", "5", "--cache", str(cache), "--out", str(tmp_path / "out")]
    train.main(["--recipe", recipe, *flags])
    names = [f"{kind}_l0_{target}" for target in (3, 5) for kind in ("matryoshka", "vanilla")]
    results = training_results(tmp_path / "out")
    assert [result["sae"] for result in results["runs"]] == names
    assert [result["target_l0"] for result in results["runs"]] == [3.0, 3.0, 5.0, 5.0]
    for name in names:
        sae = SAE.load(tmp_path / "out" / f"{name}.safetensors")
        assert sae.activation == "batchtopk"
        assert sae.about["widths"] == ([2, 6, 14, 30, 64] if "matryoshka" in name else [])


def test_batchtopk_fires_as_often_as_asked_on_what_it_has_not_seen(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", 30_000, d_model=24, n_features=96)
    settings = {"n_latents": 64, "activation": "batchtopk", "batch_size": 128, "tokens": 20_000}
    settings |= {"target_l0": 6.0, "n_steps": 400, "widths": (0.25, 1.0), "checkpoint_every": 400}
    results = run(config_for(cache, tmp_path / "out", **settings))
    x = ActivationCache(cache).acts(20_000, 30_000)
    for result in results["runs"]:
        acts = SAE.load(tmp_path / "out" / f"{result['sae']}.safetensors").encode(x)
        assert result["target_l0"] == 6.0
        assert (acts > 0).double().sum(1).mean().item() == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("n_saes", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("value", [0.03, 12.345, 5e7])
def test_the_bar_fits_whatever_the_number_of_saes(n_saes: int, value: float) -> None:
    records = [
        {"sae": f"matryoshka_l0_{i}", "fvu": value, "l0": 3072.0, "step": 7} for i in range(n_saes)
    ]
    said = bar_text(records)
    assert len(said) <= BAR_WIDTH
    assert len("100% 1:23:45<1:23:45, " + said) <= 80
    if n_saes == 8 and value < 1:
        assert said == "FVU " + " ".join([".030"] * 8)
