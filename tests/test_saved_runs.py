"""What is read of a run's folder: any SAEs, in order, of this run; what they were trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from run_factory import D_MODEL, write_cache, write_run
from tiny_factory import write_model

from matryoshka import convert
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.sae_files import FORMAT
from matryoshka.saved_runs import (
    check_cache,
    checksums_used,
    file_sha256,
    is_held_out,
    load_sae,
    load_saes,
    refit_of,
    trained_shards,
    training_curves,
    training_results,
)
from sae import SAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run's folder."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def names_in(folder: Path) -> list[str]:
    return list(load_saes(folder, CPU, training_results(folder)))


def rewrite_results(run: Path, change: Any) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))


def new_sae(folder: Path, name: str, about: dict[str, Any] | None = None) -> Path:
    sae = SAE(D_MODEL, 40, seed=5)
    sae.about = about or {}
    sae.save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


# ---------------------------------------------------------------------------------------- the SAEs


def test_saes_are_what_the_folder_holds_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "a[1]?"  # a folder's name is no pattern
    folder.mkdir()
    for name in ("vanilla", "beta", "alpha k=3"):
        new_sae(folder, name)
    for name in (".half-written.safetensors", "checkpoint.safetensors", "notes.txt"):
        (folder / name).write_text("not an SAE")
    saes = load_saes(folder, CPU, {})
    assert list(saes) == ["alpha k=3", "beta", "vanilla"]
    assert all(not p.requires_grad for sae in saes.values() for p in sae.parameters())


def test_saes_are_in_the_order_of_results_json(run, capsys):
    assert names_in(run) == ["matryoshka", "vanilla"]
    rewrite_results(run, lambda results: results["runs"].reverse())
    assert names_in(run) == ["vanilla", "matryoshka"]
    assert capsys.readouterr().err == ""


def test_an_older_runs_file_is_left_out(run, capsys):
    rewrite_results(run, lambda results: results["runs"].pop(0))
    assert names_in(run) == ["vanilla"]
    error = capsys.readouterr().err
    assert f"not scored: {run / 'matryoshka.safetensors'} is not of this run" in error


def test_a_file_that_is_not_the_one_recorded_is_refused(run, capsys):
    new_sae(run, "matryoshka")
    with pytest.raises(UserError, match=r"matryoshka.safetensors is not the file .* checksum"):
        names_in(run)
    rewrite_results(run, lambda results: [sae.pop("file_sha256") for sae in results["runs"]])
    assert names_in(run) == ["matryoshka", "vanilla"]  # older results have no checksums
    (run / "matryoshka.safetensors").unlink()
    assert names_in(run) == ["vanilla"]
    assert f"{run / 'matryoshka.safetensors'} is missing" in capsys.readouterr().err
    rewrite_results(run, lambda results: results["runs"].pop())
    with pytest.raises(UserError, match="holds no SAE of the run that its"):
        names_in(run)


def test_refits_of_the_runs_saes_follow_them(run, capsys):
    digest = file_sha256(run / "vanilla.safetensors")
    of_it = {"refit": {"file_sha256": digest, "acts_sha256": []}}
    of_another = {"refit": {"file_sha256": "0" * 64, "acts_sha256": []}}
    new_sae(run, "a_refit", of_it)
    new_sae(run, "b_refit", of_another)
    new_sae(run, "c", {"refit": "yes"})
    assert names_in(run) == ["matryoshka", "vanilla", "a_refit"]
    error = capsys.readouterr().err.splitlines()
    assert [line.split("/")[-1].split()[0] for line in error] == [
        "b_refit.safetensors",
        "c.safetensors",
    ]


def test_a_folder_without_saes_is_refused(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_text("")
    with pytest.raises(UserError, match="holds no SAEs"):
        load_saes(tmp_path, CPU, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saes_of_other_formats_are_float32(tmp_path, dtype):
    SAE(D_MODEL, 8, seed=1).to(dtype).save(tmp_path / "one.safetensors")
    sae = load_saes(tmp_path, CPU, {})["one"]
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(sae.W_enc, SAE(D_MODEL, 8, seed=1).to(dtype).float().W_enc)


def test_a_file_of_format_1_has_no_metadata_and_still_loads(tmp_path):
    sae = SAE(D_MODEL, 8, seed=1)
    safetensors.torch.save_file(sae.state_dict(), tmp_path / "old.safetensors")
    found, digest = load_sae(tmp_path / "old.safetensors", CPU)
    assert torch.equal(found.W_dec, sae.W_dec)
    assert digest == file_sha256(tmp_path / "old.safetensors")


def test_files_that_are_no_sae_of_this_format_are_refused_with_their_name(tmp_path):
    path = tmp_path / "one.safetensors"
    sae = SAE(D_MODEL, 8)
    stack = {name: tensor[None] for name, tensor in sae.state_dict().items()}
    later = {"sae": json.dumps({"format": FORMAT + 1})}
    for write, named in (
        (lambda: path.write_text("{"), "not a safetensors file"),
        (lambda: safetensors.torch.save_file(stack, path), "W_enc"),
        (lambda: safetensors.torch.save_file(sae.state_dict(), path, later), "format must be"),
        (lambda: SAE(D_MODEL, 1).save(path), "1 latents; at least 2"),
        (lambda: [path.unlink(), path.mkdir()], "holds no SAE"),
    ):
        write()
        with pytest.raises(UserError, match=named) as error:
            load_sae(path, CPU)
        assert str(path) in str(error.value)
    SAE(D_MODEL, 2).save(tmp_path / "two.safetensors")
    load_sae(tmp_path / "two.safetensors", CPU)


@pytest.mark.parametrize("about", [{}, {"refit": 3}, {"refit": {}}, {"refit": {"acts_sha256": 3}}])
def test_what_else_an_about_may_hold_is_no_refit(about):
    sae = SAE(D_MODEL, 8)
    sae.about = about
    assert refit_of(sae) == {}


# ------------------------------------------------------------------------ results.json and curves


def test_a_run_without_results_json_has_none(tmp_path):
    assert training_results(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"step"',
        "[]",
        "null",
        "[" * 100_000,
        "\xff",
        '{"config": {"target_l0": 1}, "cache": {"make": {}}, "runs": []}',
        '{"config": {"target_l0": "a", "cache": ""}, "cache": {"make": {}}, "runs": []}',
        '{"config": {"target_l0": 1, "cache": ""}, "cache": {}, "runs": []}',
        '{"config": {"target_l0": 1, "cache": ""}, "cache": {"make": 3}, "runs": []}',
        '{"config": {"target_l0": 1, "cache": ""}, "cache": {"make": {}}, "runs": [3]}',
        '{"config": {"target_l0": 1, "cache": ""}, "cache": {"make": {}}, "runs": [{"sae": 3}]}',
    ],
)
def test_foreign_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"results.json is damaged, or was not written by train"):
        training_results(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step"',
        "[1, 2]\n",
        "\xff",
        '{"sae": "vanilla", "step": 1, "l0": "a", "fvu": 1, "sparsity_weight": 1}\n',
        '{"sae": "vanilla", "step": 1, "l0": 1, "fvu": 1}\n',
    ],
)
def test_foreign_metrics_are_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        training_curves(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("read", "name"),
    [(training_results, "results.json"), (lambda p: training_curves(p / "metrics.jsonl"), "metri")],
)
def test_a_folder_where_a_file_should_be_is_refused(tmp_path, read, name):
    (tmp_path / "results.json").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=f"{name}.* cannot be read"):
        read(tmp_path)


def test_curves_are_those_of_each_sae_and_no_line_is_missing(tmp_path):
    path, names = tmp_path / "metrics.jsonl", ["b", "a", "c"]
    lines = [
        json.dumps({"sae": name, "step": step, "l0": step + i, "fvu": 0.5, "sparsity_weight": i})
        for step in (1, 11, 21)
        for i, name in enumerate(names)
    ]
    path.write_text("\n".join(lines))
    steps, curves = training_curves(path)
    assert steps == [1, 11, 21]
    assert list(curves) == names
    assert curves["c"] == {"l0": [3, 13, 23], "fvu": [0.5] * 3, "sparsity_weight": [2.0] * 3}
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="a line for each SAE and step"):
        training_curves(path)


# ------------------------------------------------------------------------ what was trained on


def test_a_cache_was_trained_on_by_its_content_however_its_path_is_spelled(made, tmp_path):
    trained = training_results(made / "run")
    acts = trained["cache"].pop("acts_sha256")  # older results have no checksums
    assert acts == [shard.acts_sha256 for shard in ActivationCache(made / "train").shards]

    def held_out(folder: Path, **recipe: Any) -> bool | None:
        cache = ActivationCache(folder)
        cache.recipe.update(recipe)
        return is_held_out(cache, {}, trained)

    assert held_out(made / "validation") is True
    assert held_out(made / "train") is False
    assert held_out(made / "train", dataset="elsewhere", split="other") is False  # by checksums
    spelled = str(made / "train" / ".." / ".." / made.name)
    assert held_out(made / "validation", dataset=spelled, split="train") is False
    (tmp_path / "link").symlink_to(made)
    assert held_out(made / "validation", dataset=str(tmp_path / "link"), split="train") is False
    assert held_out(made / "validation", dataset="elsewhere") is True  # no checksum in common

    trained["config"]["cache"] = "gone"
    assert held_out(made / "train", dataset=spelled) is False
    assert held_out(made / "validation") is True  # another split of the same dataset
    assert held_out(made / "train", dataset="elsewhere") is None  # it might be a copy
    trained["cache"]["acts_sha256"] = acts[-1:]
    assert held_out(made / "train", dataset="elsewhere") is False
    assert held_out(made / "validation", dataset="elsewhere") is True
    assert is_held_out(ActivationCache(made / "train"), {}, {}) is None
    del trained["cache"]["make"]["dataset"]
    assert held_out(made / "validation") is True


def test_what_an_sae_was_refitted_on_is_not_held_out(made):
    trained, sae = training_results(made / "run"), SAE(D_MODEL, 8)
    validation = ActivationCache(made / "validation")
    sae.about = {"refit": {"acts_sha256": ["0", validation.shards[-1].acts_sha256]}}
    for results in (trained, {}):
        assert is_held_out(validation, {"plain": SAE(D_MODEL, 8), "refit": sae}, results) is False
    sae.about["refit"]["acts_sha256"] = ["0"]
    assert is_held_out(validation, {"refit": sae}, trained) is True


def test_a_training_cache_that_was_made_anew_since_says_nothing(made):
    trained = training_results(made / "run")
    trained["cache"].pop("acts_sha256")
    shards = {shard.acts_sha256 for shard in ActivationCache(made / "train").shards}
    assert trained_shards(trained) == shards
    trained["cache"]["make"]["layer"] = 7
    assert trained_shards(trained) == set()


def test_only_shards_that_were_used_are_recorded(made):
    cache = ActivationCache(made / "train")
    checksums = [shard.acts_sha256 for shard in cache.shards]
    first = cache.shards[0].n_tokens
    assert checksums_used(cache) == checksums
    for n_tokens, n_shards in ((1, 1), (first, 1), (first + 1, 2)):
        assert checksums_used(ActivationCache(cache.folder, n_tokens)) == checksums[:n_shards]


def test_a_cache_that_does_not_fit_is_refused(made, tmp_path):
    trained = training_results(made / "run")
    saes = load_saes(made / "run", CPU, trained)
    check_cache(ActivationCache(made / "validation"), saes, trained)
    check_cache(ActivationCache(made / "validation"), saes, {})
    first_row = int((ActivationCache(made / "validation").tokens(0, 99)[1] == 0).sum())
    two_rows = write_cache(made, "validation", tokens=first_row + 1, out=str(tmp_path / "two"))
    check_cache(ActivationCache(two_rows), saes, trained)
    write_model(tmp_path / "wide.pt", d_model=32, d_mlp=24)
    write_model(tmp_path / "other.pt", d_model=D_MODEL, d_mlp=24, seed=9)
    for changed, named in (
        ({"layer": 0}, "its layer is 0, expected 1"),
        ({"model": str(tmp_path / "other.pt")}, "its weights_hash is"),
        ({"tokens": 3}, "holds 1 rows: too few for two halves"),
        ({"model": str(tmp_path / "wide.pt")}, "the matryoshka SAE's d_model is 16, that of .* 32"),
    ):
        out = tmp_path / named[:9]
        folder = write_cache(made, "validation", out=str(out), **changed)
        with pytest.raises(UserError, match=named):
            check_cache(ActivationCache(folder), saes, trained)
        shutil.rmtree(out)


def test_folders_of_other_tools_are_saes_of_a_folder_or_the_folder_itself(tmp_path):
    sae = SAE(D_MODEL, 8, seed=1).requires_grad_(False)
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for target in convert.TARGETS:
        convert.export(sae, target, tmp_path / target, x)
    sae.save(tmp_path / "ours.safetensors")
    saes = load_saes(tmp_path, CPU, {})
    assert list(saes) == ["ours", "dictionary-learning", "saelens"]
    for found in saes.values():
        torch.testing.assert_close(found(x), sae(x))
    assert list(load_saes(tmp_path / "saelens", CPU, {})) == ["saelens"]
