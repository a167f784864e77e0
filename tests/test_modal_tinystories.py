"""The comparison on Modal, tried without it: flags, declarations, and every body on a folder.

No account, no network: functions run here with `.local()`, a temporary folder is the Volume.
"""

import ast
import dataclasses
import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import modal
import pytest
import torch
from tiny_factory import write_dataset, write_model

import cache_activations
import evaluate
import modal_tinystories
import train
import train_tinystories
from matryoshka import cache_config, cache_writer, modal_plan, volume_caches
from matryoshka.cache_config import CacheConfig
from matryoshka.errors import UserError
from matryoshka.token_rows import count_rows
from matryoshka.training import Training
from matryoshka.volume_caches import CacheJob, folder_of
from modal_tinystories import Config, Refused, name_of

ROOT = Path(__file__).parents[1]
N_ROWS, TOKENS, VALIDATION = 90, 4_000, 800


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model.pt")
    write_dataset(folder, N_ROWS, seed=1)
    write_dataset(folder, 30, split="validation", seed=2)
    return folder


def config_for(data: Path, at: Path, **settings: Any) -> Config:
    """A comparison of seconds: two layers, 32 dimensions, 64 latents, four caching workers."""
    return Config(
        **{
            "model": str(data / "model.pt"),
            "dataset": str(data),
            "tokens": TOKENS,
            "validation_tokens": VALIDATION,
            "layer": 1,
            "dtype": "float32",
            "rows_per_shard": 8,
            "n_latents": 64,
            "n_prefixes": 4,
            "target_l0": 5.0,
            "n_steps": 40,
            "batch_size": 64,
            "checkpoint_every": 15,
            "cache_workers": 4,
            "volume": str(at / "volume"),
            "name": "tiny",
            "out": str(at / "out"),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A whole comparison."""
    config = config_for(data, tmp_path_factory.mktemp("whole"))
    return config, modal_tinystories.run(config)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a tiny comparison."""
    monkeypatch.setattr(modal_tinystories, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def caches(config: Config) -> list[Path]:
    """The folders of the train and the validation cache, as they are named."""
    wanted = [("train", config.tokens), ("validation", config.validation_tokens)]
    return [cache_folder(config, *one) for one in wanted]


def cache_folder(config: Config, split: str, tokens: int) -> Path:
    return folder_of(modal_tinystories.cache_config(config, split, tokens), Path(config.volume))


# ------------------------------------------------------------------------------------- the flags


def test_defaults_are_the_scripts() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(Config)}
    theirs = {f.name: f.default for f in dataclasses.fields(CacheConfig)}
    here = {"split", "batch_size"}  # decided by this script, or not about a cache
    here |= {"site", "model_dtype", "trust_remote_code", *cache_config.OF_TEXT}  # not TinyModel's
    for name in theirs.keys() - here:
        assert ours[name] == theirs[name], name
    theirs = {f.name: f.default for f in dataclasses.fields(train_tinystories.Config)}
    here = {"cache", "tokens", "resume"}
    for name in theirs.keys() - here:
        assert ours[name] == theirs[name], name


def test_every_setting_reaches_its_script() -> None:
    """A setting that is no longer handed on would be silently the script's default."""
    changed = {
        "model": "a/b", "model_revision": "m", "dataset": "c/d", "dataset_revision": "r",
        "tokens": 12_345, "layer": 2, "dtype": "bfloat16", "keep_begin": True,
        "rows_per_shard": 7, "n_latents": 99, "n_prefixes": 5, "target_l0": 3.0, "lr": 0.5,
        "n_steps": 11, "batch_size": 13, "sparsity": "log", "sparsity_weight": 9.0,
        "checkpoint_every": 17,
    }  # fmt: skip
    config = Config(**changed)
    cache = modal_tinystories.cache_config(config, "train", config.tokens)
    training = modal_tinystories.train_config(config, "/v", "cache", "vanilla", 4)
    reached = set()
    for script_config in (cache, training):
        for name, value in changed.items():
            if getattr(script_config, name, None) == value:
                reached.add(name)
    assert reached == set(changed)
    assert (training.saes, training.seed) == (("vanilla",), 4)
    assert (training.resume, training.device) == (True, "auto")


def modal_run(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`modal run modal_tinystories.py ...` with no account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MODAL")}
    env |= {"MODAL_CONFIG_PATH": str(home / "none.toml"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "modal", "run", "modal_tinystories.py", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_needs_no_account(tmp_path: Path) -> None:
    result = modal_run("--help", home=tmp_path)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "usage: modal run modal_tinystories.py" in text
    for field in dataclasses.fields(Config):
        if not field.metadata["is_flag"]:
            assert f"--{field.name} " not in text, field.name
            continue
        assert f"--{field.name.replace('_', '-')} " in text, field.name
        if field.default is not None:
            assert f"(default: {field.default})" in text, field.name


def test_without_a_token_the_plan_and_one_line(tmp_path: Path) -> None:
    result = modal_run("--tokens", "5000000", "--n-steps", "3000", home=tmp_path)
    assert result.returncode != 0
    assert "3 x H100" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Token missing" in line
    assert "modal token new" in line


def test_a_wrong_setting_is_refused_before_modal_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["modal", "run", "--detach", "some/modal_tinystories.py::main", "--gpu", "H1000"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        modal_tinystories.typed()
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --gpu H1000 is none of T4, ")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "TPU"}, "--gpu TPU is none of"),
        ({"tokens": 0}, "--tokens is 0"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"cache_workers": -1}, "--cache-workers is -1"),
        ({"n_prefixes": 4000}, "--n-prefixes 4000 is more than there are latents"),
        ({"tokens": 1000}, "--batch-size 1024 is more than --tokens 1000"),
        ({"layer": -1}, "--layer is -1"),
        ({"name": "../else"}, "--name ../else"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        modal_tinystories.check(Config(**settings))


@pytest.mark.parametrize("settings", [{"volume": "a/b"}, {"model": "./here"}, {"dataset": "/x/y"}])
def test_what_only_modal_cannot_do(settings: dict[str, Any]) -> None:
    modal_tinystories.check(Config(**settings))
    with pytest.raises(UserError):
        modal_tinystories.check_for_modal(Config(**settings))


# -------------------------------------------------------------------------------- what is declared


def declared(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, dict[str, Any]]:
    """What the file asks Modal for, a function each, when `modal run` imports it with `flags`."""
    asked = {}

    def function(self: modal.App, **options: Any) -> Any:
        def keep(body: Any) -> Any:
            asked[body.__name__] = options
            return body

        return keep

    spec = importlib.util.spec_from_file_location(
        "modal_tinystories", ROOT / "modal_tinystories.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modal_tinystories", module)
    monkeypatch.setattr(modal.App, "function", function)
    monkeypatch.setattr(sys, "argv", ["modal", "run", "modal_tinystories.py", *flags])
    spec.loader.exec_module(module)
    return asked


def test_gpus_volumes_timeouts_and_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = declared(monkeypatch)
    assert set(asked) == {"cache_part", "train_one", "compare"}
    assert len({id(options["image"]) for options in asked.values()}) == 1
    for options in asked.values():
        assert {at: v.name for at, v in options["volumes"].items()} == {
            "/volume": "matryoshka-tinystories"
        }
    for name in ("cache_part", "train_one"):
        assert asked[name]["gpu"] == "H100"
        assert asked[name]["retries"].max_retries == 5
        assert asked[name]["timeout"] >= 3600
    assert asked["cache_part"]["max_containers"] == 3
    assert "gpu" not in asked["compare"]
    assert asked["compare"]["nonpreemptible"]
    assert asked["compare"]["timeout"] == 24 * 3600


def test_the_flags_are_what_modal_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = declared(
        monkeypatch, "--gpu=A100-80GB", "--volume=mine", "--cache-workers=7", "--n-steps=10000000"
    )
    assert asked["cache_part"]["gpu"] == asked["train_one"]["gpu"] == "A100-80GB"
    assert asked["cache_part"]["max_containers"] == 7
    assert {o["volumes"]["/volume"].name for o in asked.values()} == {"mine"}
    assert asked["train_one"]["timeout"] > 3600


def test_what_is_sent_to_a_container_can_be_sent() -> None:
    training = modal_tinystories.train_config(Config(), "/v", "cache", "vanilla", 0)
    for value in (
        Config(),
        CacheJob(CacheConfig(), Path("caches/x"), 0, 8),
        modal_tinystories.TrainJob(training, "validation"),
        Refused("no"),
    ):
        assert pickle.loads(pickle.dumps(value)) == value


def test_timeouts_fit_the_work() -> None:
    m = modal_plan
    for what in ("cache", "train"):
        planned = sum(p.seconds for p in m.plan(Config()) if what in p.what)
        assert planned < m.timeout(Config(), what) <= 24 * 3600
        longer = Config(tokens=10**9, n_steps=10**6)
        assert m.timeout(Config(), what) < m.timeout(longer, what) <= 24 * 3600


def test_the_image_holds_every_module_that_is_imported() -> None:
    def imports(name: str) -> set[str]:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        return {name for name in found if (ROOT / f"{name}.py").exists()}

    assert "matryoshka" in modal_tinystories.MODULES

    needed, todo = set(), ["modal_tinystories"]
    while todo:
        new = imports(todo.pop()) - needed
        needed |= new
        todo += new
    assert needed <= set(modal_tinystories.MODULES)


def test_the_plan_fits_three_gpus() -> None:
    phases = modal_plan.plan(Config())
    assert max(p.containers for p in phases if p.on_gpu) == 3
    assert sum(p.kept for p in phases) == pytest.approx(47.4e9, rel=0.01)
    assert any("load it" in p.what for p in phases)
    small = modal_plan.plan(Config(gpu="L4"))
    assert any("stream it" in p.what for p in small)
    assert "GPU-minutes" in modal_plan.plan_text(Config())


# ------------------------------------------------------------------------------- the whole of it


@pytest.mark.usefixtures("no_figures")
def test_the_same_as_the_scripts_alone(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config, results = finished
    alone = []
    for split, tokens in (("train", TOKENS), ("validation", VALIDATION)):
        settings = vars(modal_tinystories.cache_config(config, split, tokens))
        cache_activations.run(cache_activations.Config(**settings, out=str(tmp_path / split)))
        alone.append(tmp_path / split)
    for ours, theirs in zip(caches(config), alone, strict=True):
        assert len(list(theirs.glob("*.acts"))) >= 2
        assert files(ours) == files(theirs)
    for sae in ("matryoshka", "vanilla"):
        made_so = modal_tinystories.train_config(config, config.volume, "", sae, 0)
        out = tmp_path / sae
        train.run(dataclasses.replace(made_so, cache=str(alone[0]), out=str(out), resume=False))
        scores = evaluate.run(evaluate.Config(run=str(out), cache=str(alone[1])))
        ours = Path(config.out) / "tiny" / f"{sae}_seed0"
        assert (ours / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
        assert (ours / f"{sae}.safetensors").read_bytes() == (
            out / f"{sae}.safetensors"
        ).read_bytes()
        (run,) = [run for run in results["runs"] if run["sae"] == sae]
        assert run["evaluation"]["runs"] == scores["runs"]
        assert run["evaluation"]["cross_entropy"] == scores["cross_entropy"]


def test_what_comes_back(finished: tuple[Config, dict[str, Any]]) -> None:
    config, results = finished
    out = Path(config.out) / "tiny"
    assert json.loads((out / "results.json").read_text()) == results
    for figure in ("training_curves", "fvu_by_prefix", "density_histograms"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
    for sae in ("matryoshka", "vanilla"):
        assert {f"{sae}.safetensors", "checkpoint.safetensors", "evaluation.json"} <= set(
            files(out / f"{sae}_seed0")
        )
    text = modal_tinystories.report(config, results)
    for run in results["runs"]:
        (scores,) = run["evaluation"]["runs"]
        assert f"{scores['fvu']:.4f} | {scores['l0']:.2f}" in " ".join(text.split())


@pytest.mark.usefixtures("no_figures")
def test_a_second_comparison_reads_no_token_and_runs_no_model(
    finished: tuple[Config, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, first = finished
    for module, name in (
        *((volume_caches, name) for name in ("count_rows", "finish")),
        *((modal_tinystories, "cache_rows"), (cache_writer, "compute_shard")),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was cached"))
    again = dataclasses.replace(config, name="again", out=str(tmp_path))
    results = modal_tinystories.run(again)
    assert capsys.readouterr().out.count("is complete: no token is read") == 2
    assert [r["evaluation"]["runs"] for r in results["runs"]] == [
        r["evaluation"]["runs"] for r in first["runs"]
    ]
    # The whole thing once more trains nothing either.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it was trained"))
    modal_tinystories.run(again)


@pytest.mark.usefixtures("no_figures")
def test_a_larger_cache_serves_a_smaller_wish(
    finished: tuple[Config, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    config, _ = finished
    volume = tmp_path / "volume"
    shutil.copytree(Path(config.volume) / "caches", volume / "caches")
    smaller = config_for(data, tmp_path, tokens=3_000, n_steps=5, name="smaller")
    results = modal_tinystories.run(smaller)
    assert results["caches"][0] == str(caches(config_for(data, tmp_path))[0])
    exact = config_for(data, tmp_path / "exact", tokens=3_000, n_steps=5, name="smaller")
    other = modal_tinystories.run(exact)
    assert other["caches"][0] != results["caches"][0]
    for sae in ("matryoshka", "vanilla"):
        name = f"smaller/{sae}_seed0/{sae}.safetensors"
        assert (Path(smaller.out) / name).read_bytes() == (Path(exact.out) / name).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_cache_too_large_for_the_gpu_is_trained_on_from_a_copy(
    finished: tuple[Config, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(data, tmp_path, volume=finished[0].volume, name="copied")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(modal_tinystories, "fits_on_gpu", lambda _: False)
    results = modal_tinystories.run(config)
    cache = caches(config)[0]
    assert files(tmp_path / "disk" / cache.name) == files(cache)
    for run in results["runs"]:
        assert run["training"]["config"]["cache"] == str(tmp_path / "disk" / cache.name)
        name = f"{run['sae']}_seed0/{run['sae']}.safetensors"
        whole = Path(finished[0].out) / "tiny" / name
        assert (tmp_path / "out" / "copied" / name).read_bytes() == whole.read_bytes()


def test_a_cache_is_named_by_what_it_is_made_of() -> None:
    def name(**settings: Any) -> str:
        config = Config(**settings)
        made = modal_tinystories.cache_config(config, "train", config.tokens)
        return str(folder_of(made, Path("/v")))

    assert name().startswith("/v/caches/tiny_model.TinyModelTokIds.train.layer3.float16.")
    assert name().endswith(".30000000")
    assert name(lr=1.0, gpu="L4", n_latents=7, name="else", batch_size=9) == name()
    others = [
        {"layer": 2}, {"dtype": "float32"}, {"tokens": 5}, {"model": "a/tiny_model"},
        {"dataset": "b/TinyModelTokIds"}, {"keep_begin": True}, {"model_revision": "x"},
        {"dataset_revision": "x"}, {"rows_per_shard": 3},
    ]  # fmt: skip
    assert len({name(**settings) for settings in others} | {name()}) == 1 + len(others)


def test_the_default_name_is_made_of_what_shapes_an_sae() -> None:
    assert name_of(Config()).startswith("30000000tokens-3072x10-l0_30-30000steps-")
    assert name_of(Config(seeds=3, gpu="L4", cache_workers=1)) == name_of(Config())
    assert name_of(Config(lr=2e-3)) != name_of(Config())
    assert name_of(Config(name="mine")) == "mine"


# ---------------------------------------------------------------------------------------- faults


class Killed(Exception):
    """Stands for a container that is gone in the middle."""


def dies_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The `call`-th call of `module.name` raises."""
    inner, count = getattr(module, name), [0]

    def once(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise Killed("preempted")
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, once)


@pytest.mark.usefixtures("no_figures")
def test_a_caching_worker_that_dies_is_started_again(
    finished: tuple[Config, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(data, tmp_path)
    with monkeypatch.context() as context:
        dies_at(context, cache_writer, "compute_shard", 3)
        with pytest.raises(UserError) as failure:
            modal_tinystories.run(config)
    assert "1 of 5 failed: caching rows 8 to 23 of train: Killed" in str(failure.value)
    assert "preempted. What is finished is kept" in str(failure.value)
    folder = caches(config)[0]
    assert not (folder / "manifest.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.acts")}
    assert before
    modal_tinystories.both_caches(config, Path(config.volume))
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.acts")}
    assert {name: after[name] for name in before} == before, "a finished shard was made again"
    assert [files(f) for f in caches(config)] == [files(f) for f in caches(finished[0])]


@pytest.mark.usefixtures("no_figures")
def test_a_training_worker_that_dies_ends_with_the_same_weights(
    finished: tuple[Config, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(data, tmp_path)
    shutil.copytree(Path(finished[0].volume) / "caches", Path(config.volume) / "caches")
    commits = []
    with monkeypatch.context() as context:
        context.setattr(modal_tinystories, "commit", lambda: commits.append(1))
        dies_at(context, Training, "step", 20)
        with pytest.raises(UserError, match="training matryoshka, seed 0: Killed: preempted"):
            modal_tinystories.run(config)
    assert len(commits) >= 4, "one at each checkpoint"
    left = Path(config.volume) / "runs" / "tiny"
    assert (left / "matryoshka_seed0" / "checkpoint.safetensors").exists()
    assert (left / "vanilla_seed0" / "evaluation.json").exists(), "the other one ended"
    modal_tinystories.run(config)
    for sae in ("matryoshka", "vanilla"):
        name = f"tiny/{sae}_seed0/{sae}.safetensors"
        whole = Path(finished[0].out) / name
        assert (Path(config.out) / name).read_bytes() == whole.read_bytes()


def test_two_runs_at_once_leave_one_good_cache(
    finished: tuple[Config, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Another run's workers finish the same cache between this one's, whose work comes last."""
    config = config_for(data, tmp_path)
    one = modal_tinystories.cache_config(config, "train", TOKENS)
    folder = cache_folder(config, "train", TOKENS)
    folder.mkdir(parents=True)
    n_rows, _ = count_rows(one.token_rows, TOKENS, one.keep_begin, 10_000)
    jobs = [
        CacheJob(one, folder, *rows)
        for rows in cache_writer.split_rows(n_rows, one.rows_per_shard, 4)
    ]
    modal_tinystories.each(modal_tinystories.cache_part, jobs[:2])
    modal_tinystories.both_caches(config, Path(config.volume))  # the other run, from start to end
    modal_tinystories.each(modal_tinystories.cache_part, jobs)
    cache_writer.finish(folder, n_rows)
    assert files(folder) == files(caches(finished[0])[0])


def test_a_damaged_cache_is_named_with_what_to_do(
    finished: tuple[Config, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    config = config_for(data, tmp_path)
    shutil.copytree(Path(finished[0].volume) / "caches", Path(config.volume) / "caches")
    shard = caches(config)[0] / "00001.acts"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError) as failure:
        modal_tinystories.run(config)
    assert "2 of 2 failed: training matryoshka, seed 0:" in str(failure.value)
    assert "shard 00001 is damaged" in str(failure.value)
    assert "delete 00001.*" in str(failure.value)
    for path in caches(config)[0].glob("00001.*"):
        path.unlink()
    modal_tinystories.both_caches(config, Path(config.volume))
    assert files(caches(config)[0]) == files(caches(finished[0])[0])


def test_a_cache_of_other_weights_is_refused(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    """The name is the same: somebody has changed what the model's name stands for."""
    config, _ = finished
    other = cache_config.load_source(
        CacheConfig(model=str(write_model(tmp_path / "model.pt", seed=5)), layer=1),
        torch.device("cpu"),
    )
    wanted = modal_tinystories.cache_config(config, "train", TOKENS)
    folder = cache_folder(config, "train", TOKENS)
    with pytest.raises(UserError, match="its weights_hash is"):
        volume_caches.finished_cache(wanted, folder, cache_writer.recipe_of(wanted, other))


def test_a_copy_of_a_cache_beside_it_changes_nothing(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    """Names are compared, and are no patterns."""
    config, _ = finished
    folder = cache_folder(config, "train", TOKENS)
    for root in ("plain", "a[1]?"):
        there = tmp_path / root / folder.name
        shutil.copytree(folder, there)
        shutil.copytree(folder, there.with_name(f"{there.name}.bak"))
        smaller = there.with_name(f"{there.stem}.3")
        assert volume_caches.larger_caches(smaller) == [there]


def test_a_name_is_for_one_comparison(
    finished: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config = dataclasses.replace(finished[0], lr=0.5, out=str(tmp_path))
    with pytest.raises(UserError, match=r"--name tiny was a comparison with --lr 0.001, not 0.5"):
        modal_tinystories.run(config)


def test_a_refusal_is_a_value_so_that_nothing_retries_it(data: Path, tmp_path: Path) -> None:
    job = CacheJob(CacheConfig(model=str(tmp_path / "no.pt")), tmp_path, 0, 8)
    with pytest.warns(UserWarning, match="executing locally"):
        outcome = modal_tinystories.cache_part.local(job)
    assert isinstance(outcome, Refused)
    with pytest.raises(UserError, match=r"modal volume rm -r vol PATH"):
        modal_tinystories.checked(Config(volume="vol"), Refused("/volume/caches/x is damaged"))


# ---------------------------------------------------------------------------- Modal's own, faked


class FakeVolume:
    """Lists and reads a folder as `modal.Volume` does."""

    def __init__(self, folder: Path):
        self.folder = folder

    def listdir(self, path: str, *, recursive: bool) -> list[SimpleNamespace]:
        kinds = modal.volume.FileEntryType  # type: ignore[attr-defined]
        return [
            SimpleNamespace(
                path=str(p.relative_to(self.folder)),
                type=kinds.FILE if p.is_file() else kinds.DIRECTORY,
            )
            for p in sorted((self.folder / path).rglob("*"))
        ]

    def read_file(self, path: str) -> Iterator[bytes]:
        file = io.BytesIO((self.folder / path).read_bytes())
        while chunk := file.read(1000):
            yield chunk


def test_the_entrypoint(
    finished: tuple[Config, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what Modal would have handed back: it downloads, prints the table, says what is left."""
    config, results = finished
    there = json.loads(json.dumps(results).replace(config.volume, "/volume"))
    remote = SimpleNamespace(remote=lambda config, root: there)
    monkeypatch.setattr(modal_tinystories, "compare", remote)
    monkeypatch.setattr(modal_tinystories, "volume", FakeVolume(Path(config.volume)))
    modal_tinystories.main("--name", "tiny", "--out", str(tmp_path), "--volume", "vol")
    source = Path(config.volume) / "runs" / "tiny"
    copied = {p.relative_to(tmp_path / "tiny"): p.read_bytes() for p in tree(tmp_path / "tiny")}
    assert copied == {p.relative_to(source): p.read_bytes() for p in tree(source)}
    printed = capsys.readouterr().out
    assert "matryoshka" in printed
    assert "modal volume get vol" in printed
    assert "modal volume delete vol" in printed


def tree(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "outcome", [Refused("caching rows 0 to 7 of train: no"), modal.exception.RemoteError("no")]
)
def test_the_entrypoint_fails_in_one_line(
    outcome: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def remote(config: Config, root: str) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(modal_tinystories, "compare", SimpleNamespace(remote=remote))
    with pytest.raises(SystemExit) as exit_:
        modal_tinystories.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_downloads_stay_in_their_folder(tmp_path: Path) -> None:
    kind = modal.volume.FileEntryType.FILE  # type: ignore[attr-defined]
    entry = SimpleNamespace(path="elsewhere/file", type=kind)
    volume = SimpleNamespace(listdir=lambda path, recursive: [entry])
    with pytest.raises(ValueError, match="elsewhere"):
        modal_tinystories.download(volume, PurePosixPath("runs/x"), tmp_path)
