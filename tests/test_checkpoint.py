"""Checkpoints: a kill at any moment costs nothing, and one that is damaged is refused."""

import itertools
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from training_cases import (
    D_MODEL,
    KILLED,
    N_TOKENS,
    WRITTEN,
    argv_for,
    config_for,
    contents,
    cut,
    die_with,
    empty,
    exit_code,
    flip,
    kill,
    learnt,
    records_of,
    refused,
    resumed,
    write_cache,
)

import train_tinystories
from matryoshka.cache_reader import ActivationCache
from matryoshka.checkpoint import read_checkpoint, write_checkpoint
from matryoshka.errors import UserError
from matryoshka.training import Training
from train import run
from train_tinystories import Config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", N_TOKENS)


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(Training, "step", never)


def tear_the_last_line(out: Path) -> None:
    """What a kill amid a write leaves: the metrics' buffer goes to disk in blocks, not in lines."""
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "sae": "vani')


@pytest.fixture(scope="module")
def whole(
    cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], list[Any]]:
    """The uninterrupted run: its bytes, and its figures."""
    out = tmp_path_factory.mktemp("whole")
    results = run(config_for(cache, out, **KILLED))
    return learnt(out), results["runs"]


# Files are renamed thus: checkpoints 1 to 8 (the first is of step 0), matryoshka 9, vanilla 10,
# results.json 11. A few are always tried, a step and half a file by the test below; the others are
# slow together.
MOMENTS = [
    ("renaming", 1),
    ("renamed", 9),
    ("synced", 10),
]
OTHER_MOMENTS = [
    ("step", 257),
    ("half written", 4),
    ("step", 1),
    ("step", 100),
    ("step", 101),
    ("step", 621),
    ("half written", 1),
    ("syncing", 2),
    ("renamed", 1),
    ("renamed", 2),
    ("renamed", 8),
    ("syncing", 9),
    ("renaming", 11),
    ("renamed", 11),
]


def slow(*arguments: Any) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.processes
@pytest.mark.parametrize(("moment", "nth"), [*MOMENTS, *(slow(*m) for m in OTHER_MOMENTS)])
def test_killed_at_any_moment_ends_with_the_same_bytes(
    cache: Path,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list[Any]],
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


@pytest.mark.processes
def test_killed_again_and_again_ends_with_the_same_bytes(
    cache: Path, tmp_path: Path, whole: tuple[dict[str, bytes], list[Any]]
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


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "nth"),
    [(signal.SIGINT, 1), slow(signal.SIGINT, 99), slow(signal.SIGTERM, 99), (signal.SIGTERM, 357)],
)
def test_a_signal_loses_no_step(
    cache: Path,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list[Any]],
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
    assert state.n_steps_done == nth
    assert [member.trainer.n_steps_done for member in state.members] == [nth, nth]
    run(resumed(config))
    assert learnt(tmp_path / "out") == whole[0]


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
        real, left = Training.step, itertools.count(after, -1)

        def stop(self: Training, x: torch.Tensor, real: Any = real, left: Any = left) -> Any:
            if next(left) == 0:
                raise KeyboardInterrupt
            return real(self, x)

        with monkeypatch.context() as patched:
            patched.setattr(Training, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                run(resumed(config))
    run(resumed(config))
    assert learnt(tmp_path / "parts") == learnt(tmp_path / "whole")


def write_until(config: Config, n_bytes: int, said: Path, test: int) -> None:
    """In a process of its own: the command, where no file can be longer than `n_bytes`."""
    die_with(test)
    torch.set_num_threads(1)
    sys.stderr = said.open("w")
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    train_tinystories.main(argv_for(config))


@pytest.mark.processes
@pytest.mark.parametrize("n_bytes", [5_000, 30_000])  # below a checkpoint's length, and above it
def test_a_full_disk_keeps_what_was_finished(
    cache: Path, tmp_path: Path, whole: tuple[dict[str, bytes], list[Any]], n_bytes: int
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
    "other", [{"seed": 1}, {"n_tokens": N_TOKENS - 1}, {"d_model": D_MODEL + 1}]
)
def test_a_checkpoint_on_another_cache_is_refused(
    tmp_path: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str], other: dict[str, int]
) -> None:
    another = write_cache(tmp_path / "another", **{"n_tokens": N_TOKENS, **other})
    before = contents(stopped_run)
    assert "--cache" in refused(resumed(config_for(another, stopped_run)), capsys)
    assert contents(stopped_run) == before


def test_where_the_cache_lies_and_how_often_to_save_may_change(
    cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    shutil.copytree(cache, tmp_path / "moved")
    run(config_for(cache, tmp_path / "whole"))
    saving = {"checkpoint_every": 4, "checkpoint_seconds": 0.1}
    run(resumed(config_for(tmp_path / "moved", stopped_run, **saving)))
    assert learnt(stopped_run) == learnt(tmp_path / "whole")


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
    [
        *(flip, cut, empty),
        *map(without, ["matryoshka/of.silent", "vanilla/params", "vanilla/n_steps_done"]),
        *map(without, ["metrics_bytes", "n_steps_done", "dropped", "config"]),
    ],
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


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64),
        "b": torch.tensor([True, False]),
        "c": torch.arange(6).view(2, 3).T,  # not contiguous
        "d": torch.tensor(7),
    }
    about = {
        "config": {"lr": 1e-3, "saes": ["a", "b"], "out": None},
        "dropped": {"b": "step 3: gone"},
        "cache_hash": "abc",
        "metrics_bytes": 123,
        "n_steps_done": 7,
        "seconds": 0.1 + 0.2,
        "waited": 1e-9,
    }
    write_checkpoint(tmp_path / "file", tensors, about)
    found, read = read_checkpoint(tmp_path / "file")
    assert found == about
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_every_changed_bit_of_a_checkpoints_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    about = {"config": {}, "dropped": {}, "cache_hash": ""}
    about |= dict.fromkeys(("metrics_bytes", "n_steps_done", "seconds", "waited"), 0)
    write_checkpoint(path, {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor(5)}, about)
    data = path.read_bytes()
    for i in range(8 * (8 + int.from_bytes(data[:8], "little")), 8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="its checksum is not the recorded one"):
            read_checkpoint(path)
