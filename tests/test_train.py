"""The training script: what a run writes, that a kill costs nothing, what it refuses, its L0."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_factory import fresh_processes, write_dataset, write_model

import cache_activations
import train
import train_tinystories
from matryoshka import training, training_report
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import finish, write_shard
from matryoshka.errors import UserError
from matryoshka.files import one_writer
from matryoshka.metrics import fvu
from matryoshka.saved_runs import METRICS, training_curves
from matryoshka.trainer import Trainer
from matryoshka.training import Training, make_trainer, stop_if_diverged
from matryoshka.training_report import bar_text, problems, short
from sae import SAE
from train import run
from train_tinystories import Config

ROOT = Path(__file__).parents[1]
D_MODEL, N_TOKENS = 12, 5_000
WRITTEN = {"matryoshka.safetensors", "vanilla.safetensors", "metrics.jsonl"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the processes that are killed: sums of floats depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_cache(
    folder: Path, n_tokens: int, *, d_model: int = D_MODEL, n_features: int = 48, seed: int = 0
) -> Path:
    """A float32 cache, in 4 shards, of sums of sparse features: 3 of 48 in the mean."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d_model, generator=generator)
    n_rows = -(-n_tokens // 100)
    per_shard = -(-n_rows // 4)
    make = {
        "format": 1,
        "tokens": n_tokens,
        "dtype": "float32",
        "d_model": d_model,
        "rows_per_shard": per_shard,
    }
    for first in range(0, n_rows, per_shard):
        end = min(first + per_shard, n_rows)
        i = np.arange(first * 100, min(end * 100, n_tokens))
        active = torch.rand(len(i), n_features, generator=generator) < 3 / n_features
        sizes = 0.5 + torch.rand(len(i), n_features, generator=generator)
        tokens = np.stack([i % 9000, i // 100, i % 100], axis=1).astype("<i4")
        acts = (active * sizes) @ directions
        write_shard(folder, acts, tokens, (first, end), make)
    finish(folder, n_rows)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", N_TOKENS)


def config_for(cache: Path, out: Path, **settings: Any) -> Config:
    """A run of a moment: several passes, a last record and a last checkpoint out of step."""
    small: dict[str, Any] = {
        "cache": str(cache),
        "out": str(out),
        "n_latents": 20,
        "n_prefixes": 3,
        "target_l0": 3.0,
        "lr": 3e-3,
        "n_steps": 50,
        "batch_size": 128,
        "checkpoint_every": 15,
        "device": "cpu",
    }
    return Config(**{**small, **settings})


def argv_for(config: Config) -> list[str]:
    argv = []
    for name, value in dataclasses.asdict(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            argv += [f"--{flag}", *map(str, value)]
        else:
            argv.append(f"--{flag}={value}")
    return argv


def contents(folder: Path) -> dict[str, bytes]:
    """A folder's files by name, but for the lock, which is empty and stays."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def learnt(folder: Path) -> dict[str, bytes]:
    """What must be the same byte for byte: metrics and weights. The rest holds times.

    Of a safetensors file that is all but its header, in which metadata stand in random order.
    """
    return {
        name: data[8 + int.from_bytes(data[:8], "little") :] if "safetensors" in name else data
        for name, data in contents(folder).items()
        if name in WRITTEN
    }


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(config: Config) -> Config:
    return dataclasses.replace(config, resume=True)


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which the command line refuses `config`, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_tinystories.main(argv_for(config))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(Trainer, "step", never)


def exit_code(target: Callable[..., None], *args: Any, timeout: float = 60) -> int | None:
    """How a process of its own that runs `target` ended. Interrupted, this takes it along."""
    process = fresh_processes().Process(target=target, args=args, daemon=True)
    process.start()
    try:
        process.join(timeout)
        return process.exitcode  # None: it has not ended
    finally:
        process.kill()
        process.join()


def die_with(parent: int) -> None:
    """Ends this process once its parent is gone: even a killed test leaves nothing running."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(parent, 0)
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------ what is made


@pytest.fixture(scope="module")
def from_the_shell(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, subprocess.CompletedProcess[str]]:
    """A run by its command, on a cache that `cache_activations` made of a generated model."""
    folder = tmp_path_factory.mktemp("shell")
    write_model(folder / "model.pt", d_model=16, d_mlp=24)
    write_dataset(folder, 100, seq=32)
    cache_activations.run(
        cache_activations.Config(
            model=str(folder / "model.pt"),
            dataset=str(folder),
            layer=1,
            out=str(folder / "cache"),
            device="cpu",
        )
    )
    config = config_for(folder / "cache", folder / "out")
    return config, shell(config)


def shell(config: Config) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_tinystories.py"), *argv_for(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_refit_and_expected_prefixes(cache: Path, tmp_path: Path) -> None:
    """--refit writes SAEs that fire as the trained ones do and reconstruct better; --prefixes
    expected trains another Matryoshka SAE and the same vanilla one."""
    run(config_for(cache, tmp_path / "sampled", refit=True))
    run(config_for(cache, tmp_path / "expected", prefixes="expected"))
    x = ActivationCache(cache).acts(0, N_TOKENS).float()
    for name in ("matryoshka", "vanilla"):
        sae, fitted = (
            SAE.load(tmp_path / "sampled" / folder / f"{name}.safetensors")
            for folder in (".", "refit")
        )
        assert torch.equal(sae.encode(x), fitted.encode(x))
        assert fvu(x, fitted(x)) < fvu(x, sae(x))
        other = SAE.load(tmp_path / "expected" / f"{name}.safetensors")
        assert torch.equal(other.W_dec, sae.W_dec) == (name == "vanilla")
    assert not (tmp_path / "expected" / "refit").exists()


def test_a_run_end_to_end(
    from_the_shell: tuple[Config, subprocess.CompletedProcess[str]],
) -> None:
    config, done = from_the_shell
    assert done.returncode == 0, done.stderr
    out = Path(config.out)
    made = {*WRITTEN, "checkpoint.safetensors", "results.json"}
    assert set(contents(out)) == made, "no more, no less, and nothing half written"

    results = json.loads((out / "results.json").read_text())
    assert results["config"] == config.as_json()
    assert results["environment"]["torch"] == torch.__version__
    assert results["cache"]["make"]["layer"] == 1
    assert results["passes"] == round(50 * 128 / results["cache"]["n_tokens"], 3)
    assert 0 <= results["waited_for_data"] <= results["seconds"]
    assert results["seconds"] > 0
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [("matryoshka", 0), ("vanilla", 0)]
    for result in results["runs"]:
        assert 0 < result["training_fvu"] < 1.5
        assert result["final_l0"] > 0
        assert result["dead_share"] is None, "50 steps are too few to know"
        sae = SAE.load(out / f"{result['sae']}.safetensors")
        assert (sae.d_model, sae.n_latents) == (16, 20)
        assert sae.about["name"] == result["sae"]
        assert sae.about["n_prefixes"] == (3 if result["sae"] == "matryoshka" else 1)
        assert str(out.parent) not in str(sae.about), "no path of a machine"

    records = records_of(out)
    assert [(r["step"], r["sae"]) for r in records] == [
        (step, name) for step in range(1, 51) for name in ("matryoshka", "vanilla")
    ]
    fields = {"step", "sae", "loss", "fvu", "l0", "dead_share", "sparsity_weight"}
    assert all(set(record) == fields for record in records)
    steps, curves = training_curves(out / METRICS)
    assert steps == list(range(1, 51))
    assert len(curves["vanilla"]["fvu"]) == 50

    lines = done.stdout.splitlines()
    assert "batch FVU" in lines[0]
    for line, result in zip(lines[2:4], results["runs"], strict=True):
        assert line.split()[1] == result["sae"]
        assert f"{result['training_fvu']:.4f}" in line
        assert f"{result['final_l0']:.2f}" in line
        assert line.split()[-2] == "-"
    assert "-: the run was shorter" in lines[-3]
    assert "waiting for data" in lines[-2]
    assert f"evaluate.py --run {out}" in lines[-1]
    bar = [line for line in done.stderr.splitlines() if "100%" in line][-1]
    assert len(bar) <= 80
    for figure in ("matryoshka FVU", "vanilla FVU", "L0"):
        assert figure in bar


def test_the_same_command_again_is_refused_and_nothing_touched(
    from_the_shell: tuple[Config, subprocess.CompletedProcess[str]],
) -> None:
    config, _ = from_the_shell
    before = contents(Path(config.out))
    again = shell(config)
    assert again.returncode == 2
    assert not again.stdout
    assert len(again.stderr.splitlines()) == 1
    assert "holds a run: add --resume" in again.stderr
    assert contents(Path(config.out)) == before


def test_results_alone_are_a_run_too(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run whose checkpoint was deleted, to save room, is not written over."""
    config = config_for(cache, tmp_path / "out", n_steps=2)
    run(config)
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    before = contents(tmp_path / "out")
    assert "holds a run" in refused(config, capsys)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("n_steps", "dead_after"),
    [(1, 5), (41, 5), (41, 6)],  # 2.5 batches or 3: dead after three
)
def test_the_figures_are_what_they_say(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int, dead_after: int
) -> None:
    """FVU, L0 and dead share, recomputed from the batches and from what each step reported."""
    monkeypatch.setattr(training, "N_RECORDS", 10)  # every 4 steps, and the last
    monkeypatch.setattr(training, "DEAD_AFTER", dead_after)
    steps: list[dict[str, torch.Tensor]] = []
    real = Trainer.step

    def spy(self: Trainer, x: torch.Tensor) -> dict[str, torch.Tensor]:
        steps.append(real(self, x))
        return steps[-1]

    monkeypatch.setattr(Trainer, "step", spy)
    config = config_for(cache, tmp_path, n_steps=n_steps, n_latents=60, batch_size=2)
    results = run(config)
    records = records_of(tmp_path)
    expected_steps = [1] if n_steps == 1 else [*range(4, 41, 4), 41]
    assert [r["step"] for r in records[::2]] == expected_steps
    for i, name in enumerate(("matryoshka", "vanilla")):
        previous = 0
        for record in records[i::2]:
            assert record["sae"] == name
            step = record["step"]
            l0 = [metrics["l0"][i].item() for metrics in steps[previous:step]]
            assert record["l0"] == pytest.approx(np.mean(l0), rel=1e-6)
            silent = [metrics["mean_square"][i] == 0 for metrics in steps[max(0, step - 3) : step]]
            dead = torch.stack(silent).all(0).double().mean().item() if step >= 3 else None
            assert record["dead_share"] == (None if dead is None else pytest.approx(dead))
            weight = steps[step - 1]["sparsity_weight"][i].item()
            assert record["sparsity_weight"] == pytest.approx(weight)
            previous = step
        result = results["runs"][i]
        final = [metrics["l0"][i].item() for metrics in steps[-2:]]  # 5% of 41
        assert result["final_l0"] == pytest.approx(np.mean(final))
        batches = ActivationCache(cache).batches(2, seed=0, start_step=n_steps - 1)
        x, sae = next(batches), SAE.load(tmp_path / f"{name}.safetensors")
        assert result["training_fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-5)
        assert result["training_fvu"] == records[i::2][-1]["fvu"]
    if n_steps > 1:
        assert any(0 < record["dead_share"] < 1 for record in records)


@pytest.mark.parametrize("n_latents", [20, 300])  # either way of writing the gradient
def test_one_sae_alone_is_the_one_of_both(cache: Path, tmp_path: Path, n_latents: int) -> None:
    both = run(config_for(cache, tmp_path / "both", n_latents=n_latents))
    for i, name in enumerate(("matryoshka", "vanilla")):
        alone = run(config_for(cache, tmp_path / name, n_latents=n_latents, saes=(name,)))
        assert [r["sae"] for r in alone["runs"]] == [name]
        assert alone["runs"][0]["dead_share"] is None
        for figure in ("final_l0", "training_fvu"):
            expected = pytest.approx(both["runs"][i][figure], rel=1e-3)
            assert alone["runs"][0][figure] == expected
        found, expected = (
            safetensors.torch.load_file(tmp_path / folder / f"{name}.safetensors")
            for folder in (name, "both")
        )
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_latents", [20, 300])
def test_the_same_seed_gives_the_same_bytes(cache: Path, tmp_path: Path, n_latents: int) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(config_for(cache, tmp_path / name, n_latents=n_latents, seed=seed))
    assert set(learnt(tmp_path / "a")) == WRITTEN
    assert learnt(tmp_path / "a") == learnt(tmp_path / "b")
    assert not set(learnt(tmp_path / "a").values()) & set(learnt(tmp_path / "c").values())


# --------------------------------------------------------------------------------- kills and faults

# Crosses a block of prefixes (256 steps) and many passes of the cache; a record every 2 steps.
KILLED = {"n_steps": 621, "checkpoint_every": 100}  # 7 checkpoints: 6 and the last step's


def run_and_die(config: Config, moment: str, nth: int, number: int, test: int) -> None:
    """In a process of its own: the command, which sends itself signal `number` when it comes to
    `moment` for the nth time."""
    die_with(test)
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    count = itertools.count(1)

    def reached(here: str) -> None:
        if here == moment and next(count) == nth:
            os.kill(os.getpid(), number)

    def around(function: Callable, before: str, after: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            reached(before)
            result = function(*args, **kwargs)
            reached(after)
            return result

        return wrapped

    def save_in_two(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        data = safetensors.torch.save(tensors, metadata)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            reached("half written")
            file.write(data[len(data) // 2 :])

    Trainer.step = around(Trainer.step, "", "step")  # type: ignore[method-assign]
    os.fsync = around(os.fsync, "syncing", "synced")
    os.replace = around(os.replace, "renaming", "renamed")
    safetensors.torch.save_file = save_in_two
    train_tinystories.main(argv_for(config))
    os._exit(0)


def kill(config: Config, moment: str, nth: int, number: int = signal.SIGKILL) -> None:
    code = exit_code(run_and_die, config, moment, nth, number, os.getpid())
    assert code == (-number if number == signal.SIGKILL else 130), f"not killed: {code}"


def tear_the_last_line(out: Path) -> None:
    """What a kill amid a write leaves: the metrics' buffer goes to disk in blocks, not in lines."""
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "sae": "vani')


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list]:
    """The uninterrupted run: its bytes, and its figures."""
    out = tmp_path_factory.mktemp("whole")
    results = run(config_for(cache, out, **KILLED))
    return learnt(out), results["runs"]


# Files are renamed thus: checkpoints 1 to 8 (the first is of step 0), matryoshka 9, vanilla 10,
# results.json 11.
MOMENTS = [
    ("step", 1),
    ("step", 100),
    ("step", 101),
    ("step", 257),
    ("step", 621),
    ("half written", 1),
    ("half written", 4),
    ("syncing", 2),
    ("renaming", 1),
    ("renamed", 1),
    ("renamed", 2),
    ("renamed", 8),
    ("syncing", 9),
    ("renamed", 9),
    ("synced", 10),
    ("renaming", 11),
    ("renamed", 11),
]


@pytest.mark.parametrize(("moment", "nth"), MOMENTS)
def test_killed_at_any_moment_ends_with_the_same_bytes(
    cache: Path,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list],
    moment: str,
    nth: int,
) -> None:
    config = config_for(cache, tmp_path, **KILLED)
    kill(config, moment, nth)
    if not (tmp_path / "results.json").exists() and (tmp_path / "metrics.jsonl").exists():
        tear_the_last_line(tmp_path)
    results = run(resumed(config))
    assert learnt(tmp_path) == whole[0]
    assert results["runs"] == whole[1]
    left = set(contents(tmp_path)) - WRITTEN - {"checkpoint.safetensors", "results.json"}
    assert not left, "what a killed run left half written is cleared away"


def test_killed_again_and_again_ends_with_the_same_bytes(
    cache: Path, tmp_path: Path, whole: tuple[dict[str, bytes], list]
) -> None:
    config = resumed(config_for(cache, tmp_path, **KILLED))
    for moment, nth in [
        ("step", 99),  # the checkpoint of step 0 stays
        ("renamed", 1),
        ("step", 1),
        ("half written", 2),  # that of step 200 is lost
        ("renaming", 2),
        ("step", 150),
        ("synced", 1),
        ("step", 121),
    ]:
        kill(config, moment, nth)
        tear_the_last_line(tmp_path)
    results = run(config)
    assert learnt(tmp_path) == whole[0]
    assert results["runs"] == whole[1]


@pytest.mark.parametrize(
    ("number", "nth"),
    [(signal.SIGINT, 1), (signal.SIGINT, 99), (signal.SIGTERM, 99), (signal.SIGTERM, 357)],
)
def test_a_signal_loses_no_step(
    cache: Path,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list],
    capsys: pytest.CaptureFixture[str],
    number: int,
    nth: int,
) -> None:
    """Ctrl-C and SIGTERM, before the first regular checkpoint and after it."""
    config = config_for(cache, tmp_path / "out", **KILLED)
    kill(config, "step", nth, number)
    records = records_of(tmp_path / "out")
    assert [r["step"] for r in records[::2]] == list(range(2, nth + 1, 2))
    before = contents(tmp_path / "out")
    assert "add --resume" in refused(config, capsys)
    assert contents(tmp_path / "out") == before, "the metrics are not cut"
    state = Training(config, ActivationCache(cache), torch.device("cpu"))
    state.load()
    assert state.trainer.n_steps_done == nth
    run(resumed(config))
    assert learnt(tmp_path / "out") == whole[0]


def test_an_error_in_reading_loses_no_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_for(cache, tmp_path / "whole"))
    real = ActivationCache.batches

    def fails(self: ActivationCache, *args: Any) -> Iterator[torch.Tensor]:
        yield from itertools.islice(real(self, *args), 22)
        raise UserError("the disk is gone")

    config = config_for(cache, tmp_path / "out", checkpoint_every=1_000)
    with monkeypatch.context() as patched:
        patched.setattr(ActivationCache, "batches", fails)
        with pytest.raises(UserError, match="the disk is gone"):
            run(config)
    steps = itertools.count()
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x: (next(steps), step(self, x))[1])
    run(resumed(config))
    assert next(steps) == 50 - 22
    assert learnt(tmp_path / "out") == learnt(tmp_path / "whole")


def test_ctrl_c_during_the_imports_prints_nothing(tmp_path: Path) -> None:
    """Here the first library that is imported sends it."""
    stub = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "safetensors.py").write_text(stub)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_tinystories.py")],
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.usefixtures("no_steps")
def test_one_folder_has_one_run_at_a_time(
    cache: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(stopped_run)
    with one_writer(stopped_run):
        said = refused(resumed(config_for(cache, stopped_run)), capsys)
    assert f"--out {stopped_run}: another process is writing there" in said
    assert contents(stopped_run) == before


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
def test_a_resume_is_exact_in_a_large_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matmul_dtype: str
) -> None:
    """Above 256 latents the gradient is written another way, chosen by how many are active."""
    cache = write_cache(tmp_path / "cache", N_TOKENS, d_model=16)
    settings = {"n_latents": 300, "sparsity_weight": 20.0, "matmul_dtype": matmul_dtype}
    run(config_for(cache, tmp_path / "whole", **settings))
    config = config_for(cache, tmp_path / "parts", **settings)
    for after in (20, 14):
        real, left = Trainer.step, itertools.count(after, -1)

        def stop(self: Trainer, x: torch.Tensor, real: Any = real, left: Any = left) -> Any:
            if next(left) == 0:
                raise KeyboardInterrupt
            return real(self, x)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                run(resumed(config))
    run(resumed(config))
    assert learnt(tmp_path / "parts") == learnt(tmp_path / "whole")


def test_products_in_bfloat16_train_nearly_the_same_saes(tmp_path: Path) -> None:
    """What is learnt is in float32, and FVU and L0 agree with those of float32 to 1%."""
    cache = write_cache(tmp_path / "cache", N_TOKENS, d_model=16)
    settings: dict[str, Any] = {"n_latents": 300, "n_steps": 200, "target_l0": 20.0}
    exact = run(config_for(cache, tmp_path / "float32", **settings))["runs"]
    settings["matmul_dtype"] = "bfloat16"
    runs = run(config_for(cache, tmp_path / "bfloat16", **settings))["runs"]
    for ours, theirs in zip(runs, exact, strict=True):
        for name in ("final_l0", "training_fvu"):
            assert abs(ours[name] / theirs[name] - 1) < 0.01
        file = f"{ours['sae']}.safetensors"
        rounded, sae = (SAE.load(tmp_path / folder / file) for folder in ("bfloat16", "float32"))
        assert rounded.W_enc.dtype == torch.float32
        assert not torch.equal(rounded.W_enc, sae.W_enc)


def test_a_finished_run_is_returned_without_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(cache, tmp_path)
    results = run(config)
    before = contents(tmp_path)

    def never(*args: object) -> None:
        raise AssertionError("a finished run needs no step, and no look at every byte of the cache")

    monkeypatch.setattr(Trainer, "step", never)
    monkeypatch.setattr(ActivationCache, "verify", never)
    assert run(resumed(config)) == results
    train_tinystories.main(argv_for(resumed(config)))
    assert "vanilla" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_files_are_recorded_as_they_are(cache: Path, tmp_path: Path) -> None:
    """evaluate.py knows by this which SAEs are of the run, and what was trained on."""
    results = run(config_for(cache, tmp_path, refit=True, tokens=2_000))
    for result in results["runs"]:
        for key, folder in (("file_sha256", "."), ("refit_file_sha256", "refit")):
            data = (tmp_path / folder / f"{result['sae']}.safetensors").read_bytes()
            assert result[key] == hashlib.sha256(data).hexdigest()
    made = ActivationCache(cache)
    sizes = [shard.n_tokens for shard in made.shards]
    assert sizes[0] < 2_000 < sizes[0] + sizes[1], "the third shard and the fourth are not used"
    assert results["cache"]["acts_sha256"] == [s.acts_sha256 for s in made.shards[:2]]


@pytest.mark.parametrize("damage", ["lost", "cut", "of another run"])
def test_a_lost_sae_is_written_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config = config_for(cache, tmp_path / "out")
    results = run(config)
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "vanilla.safetensors"
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        cut(path)
    else:
        run(config_for(cache, tmp_path / "other", seed=1))
        shutil.copy(tmp_path / "other" / "vanilla.safetensors", path)
    monkeypatch.setattr(Trainer, "step", None)
    assert run(resumed(config)) == results
    assert contents(tmp_path / "out") == before


def test_a_finished_run_is_refitted_when_asked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run(config_for(cache, tmp_path / "at once", refit=True))
    config = config_for(cache, tmp_path / "later")
    run(config)
    before = contents(tmp_path / "later")
    monkeypatch.setattr(Trainer, "step", None)
    with_refit = dataclasses.replace(resumed(config), refit=True)
    results = run(with_refit)
    assert results["config"]["refit"]
    assert results["runs"] == at_once["runs"]
    after = contents(tmp_path / "later")
    assert set(after) - set(before) == {"refit/matryoshka.safetensors", "refit/vanilla.safetensors"}
    assert all(after[name] == before[name] for name in before if name != "results.json")
    monkeypatch.setattr(train, "refit_decoder", None)
    assert run(with_refit) == results, "and is then finished"


def test_a_finished_run_without_its_checkpoint_is_returned_or_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint may have been deleted to save room. Nothing is trained over what is left."""
    config = config_for(cache, tmp_path)
    results = run(config)
    (tmp_path / "checkpoint.safetensors").unlink()
    before = contents(tmp_path)
    assert run(resumed(config)) == results
    other = dataclasses.replace(resumed(config), lr=1e-3)
    assert "results.json is of a run with --lr 0.003, not 0.001" in refused(other, capsys)
    refit = dataclasses.replace(resumed(config), refit=True)
    said = refused(refit, capsys)
    assert "without its checkpoint" in said
    assert "refit/vanilla.safetensors" in said
    assert contents(tmp_path) == before


def write_until(config: Config, n_bytes: int, said: Path, test: int) -> None:
    """In a process of its own: the command, where no file can be longer than `n_bytes`."""
    die_with(test)
    torch.set_num_threads(1)
    sys.stderr = said.open("w")
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    train_tinystories.main(argv_for(config))


@pytest.mark.parametrize("n_bytes", [5_000, 30_000])  # below a checkpoint's length, and above it
def test_a_full_disk_keeps_what_was_finished(
    cache: Path, tmp_path: Path, whole: tuple[dict[str, bytes], list], n_bytes: int
) -> None:
    config = config_for(cache, tmp_path / "out", **KILLED)
    assert exit_code(write_until, config, n_bytes, tmp_path / "stderr", os.getpid()) == 2
    said = (tmp_path / "stderr").read_text().splitlines()
    assert said[-1].startswith("error: ")
    file = "metrics.jsonl" if n_bytes == 30_000 else "checkpoint.safetensors"
    assert f"cannot write {tmp_path / 'out' / file} (" in said[-1]
    assert "--resume" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert (tmp_path / "out" / "checkpoint.safetensors").exists() == (n_bytes == 30_000)
    run(resumed(config))
    assert learnt(tmp_path / "out") == whole[0]


def test_divergence_stops_with_the_last_good_metrics(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: the matryoshka SAE has an FVU of") as stopped:
        run(config_for(cache, tmp_path, lr=1e30))
    message, records = str(stopped.value), records_of(tmp_path)
    step = int(message.split()[1].rstrip(":"))
    assert records
    assert records[-1]["step"] == step - 1
    assert all(np.isfinite(record["fvu"]) for record in records)
    for record in records[-2:]:
        assert json.dumps(record) in message
    assert "--lr" in message
    assert not (tmp_path / "results.json").exists()


def test_divergence_after_a_resume_names_the_metrics_of_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(cache, tmp_path)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    real_fvu, real_step = fvu, Trainer.step

    def stop_at_17(self: Trainer, x: torch.Tensor) -> Any:
        if self.n_steps_done == 16:
            raise KeyboardInterrupt
        return real_step(self, x)

    monkeypatch.setattr(Trainer, "step", stop_at_17)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Trainer, "step", real_step)
    good = [record for record in records_of(tmp_path) if record["step"] == 15]
    monkeypatch.setattr(training, "fvu", lambda x, x_hat: real_fvu(x, x_hat) * nan)
    with pytest.raises(UserError, match="step 16: the matryoshka SAE has an FVU of nan") as stopped:
        run(resumed(config))
    assert len(good) == 2
    assert all(json.dumps(record) in str(stopped.value) for record in good)


# ------------------------------------------------------------------------- what is wrong with a run


def test_every_problem_has_its_line() -> None:
    good = {"sae": "vanilla", "training_fvu": 0.3, "final_l0": 20.0, "dead_share": 0.0}

    def lines(**figures: Any) -> list[str]:
        runs = [good, good | {"sae": "matryoshka"} | figures]
        return problems({"config": {"target_l0": 20.0}, "runs": runs})

    assert lines() == []
    assert lines(final_l0=21.9, dead_share=0.19, training_fvu=0.99) == []
    assert lines(dead_share=None) == []
    (line,) = lines(final_l0=93.9)
    assert "the matryoshka SAE missed its target: L0 93.9 for 20: try" in line
    assert "a higher --sparsity-weight" in line
    (line,) = lines(final_l0=17.0)
    assert "a lower --sparsity-weight" in line
    (line,) = lines(training_fvu=20.0)
    assert "the matryoshka SAE reconstructs worse than the activations' mean does (FVU 20)" in line
    assert "--lr" in line
    (line,) = lines(dead_share=0.6)
    assert "60.0% of the matryoshka SAE's latents are dead: try fewer --n-latents" in line
    assert len(lines(final_l0=0.0, training_fvu=1.01, dead_share=1.0)) == 3


def test_a_useless_run_is_an_error_once_everything_is_written(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for resume in (False, True):
        config = config_for(cache, tmp_path, lr=100.0, resume=resume)
        with pytest.raises(SystemExit) as stopped:
            train_tinystories.main(argv_for(config))
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert "at the end of training" in printed.out
        assert "reconstructs worse than the activations' mean does" in printed.err
        assert f"error: what {tmp_path} holds is of no use" in printed.err.splitlines()[-1]
        assert (tmp_path / "results.json").exists()


def test_a_missed_target_is_a_warning(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tinystories.main(argv_for(config_for(cache, tmp_path, n_steps=20, target_l0=1.0)))
    assert "warning: the vanilla SAE missed its target: L0" in capsys.readouterr().err


def test_the_bar_shows_both_saes_in_80_columns() -> None:
    records = [
        {"sae": name, "fvu": 12.345, "l0": 3072.0, "dead_share": 0.1, "sparsity_weight": 1.2}
        for name in ("matryoshka", "vanilla")
    ]
    said = bar_text(records)
    assert said == "matryoshka FVU 12.345 L0 3072, vanilla FVU 12.345 L0 3072"
    assert len("100% 1:23:45<1:23:45, " + said) <= 80
    assert short(5.4e7, 3) == "5e+07"


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.usefixtures("no_steps")
def test_activations_that_are_all_the_same_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    n = 300
    make = {
        "format": 1,
        "tokens": n,
        "dtype": "float32",
        "d_model": D_MODEL,
        "rows_per_shard": 3,
    }
    tokens = np.stack([np.arange(n), np.arange(n) // 100, np.arange(n) % 100], 1).astype("<i4")
    (tmp_path / "cache").mkdir()
    acts = torch.full((n, D_MODEL), value)
    write_shard(tmp_path / "cache", acts, tokens, (0, 3), make)
    finish(tmp_path / "cache", 3)
    said = refused(config_for(tmp_path / "cache", tmp_path / "out"), capsys)
    assert "its activations are all the same: nothing to explain" in said
    assert contents(tmp_path / "out") == {}


def test_a_batch_at_fault_is_named_and_the_learning_rate_is_not() -> None:
    records = [{"step": 7, "sae": "vanilla", "fvu": float("inf")}]
    for x, named in (
        (torch.ones(4, 3), "the batch's activations are all the same"),
        (torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), "activations that are not finite"),
    ):
        with pytest.raises(UserError, match=f"step 7: .*{named}") as stopped:
            stop_if_diverged(records, [], x)
        assert "--lr" not in str(stopped.value)
    stop_if_diverged([records[0] | {"fvu": 1e9}], [], torch.ones(4, 3))


# ------------------------------------------------------------------------- that settings arrive


def n_prefixes(trainer: Trainer) -> list[int]:
    return [config.n_prefixes for config in trainer.configs]


# What a setting is replaced by, and where a trainer then has it (default: in its config).
OF_TRAINER: dict[str, tuple[Any, Callable[[Trainer], Any]]] = {
    "saes": (("vanilla",), lambda t: {(1,): ("vanilla",)}[tuple(n_prefixes(t))]),
    "n_latents": (320, lambda t: t.n_latents),
    "n_prefixes": (7, lambda t: n_prefixes(t)[0]),
    "target_l0": (7.5, lambda t: t.config.target_l0),
    "lr": (0.02, lambda t: t.config.lr),
    "n_steps": (77, lambda t: t.config.n_steps),
    "sparsity": ("log", lambda t: t.config.sparsity),
    "sparsity_weight": (0.7, lambda t: t.config.sparsity_weight),
    "prefixes": ("expected", lambda t: t.config.prefixes),
    "matmul_dtype": ("bfloat16", lambda t: t.config.matmul_dtype),
    "gradient": ("dense", lambda t: t.config.gradient),
    "l0_control": ("original", lambda t: t.config.l0_control),
    "sparsity_warmup": (0.3, lambda t: t.config.sparsity_warmup),
    "lr_warmup_steps": (7, lambda t: t.config.lr_warmup_steps),
    "lr_decay": (0.3, lambda t: t.config.lr_decay),
    "lr_end": (0.3, lambda t: t.config.lr_end),
    "betas": ((0.1, 0.2), lambda t: t.config.betas),
    "max_grad_norm": (3.0, lambda t: t.config.max_grad_norm),
    "norm_decay": (0.3, lambda t: t.config.norm_decay),
    "order_decay": (0.3, lambda t: t.config.order_decay),
    "restart_every": (3, lambda t: t.config.restart_every),
    "restart_window": ((0.1, 0.3), lambda t: t.config.restart_window),
    "seed": (9, lambda t: t.seeds[0] if t.seeds == [9, 9] else t.seeds),
}


@pytest.mark.parametrize("name", OF_TRAINER)
def test_a_setting_arrives_at_the_trainer(name: str) -> None:
    value, where = OF_TRAINER[name]
    base = Config(n_latents=300)
    assert getattr(base, name) != value
    config = dataclasses.replace(base, **{name: value})
    trainer = make_trainer(config, 16, torch.device("cpu"))
    assert where(trainer) == value
    saes = trainer.saes
    assert len(saes) == (1 if name == "saes" else 2)
    for sae in saes:  # before the first step all latents are as good, and stay where they were
        assert torch.equal(sae.W_enc, SAE(16, config.n_latents, config.seed).W_enc)
    if name != "saes":
        assert n_prefixes(trainer) == [config.n_prefixes, 1], "Matryoshka has them, vanilla one"


OF_RUN = {"cache", "tokens", "batch_size", "seed", "out", "resume", "checkpoint_every", "device"}
OF_RUN |= {"refit"}  # resume and refit have tests of their own


def test_the_other_settings_arrive(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real, device = ActivationCache.batches, train.pick_device

    def batches(self: ActivationCache, size: int, seed: int, *args: Any) -> Any:
        asked.update(cache=str(self.folder), tokens=self.n_tokens, batch_size=size, seed=seed)
        return real(self, size, seed, *args)

    def pick_device(name: str) -> torch.device:
        asked.update(device=name)
        return device(name)

    monkeypatch.setattr(ActivationCache, "batches", batches)
    monkeypatch.setattr(train, "pick_device", pick_device)
    settings = {"tokens": 3_000, "batch_size": 40, "seed": 4, "device": "cpu"}
    config = config_for(cache, tmp_path / "o", n_steps=7, checkpoint_every=3, **settings)
    saved_at = []
    original = Training.save

    def save(self: Training) -> None:
        saved_at.append(self.trainer.n_steps_done)
        original(self)

    monkeypatch.setattr(Training, "save", save)
    run(config)
    assert asked == {"cache": str(cache), **settings}
    assert saved_at == [0, 3, 6, 7]
    assert (tmp_path / "o" / "results.json").exists()
    assert {f.name for f in dataclasses.fields(Config)} == OF_RUN | set(OF_TRAINER)


def test_the_published_recipe() -> None:
    """What the write-up trained TinyStories with: nobody changes it without this being seen."""
    config = Config()
    trainer = make_trainer(config, 16, torch.device("cpu"))
    assert config.batch_size == 1024
    assert (trainer.n_latents, n_prefixes(trainer), trainer.seeds) == (3072, [10, 1], [0, 0])
    found = dataclasses.asdict(trainer.config)
    recipe = {
        "n_steps": 30_000,
        "target_l0": 30.0,
        "lr": 1e-3,
        "prefixes": "sampled",
        "sparsity": "l1",
        "sparsity_weight": 1.2,
        "sparsity_warmup": 0.2,
        "l0_control": "steady",
        "lr_warmup_steps": 100,
        "lr_decay": 0.2,
        "lr_end": 0.1,
        "betas": (0.5, 0.9375),
        "restart_every": 0,
        "max_grad_norm": 1.0,
        "norm_decay": 0.99,
        "order_decay": 0.95,
        "matmul_dtype": "float32",
        "gradient": "auto",
    }
    assert {name: found[name] for name in recipe} == recipe
    assert training_report.DEAD_AFTER == 2_000_000
    assert not config.refit


# -------------------------------------------------------------------------------- what is refused


LARGE = {"matmul_dtype": "bfloat16", "n_latents": 300}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_l0": 21.0}, "--target-l0 21.0 is more than there are latents: 20"),
        ({"target_l0": 0.0}, "--target-l0 is 0.0"),
        ({"target_l0": float("nan")}, "--target-l0 is nan"),
        ({"n_prefixes": 21}, "--n-prefixes 21 is more than there are latents: 20"),
        ({"n_prefixes": 0}, "--n-prefixes is 0"),
        ({"n_latents": 0}, "--n-latents is 0"),
        ({"n_steps": 0}, "--n-steps is 0"),
        ({"n_steps": -5}, "--n-steps is -5"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"batch_size": 60, **LARGE}, "--matmul-dtype bfloat16: --batch-size is 60"),
        ({"matmul_dtype": "bfloat16"}, "--n-latents 20: --matmul-dtype bfloat16"),
        (LARGE, f"the activations' number of dimensions is {D_MODEL}, not a multiple of 8"),
        ({"batch_size": N_TOKENS + 1}, f"holds {N_TOKENS} activations: too few for --batch-size"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": -1e-3}, "--lr is -0.001"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"sparsity_weight": 0.0}, "--sparsity-weight is 0.0"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ({"lr": float("inf")}, "--lr is inf: it must be a finite number"),
        ({"sparsity_weight": float("inf")}, "--sparsity-weight is inf: it must be a finite number"),
        ({"target_l0": float("inf")}, "--target-l0 is inf: it must be a finite number"),
        ({"n_steps": 2**63}, f"--n-steps is {2**63}: it must be below 2^63"),
        ({"seed": 2**63}, f"--seed is {2**63}: it must be below 2^63"),
        ({"n_latents": 2**61}, "takes more memory than there is"),
        (
            {"n_latents": 10**12},
            "--n-latents 1000000000000 with --batch-size 128 takes more memory",
        ),
        ({"seed": -1}, "--seed is -1"),
        ({"cache": "nowhere"}, "nowhere holds no finished cache"),
        ({"device": "cuda:99"}, "--device cuda:99 is not there"),
        ({"device": "toaster"}, "--device toaster is not there"),
        ({"out": "/dev/null/x"}, "--out /dev/null/x cannot be written"),
        ({"out": __file__}, "test_train.py cannot be written"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.usefixtures("no_steps")
def test_bad_input_is_one_line_and_touches_nothing(
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    named: str,
    resume: bool,
) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    config = config_for(cache, tmp_path, resume=resume)
    assert named in refused(dataclasses.replace(config, **settings), capsys)
    assert contents(tmp_path) == {"metrics.jsonl": b"precious"}


@pytest.mark.parametrize(
    "flags", [["--sae", "topk"], ["--sparsity", "l2"], ["--n-steps", "many"], ["--topk", "3"]]
)
def test_unknown_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tinystories.main(flags)
    assert stopped.value.code == 2


@pytest.fixture(scope="module")
def unfinished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, killed after its second checkpoint."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    kill(config_for(cache, out), "step", 40)
    return out


@pytest.fixture
def stopped_run(unfinished: Path, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    shutil.copytree(unfinished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"saes": ("vanilla",)}, "--saes matryoshka vanilla, not vanilla"),
        ({"n_latents": 21}, "--n-latents 20, not 21"),
        ({"n_prefixes": 4}, "--n-prefixes 3, not 4"),
        ({"target_l0": 4.0}, "--target-l0 3.0, not 4.0"),
        ({"lr": 1e-3}, "--lr 0.003, not 0.001"),
        ({"n_steps": 60}, "--n-steps 50, not 60"),
        ({"batch_size": 64}, "--batch-size 128, not 64"),
        ({"sparsity": "log"}, "--sparsity l1, not log"),
        ({"sparsity_weight": 1.0}, "--sparsity-weight 1.2, not 1.0"),
        ({"gradient": "dense"}, "--gradient auto, not dense"),
        ({"seed": 1}, "--seed 0, not 1"),
    ],
)
@pytest.mark.usefixtures("no_steps")
def test_a_checkpoint_of_other_settings_is_refused(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    named: str,
) -> None:
    before = contents(stopped_run)
    config = resumed(config_for(cache, stopped_run, **change))
    assert named in refused(config, capsys)
    assert contents(stopped_run) == before


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"n_tokens": N_TOKENS - 1}, {"d_model": D_MODEL + 1}]
)
def test_a_checkpoint_on_another_cache_is_refused(
    tmp_path: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str], other: dict[str, int]
) -> None:
    another = write_cache(tmp_path / "another", **{"n_tokens": N_TOKENS, **other})
    before = contents(stopped_run)
    assert "--cache" in refused(resumed(config_for(another, stopped_run)), capsys)
    assert contents(stopped_run) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(
    cache: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped_run / "checkpoint.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    older = json.loads(metadata["config"])
    del older["matmul_dtype"], older["gradient"]
    metadata["config"] = json.dumps(older)
    safetensors.torch.save_file(tensors, path, metadata)
    said = refused(resumed(config_for(cache, stopped_run)), capsys)
    assert "earlier version, which had no --gradient" in said


def test_where_the_cache_lies_and_how_often_to_save_may_change(
    cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    shutil.copytree(cache, tmp_path / "moved")
    run(config_for(cache, tmp_path / "whole"))
    run(resumed(config_for(tmp_path / "moved", stopped_run, checkpoint_every=4)))
    assert learnt(stopped_run) == learnt(tmp_path / "whole")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without(what: str) -> Callable[[Path], None]:
    """Rewrites a checkpoint without one of its tensors or lines of metadata."""

    def rewrite(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {k: v for k, v in file.metadata().items() if k != what}
            names = [name for name in file.keys() if name != what]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        assert len(tensors) + len(metadata) > 5
        safetensors.torch.save_file(tensors, path, metadata)

    return rewrite


@pytest.mark.parametrize(
    "damage",
    [flip, cut, empty, *map(without, ["silent", "trainer.params", "metrics_bytes", "config"])],
)
@pytest.mark.usefixtures("no_steps")
def test_a_damaged_checkpoint_is_refused(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    damage(stopped_run / "checkpoint.safetensors")
    before = contents(stopped_run)
    said = refused(resumed(config_for(cache, stopped_run)), capsys)
    assert "checkpoint.safetensors" in said
    assert "to start over, delete" in said
    assert contents(stopped_run) == before


@pytest.mark.parametrize("damage", [Path.unlink, empty])
@pytest.mark.usefixtures("no_steps")
def test_metrics_shorter_than_at_the_checkpoint_are_refused(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    damage(stopped_run / "metrics.jsonl")
    before = contents(stopped_run)
    assert "metrics.jsonl" in refused(resumed(config_for(cache, stopped_run)), capsys)
    assert contents(stopped_run) == before


LEFT_BEHIND = (
    *("checkpoint.safetensors", "results.json", "metrics.jsonl", "evaluation.json"),
    *("vanilla.safetensors", "of_my_own.safetensors", "refit"),
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.usefixtures("no_steps")
def test_what_another_run_left_is_not_taken_for_this_ones(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, resume: bool
) -> None:
    """An older vanilla.safetensors would be scored as this run's: the folder is refused."""
    if name == "refit":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    said = refused(config_for(cache, tmp_path, resume=resume), capsys)
    assert str(tmp_path) in said
    if name not in ("checkpoint.safetensors", "results.json"):
        assert f"holds {name}, of a run without a checkpoint: move that away" in said
    assert contents(tmp_path) == before


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def foreign(path: Path) -> None:
    """As long as it was, and another script's, or of another run."""
    text = json.dumps({"config": {"target_l0": 0}, "runs": [{"sae": "x", "best": 1}]})
    path.write_text((text + "\n") * 1_000)


def cut_short(path: Path) -> None:
    path.write_text('{"config": {"sa')


def a_list(path: Path) -> None:
    path.write_text("[1]")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" * 50_000)


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("results.json", [cut_short, a_list, foreign, binary, a_folder]),
        ("metrics.jsonl", [foreign, binary, a_folder, cut_short]),
        ("checkpoint.safetensors", [foreign, binary, a_folder]),
    ],
)
@pytest.mark.usefixtures("no_steps")
def test_a_file_that_is_not_the_runs_is_named(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damages: list[Callable[[Path], None]],
) -> None:
    for damage in damages:
        damage(stopped_run / name)
        before = contents(stopped_run)
        assert str(stopped_run / name) in refused(resumed(config_for(cache, stopped_run)), capsys)
        assert contents(stopped_run) == before
        if (stopped_run / name).is_dir():
            (stopped_run / name).rmdir()


@pytest.mark.parametrize("name", ["results.json", "matryoshka.safetensors", "refit"])
def test_a_folder_where_a_result_should_be_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Made while training went on, so that it is met at the end; then nothing is lost."""
    config = config_for(cache, tmp_path, refit=True)
    make = Path.write_text if name == "refit" else Path.mkdir
    args = ("a file",) if name == "refit" else ()
    real = train.train

    def train_then_block(*every: Any) -> None:
        real(*every)
        make(tmp_path / name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train", train_then_block)
        with pytest.raises(UserError, match=f"{tmp_path / name} "):
            run(config)
    (tmp_path / name).unlink() if name == "refit" else (tmp_path / name).rmdir()
    run(resumed(config))
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("kind", ["acts", "tokens"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.usefixtures("no_steps")
def test_a_damaged_cache_is_named_before_training(
    cache: Path,
    tmp_path: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    kind: str,
    resume: bool,
) -> None:
    shutil.copytree(cache, tmp_path / "damaged")
    damage(tmp_path / "damaged" / f"00002.{kind}")
    out = stopped_run if resume else tmp_path / "new"
    before = contents(stopped_run)
    config = config_for(tmp_path / "damaged", out, resume=resume)
    assert "shard 00002 is damaged" in refused(config, capsys)
    assert contents(out) == (before if resume else {})


# -------------------------------------------------------------------------------- L0, and resources


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger") / "cache"
    return write_cache(folder, 100_000, d_model=24, n_features=96)


@pytest.mark.parametrize("start", [0.02, 20.0])
def test_l0_ends_at_its_target(larger: Path, tmp_path: Path, start: float) -> None:
    config = config_for(
        larger,
        tmp_path,
        n_latents=128,
        n_prefixes=5,
        target_l0=6.0,
        n_steps=2_000,
        batch_size=256,
        checkpoint_every=1_000,
        sparsity_weight=start,
    )
    results = run(config)
    for result in results["runs"]:
        assert result["final_l0"] == pytest.approx(6.0, rel=0.01)
        assert 0 < result["training_fvu"] < 0.7
    assert results["waited_for_data"] < results["seconds"]


def train_and_measure(config: Config, result: Any, test: int) -> None:
    """In a process of its own: sends by how many bytes the larger run made its memory grow."""
    die_with(test)
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    # The default would hold a cache of up to 1 GiB: the test's would have to be larger than that.
    streamed = functools.partialmethod(ActivationCache.batches, max_resident=0)
    ActivationCache.batches = streamed  # type: ignore[method-assign, assignment]
    first = dataclasses.replace(config, n_steps=20, out=config.out + "-first")
    run(first)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(config)
    result.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    n_tokens, d_model = 1_600_000, 32
    folder = write_cache(tmp_path / "cache", n_tokens, d_model=d_model, n_features=8)
    config = config_for(
        folder, tmp_path / "out", n_steps=n_tokens // 8_192, batch_size=8_192, checkpoint_every=100
    )
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    assert exit_code(train_and_measure, config, send, os.getpid()) == 0
    grown = receive.recv()
    shutil.rmtree(folder)
    # 205 MB of activations; two buffers of them are 2 x 17 MB, a third may be being freed.
    assert grown < 60e6
