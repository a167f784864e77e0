"""evaluate.py from end to end, on a small run; its pieces have tests of their own."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_factory import (
    CONCEPTS,
    D_MODEL,
    LAYER,
    damage_shard,
    members_of,
    rewrite_acts,
    write_cache,
    write_run,
)
from tiny_factory import write_dataset, write_model

import evaluate
from matryoshka import reconstruction
from matryoshka.absorption import choose_detectors, count_absorbed, halves
from matryoshka.array_files import cache_arrays
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.evaluation_tables import report, summary
from matryoshka.loss_recovered import ROWS_AT_ONCE, splice_losses
from matryoshka.metrics import dead_share, decoder_cosines, density_histogram, fvu, l0
from matryoshka.sources import TokenBlock
from matryoshka.tiny_model import BEGIN, PAD, TinyModel
from matryoshka.token_rows import kept_positions
from sae import SAE

AT_ONCE = 100  # activations: several batches, the last one short


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("made"))


def config_for(made: Path, to: Path, **changed: Any) -> evaluate.Config:
    usual: dict[str, Any] = {
        "run": str(made / "run"),
        "cache": str(made / "validation"),
        "concepts": str(made / "concepts.json"),
        "min_precision": 0.3,  # low enough that something is absorbed
        "out": str(to),
        "device": "cpu",
    }
    return evaluate.Config(**{**usual, **changed})


@pytest.fixture(scope="module")
def scored(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `run` returned; its files are in the folder that its config names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BATCH_SIZE", AT_ONCE)
        patch.setattr(reconstruction, "BATCH_SIZE", AT_ONCE)
        return evaluate.run(config_for(made, tmp_path_factory.mktemp("scored")))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a small evaluation."""
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)


def encoded(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """In the batches of a run: what is just above 0 in another is not the same on every CPU."""
    return torch.cat([sae.encode(part) for part in x.split(AT_ONCE)]).detach()


def load(made: Path, result: dict[str, Any]) -> SAE:
    return SAE.load(made / "run" / f"{result['sae']}.safetensors").requires_grad_(False)


def test_a_run_scores_as_the_pure_functions_do(made, scored):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    assert len(x) == scored["cache"]["n_tokens"] > 500
    assert [r["sae"] for r in scored["runs"]] == ["matryoshka", "vanilla"]
    for result in scored["runs"]:
        sae = load(made, result)
        acts = encoded(sae, x)
        assert result["fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-5)
        assert result["l0"] == pytest.approx(l0(acts).item())
        assert result["dead_share"] == pytest.approx(dead_share(acts).item())
        assert result["density_histogram"] == density_histogram((acts > 0).sum(0), len(x))
        by_prefix = result["fvu_by_prefix"]
        assert by_prefix["prefix"] == [1, 2, 4, 8, 16, 32, 40]
        for prefix, value in zip(*by_prefix.values(), strict=True):
            assert value == pytest.approx(fvu(x, sae.decode(acts, prefix)).item(), rel=1e-5)
        cosines = decoder_cosines(sae.W_dec, sae.W_dec).fill_diagonal_(-1).amax(1)
        assert result["mean_highest_cosine"] == pytest.approx(cosines.mean().item())
        for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
            assert result["highest_cosine_quantiles"][str(share)] == pytest.approx(
                cosines.quantile(share).item()
            )
        assert result["fvu_without_outliers"] == result["fvu"]
    assert scored["norms"]["outliers"] == 0


def test_a_runs_absorption_is_of_the_other_half(made, scored):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    tok_ids, rows, _ = cache.tokens(0, cache.n_tokens)
    first = halves(61, seed=0)[rows]
    member = members_of(CONCEPTS.values(), tok_ids)
    for result in scored["runs"]:
        fires = encoded(load(made, result), x) > 0
        chosen = choose_detectors(
            fires[first].sum(0),
            member[:, first].double() @ fires[first].double(),
            member[:, first].sum(1),
            min_precision=0.3,
        )
        counts = count_absorbed(fires[~first], member[:, ~first], chosen)
        frequent, end, absent = result["concepts"]
        for i, concept in enumerate((frequent, end)):
            n, missed, absorbed = (int(c[i]) for c in counts)
            assert concept["tokens"] == n > 0
            assert concept["tokens_chosen_on"] == int(member[i, first].sum())
            assert concept["detector"] == int(chosen.latent[i])
            assert concept["miss_rate"] == pytest.approx(missed / n)
            assert concept["absorption"] == pytest.approx(absorbed / n)
        assert absent["tokens"] == 0
        assert absent["absorption"] is None
        mean = (frequent["absorption"] + end["absorption"]) / 2
        assert result["absorption"] == pytest.approx(mean)
    # There was something to get wrong: tokens that are missed, and of those some absorbed.
    assert 0 < frequent["absorption"] < frequent["miss_rate"] < 1


def test_a_runs_cross_entropy_is_that_of_splicing_into_all_rows_at_once(made, scored):
    """With the mean over the cache, at its layer; `splice_losses` has its own tests."""
    tok_ids = np.array(rows_in(made / "validation.jsonl"))
    rows = TokenBlock(0, tok_ids, kept_positions(tok_ids, keep_begin=False))
    cache = ActivationCache(made / "validation")
    mean = cache.acts(0, cache.n_tokens).double().mean(0)
    saes = [load(made, result) for result in scored["runs"]]
    model = TinyModel.from_pretrained(made / "model.pt")
    expected = splice_losses(model, saes, mean, [rows], LAYER)
    found = scored["cross_entropy"]
    for key in ("clean", "mean"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    for key in ("predictions", "replaced"):
        assert found[key] == expected[key]
    assert found["replaced"] == cache.n_tokens
    for i, result in enumerate(scored["runs"]):
        assert result["cross_entropy"] == pytest.approx(expected["saes"][i], rel=1e-6)
        assert result["loss_recovered"] == pytest.approx(expected["recovered"][i], abs=1e-5)


def rows_in(path: Path) -> list[list[int]]:
    return [json.loads(line)["tok_ids"] for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("no_figures")
def test_a_cache_with_begin_is_scored_with_it(made, tmp_path):
    cache = ActivationCache(
        write_cache(made, "validation", keep_begin=True, out=str(tmp_path / "cache"))
    )
    results = evaluate.run(config_for(made, tmp_path / "out", cache=str(cache.folder)))
    assert results["cross_entropy"]["replaced"] == cache.n_tokens
    rows = rows_in(made / "validation.jsonl")
    assert cache.n_tokens == sum(token != PAD for row in rows for token in row)


def test_what_a_run_writes_and_prints(scored):
    out = Path(scored["config"]["out"])
    figures = {"fvu_by_prefix.png", "density_histograms.png", "training_curves.png"}
    assert {path.name for path in out.iterdir()} == {"evaluation.json", *figures}
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(scored))
    assert scored["cache"]["held_out"] is True
    assert scored["seconds"] > 0
    assert "commit" in scored["environment"]
    assert f"{scored['runs'][0]['fvu']:.4f}" in summary(scored)


def test_any_saes_are_scored_without_training_records_and_on_any_split(made, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(made / "run" / "vanilla.safetensors", run / "one of mine.safetensors")
    SAE(D_MODEL, 3, seed=2).save(run / "small.safetensors")  # SAEs may differ in size
    argv = [f"--run={run}", f"--cache={made / 'train'}", f"--concepts={made / 'concepts.json'}"]
    evaluate.main([*argv, "--device=cpu", "--n-tokens=100"])
    printed = capsys.readouterr().out
    assert "whether trained on is not known" in printed
    assert printed.index("| one of mine ") < printed.index("| small ")
    figures = {"fvu_by_prefix.png", "density_histograms.png"}
    saes = {"one of mine.safetensors", "small.safetensors"}
    assert {path.name for path in run.iterdir()} == {"evaluation.json", *figures, *saes}
    results = json.loads((run / "evaluation.json").read_text())
    # Whole batches of rows: the first that holds 100 tokens is the first.
    rows = rows_in(made / "train.jsonl")[:ROWS_AT_ONCE]
    kept = sum(token not in (BEGIN, PAD) for row in rows for token in row)
    assert results["cross_entropy"]["replaced"] == kept
    assert [len(run["fvu_by_prefix"]["prefix"]) for run in results["runs"]] == [7, 3]

    again = evaluate.run(config_for(made, tmp_path, cache=str(made / "train"), n_tokens=1))
    assert again["cache"]["held_out"] is False
    assert "TRAINED ON" in summary(again)


@pytest.mark.parametrize("missing", ["results.json", "metrics.jsonl"])
def test_training_curves_are_drawn_only_where_training_recorded_them(made, tmp_path, missing):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / missing).unlink()
    results = evaluate.run(config_for(made, tmp_path / "out", run=str(run), n_tokens=1))
    assert len(results["runs"]) == 2
    assert not (tmp_path / "out" / "training_curves.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_the_concepts_that_come_with_the_package_are_the_default(made, tmp_path):
    results = evaluate.run(config_for(made, tmp_path, concepts=None, n_tokens=1))
    assert "female names" in [concept["concept"] for concept in results["runs"][0]["concepts"]]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saes_of_other_formats_are_scored_in_float32(made, tmp_path, dtype):
    sae = SAE.load(made / "run" / "vanilla.safetensors").to(dtype)
    (tmp_path / "run").mkdir()
    sae.save(tmp_path / "run" / "vanilla.safetensors")
    [found] = evaluate.run(config_for(made, tmp_path, run=str(tmp_path / "run")))["runs"]
    x = ActivationCache(made / "validation").acts(0, 10**9).float()
    assert found["fvu"] == pytest.approx(fvu(x, sae.float()(x)).item(), rel=1e-5)


@pytest.mark.usefixtures("no_figures")
def test_fvu_without_the_tokens_that_decide_it_is_said(made, tmp_path):
    """Five tokens of 300 times the norm: they are reconstructed ill, and nothing else counts."""

    def heavy(acts: torch.Tensor) -> torch.Tensor:
        acts[100:105] *= -300
        return acts

    shutil.copytree(made / "validation", tmp_path / "cache")
    cache_path = rewrite_acts(tmp_path / "cache", heavy)
    results = evaluate.run(config_for(made, tmp_path / "out", cache=str(cache_path)))
    cache = ActivationCache(cache_path)
    x = cache.acts(0, cache.n_tokens).float()
    norms = x.double().norm(dim=1)
    keep = norms <= 10 * norms.quantile(0.5)
    assert results["norms"]["outliers"] == int((~keep).sum()) == 5
    assert results["norms"]["max_over_median"] == pytest.approx(
        (norms.max() / norms.quantile(0.5)).item()
    )
    printed = summary(results)
    assert f"FVU IS DECIDED BY 5 OF {len(x):,} TOKENS" in printed
    for result in results["runs"]:
        sae = load(made, result)
        alone = fvu(x[keep], sae(x[keep])).item()
        assert result["fvu_without_outliers"] == pytest.approx(alone, rel=1e-4)
        assert result["fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-4)
        assert result["fvu"] != pytest.approx(alone, rel=0.1)
        assert f"{alone:.4f} {result['sae']}" in printed


# ------------------------------------------------------------- where there is no language model


def arrays_of(made: Path, folder: Path, with_ids: bool) -> str:
    """A cache of the validation cache's activations, as one's own arrays."""
    cache = ActivationCache(made / "validation")
    acts = cache.acts(0, cache.n_tokens)
    ids = [cache.tokens(0, cache.n_tokens)[0]] if with_ids else None
    return str(cache_arrays(folder, [acts], ids, rows_per_shard=500).folder)


@pytest.mark.usefixtures("no_figures")
def test_arrays_are_scored_as_a_models_cache_is_but_for_what_needs_the_model(
    made: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    config = config_for(made, tmp_path, cache=arrays_of(made, tmp_path / "c", with_ids=False))
    results = evaluate.run(config)
    for ours, full in zip(results["runs"], scored["runs"], strict=True):
        for key in ("l0", "dead_share", "density_histogram", "mean_highest_cosine"):
            assert ours[key] == full[key]
        assert ours["fvu"] == pytest.approx(full["fvu"], rel=1e-6)  # in batches of another size
        assert ours["cross_entropy"] is ours["loss_recovered"] is ours["absorption"] is None
    assert results["cross_entropy"] is None
    assert results["left_out"] == {
        "cross_entropy": "the cache was not made with a language model",
        "absorption": "the cache has no token ids",
    }
    assert json.loads((tmp_path / "evaluation.json").read_text())["left_out"]
    assert "|              - |" in report(results)


@pytest.mark.usefixtures("no_figures")
def test_arrays_with_token_ids_have_concepts_of_ids(made: Path, tmp_path: Path) -> None:
    cache = arrays_of(made, tmp_path / "c", with_ids=True)
    results = evaluate.run(config_for(made, tmp_path, cache=cache))
    assert "absorption" not in results["left_out"]
    frequent, _, absent = results["runs"][0]["concepts"]
    assert frequent["tokens"] + frequent["tokens_chosen_on"] > 0
    assert absent["tokens"] == 0
    # Those of concepts.json are TinyModel's, and may be other words here.
    words = evaluate.run(config_for(made, tmp_path, cache=cache, concepts=None))
    assert "--tokenizer" in words["left_out"]["absorption"]
    assert words["runs"][0]["concepts"] == []


@pytest.mark.usefixtures("no_figures")
def test_without_the_model_the_rest_is_the_same(
    made: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    results = evaluate.run(config_for(made, tmp_path, model="none"))
    for ours, full in zip(results["runs"], scored["runs"], strict=True):
        assert ours["cross_entropy"] is None
        assert (ours["l0"], ours["concepts"]) == (full["l0"], full["concepts"])
    assert results["left_out"] == {"cross_entropy": "--model none was asked for"}


def test_a_model_beside_a_cache_of_arrays_is_refused(made: Path, tmp_path: Path) -> None:
    cache = arrays_of(made, tmp_path / "c", with_ids=False)
    config = config_for(made, tmp_path, cache=cache, model=str(made / "model.pt"))
    assert "was not made with a language model" in refused(config)


# ------------------------------------------------------------------------------------- bad input


def refused(config: evaluate.Config) -> str:
    with pytest.raises(UserError) as error:
        evaluate.run(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_settings_and_paths_are_refused(made, tmp_path):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"run": str(tmp_path)}, "holds no SAEs"),
        ({"cache": str(tmp_path)}, "holds no finished cache"),
        ({"n_tokens": 0}, "--n-tokens is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"min_precision": 1.1}, "--min-precision must be between 0 and 1, got 1.1"),
        ({"min_precision": -0.1}, "--min-precision must be between 0 and 1, got -0.1"),
        ({"min_precision": float("nan")}, "--min-precision must be between 0 and 1, got nan"),
        ({"model": "nowhere.pt"}, "nowhere.pt"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"concepts": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"device": "toaster"}, "--device toaster"),
        ({"out": "/dev/null/x"}, "--out /dev/null/x"),
    ]
    for changed, named in bad:
        assert named in refused(config_for(made, tmp_path / "out", **changed))
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_any_precision_between_0_and_1_may_be_asked_for(made, tmp_path, share):
    config = config_for(made, tmp_path, min_precision=share)
    assert len(evaluate.read_inputs(config, torch.device("cpu")).saes) == 2


def test_the_published_figures_are_of_these_defaults():
    config = evaluate.Config()
    assert (config.n_tokens, config.min_precision, config.seed) == (100_000, 0.8, 0)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([3, 10000], "token id 10000 is not in the vocabulary"),
        ([-1], "token id -1, which must be between 0"),
    ],
)
def test_concepts_of_another_vocabulary_are_refused(made, tmp_path, ids, words):
    (tmp_path / "concepts.json").write_text(json.dumps({"concepts": {"a": {"ids": ids}}}))
    config = config_for(made, tmp_path / "out", concepts=str(tmp_path / "concepts.json"))
    assert words in refused(config)


def test_a_model_or_cache_that_does_not_fit_is_refused(made, tmp_path):
    write_model(tmp_path / "other.pt", d_model=D_MODEL, d_mlp=24, seed=9)
    other = config_for(made, tmp_path / "out", model=str(tmp_path / "other.pt"))
    assert "weights_hash" in refused(other)
    cache = write_cache(made, "validation", layer=0, out=str(tmp_path / "layer"))
    named = refused(config_for(made, tmp_path / "out", cache=str(cache)))
    assert "its layer is 0, expected 1" in named


def test_tiny_models_revision_is_loaded_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def locate(name: str, revision: str | None) -> Path:
        asked.append(revision)
        return Path(name)

    monkeypatch.setattr("matryoshka.tiny_model.locate_weights", locate)
    cache = write_cache(made, "validation", out=str(tmp_path / "c"))
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["make"]["model_revision"] = "step3"
    (cache / "manifest.json").write_text(json.dumps(manifest))
    asked.clear()
    evaluate.read_inputs(config_for(made, tmp_path, cache=str(cache)), torch.device("cpu"))
    assert asked == ["step3"]


def test_another_dataset_is_refused(made, tmp_path):
    write_dataset(tmp_path / "other", 61, split="validation", seq=24, seed=2)
    named = refused(config_for(made, tmp_path / "out", dataset=str(tmp_path / "other")))
    assert "tokens differ after the first 0" in named


@pytest.mark.usefixtures("no_figures")
def test_a_dataset_that_was_moved_is_taken_from_where_it_is(made, tmp_path):
    (tmp_path / "moved").mkdir()
    shutil.copy(made / "validation.jsonl", tmp_path / "moved")
    config = config_for(made, tmp_path / "out", dataset=str(tmp_path / "moved"), n_tokens=1)
    assert evaluate.run(config)["cache"]["held_out"] is True


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "vanilla.safetensors"])
def test_a_damaged_run_is_refused(made, tmp_path, name):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_text('{"step"')
    named = refused(config_for(made, tmp_path / "out", run=str(tmp_path / "run")))
    assert str(tmp_path / "run" / name) in named


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_identical_activations_are_refused(made, tmp_path, value):
    shutil.copytree(made / "validation", tmp_path / "cache")
    cache = rewrite_acts(tmp_path / "cache", lambda acts: torch.full_like(acts, value))
    named = refused(config_for(made, tmp_path, cache=str(cache)))
    assert "all the same: FVU is not defined" in named


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused(made, tmp_path, value):
    def spoiled(acts: torch.Tensor) -> torch.Tensor:
        acts[123, 4] = value
        return acts

    shutil.copytree(made / "validation", tmp_path / "cache")
    cache = rewrite_acts(tmp_path / "cache", spoiled)
    named = refused(config_for(made, tmp_path, cache=str(cache)))
    assert "activation 123 is not finite" in named


def test_reconstructions_that_are_not_finite_are_refused(made, tmp_path):
    sae = SAE.load(made / "run" / "vanilla.safetensors").requires_grad_(False)
    sae.W_dec.fill_(3e38)
    (tmp_path / "run").mkdir()
    sae.save(tmp_path / "run" / "vanilla.safetensors")
    named = refused(config_for(made, tmp_path / "out", run=str(tmp_path / "run")))
    assert "reconstructions" in named
    assert "not finite" in named


def test_a_damaged_shard_is_refused(made, tmp_path):
    shutil.copytree(made / "validation", tmp_path / "cache")
    name = damage_shard(tmp_path / "cache", 1)
    named = refused(config_for(made, tmp_path / "out", cache=str(tmp_path / "cache")))
    assert f"shard {name} is damaged" in named


# ------------------------------------------------------------------------------ files, full disks


@pytest.mark.parametrize(
    "name", ["matryoshka.safetensors", "evaluation.json", "training_curves.png", "concepts.json"]
)
def test_a_folder_where_a_file_should_be_is_refused(made, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    monkeypatch.setattr(evaluate, "score", None)  # before anything is computed
    shutil.copytree(made / "run", run)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    changed = {"concepts": str(run / name)} if name == "concepts.json" else {}
    assert str(run / name) in refused(config_for(made, run, run=str(run), **changed))


def test_a_full_disk_is_one_line_and_loses_no_results(made, tmp_path, monkeypatch, capsys):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = [f"--run={made / 'run'}", f"--cache={made / 'validation'}", f"--out={tmp_path}"]
    argv += [f"--concepts={made / 'concepts.json'}", "--device=cpu", "--n-tokens=1"]
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(argv)
    printed, error = capsys.readouterr()
    assert stopped.value.code == 2
    expected = f"error: cannot write {tmp_path / 'evaluation.json'} (No space left on device)"
    assert error.splitlines()[-1] == expected
    assert "| matryoshka" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fvu_by_prefix", "density_histograms", "training_curves"])
def test_a_figure_that_cannot_be_written_is_one_line(made, tmp_path, monkeypatch, capsys, name):
    figure = tmp_path / f"{name}.png"
    argv = [f"--run={made / 'run'}", f"--cache={made / 'validation'}", f"--out={tmp_path}"]
    argv += [f"--concepts={made / 'concepts.json'}", "--device=cpu", "--n-tokens=1"]
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == figure:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(argv)
    assert stopped.value.code == 2
    assert f"error: cannot write {figure}" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "evaluation.json").exists()
