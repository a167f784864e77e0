"""Training beside a language model: its batches, their order, resuming, and what is refused."""

import dataclasses
import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_factory import write_dataset, write_model
from torch import Tensor
from training_cases import learnt, write_cache
from transformers_factory import make_documents, save_model, save_tokenizer, write_documents

import cache_activations
import evaluate
import train
from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.live_activations import LiveActivations
from matryoshka.live_config import OF_MODEL
from matryoshka.training import Training
from sae import SAE
from train import Config

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer and text, and a TinyModel with its rows."""
    folder = tmp_path_factory.mktemp("world")
    save_tokenizer(save_model("gpt2", folder))
    for split, seed in (("train", 0), ("validation", 1)):
        write_documents(folder / "text" / f"{split}.jsonl", make_documents(seed=seed))
    write_model(folder / "model.pt", d_model=16, d_mlp=24)
    write_dataset(folder / "rows", 60, seq=32)
    return folder


def sources(world: Path, name: str) -> dict[str, Any]:
    """The settings of a model and its text."""
    if name == "tiny":
        return {"model": f"{world}/model.pt", "dataset": f"{world}/rows", "layer": 1}
    shape = {"layer": 1, "context": 16, "packing": "padded" if name == "padded" else "packed"}
    return {"model": f"{world}/gpt2", "dataset": f"{world}/text", **shape}


NAMES = ("gpt2", "padded", "tiny")


@functools.cache  # the model is loaded once
def live(world: Path, name: str = "gpt2", buffer: int = 200, **settings: Any) -> LiveActivations:
    small = {"tokens": 10**6, "batch_size": 7, "dtype": "float32"} | settings
    config = CacheConfig(**{**sources(world, name), **small})
    return LiveActivations(load_source(config, CPU), config, buffer)


def one_pass(acts: LiveActivations, batch_size: int, seed: int = 0) -> list[Tensor]:
    batches = acts.batches(batch_size, seed)
    return list(itertools.islice(batches, acts.steps_per_pass(batch_size)))


def rows_in(x: Tensor) -> list[bytes]:
    """The bytes of each activation, sorted."""
    return sorted(row.tobytes() for row in x.numpy())


# ------------------------------------------------------------------------------- what batches hold


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_a_cache_of_the_same_rows(
    world: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    settings = {"tokens": 500, "dtype": dtype, "batch_size": 7}
    config = cache_activations.Config(
        **sources(world, name), **settings, out=str(tmp_path / "c"), device="cpu", rows_per_shard=14
    )
    cache_activations.run(config)
    (cached,) = ActivationCache(tmp_path / "c").sequential(10**6)
    ours = list(live(world, name, **settings).sequential(64))
    assert [len(batch.acts) for batch in ours] == [64] * 7 + [52]
    for i, tokens in enumerate(cached[1:], start=1):
        assert torch.equal(torch.cat([batch[i] for batch in ours]), tokens)
    rounding = 1e-5 if dtype == "float32" else 4e-3
    found = torch.cat([batch.acts for batch in ours])
    torch.testing.assert_close(found, cached.acts, atol=rounding, rtol=rounding)
    assert torch.equal(found, found.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("buffer", [1, 200, 10**6])
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_takes_every_activation_once(world: Path, name: str, buffer: int) -> None:
    acts = live(world, name, buffer)
    (whole,) = acts.sequential(10**6)
    assert len(whole.acts) == acts.n_tokens
    steps = acts.steps_per_pass(30)
    left_out = acts.n_tokens - 30 * steps
    assert 0 < left_out < 30
    there = rows_in(whole.acts)
    for x in (torch.cat(one_pass(acts, 30)), torch.cat(one_pass(acts, 1))):
        assert x.dtype == torch.float32
        for row in rows_in(x):
            there.remove(row)  # and not twice
        assert len(there) == acts.n_tokens - len(x)
        there = rows_in(whole.acts)
    assert not torch.equal(torch.cat(one_pass(acts, 30)), whole.acts[: 30 * steps])


def test_a_buffer_is_shuffled_and_buffers_follow_the_text(world: Path) -> None:
    acts = live(world, buffer=150)
    (whole,) = acts.sequential(10**6)
    taken = torch.cat(one_pass(acts, 10))
    sizes = [int(acts._before[end] - acts._before[first]) for first, end in acts._buffers]
    assert len(sizes) == round(acts.n_tokens / 150)
    wanted = acts.n_tokens / len(sizes)
    assert all(abs(size - wanted) <= 7 * 16 for size in sizes)  # a unit
    start = 0
    for size in sizes[:-1]:
        here = slice(start, start + size)
        assert rows_in(taken[here]) == rows_in(whole.acts[here])
        assert not torch.equal(taken[here], whole.acts[here])
        start += size


# --------------------------------------------------------------------------------------- its order


def test_the_order_is_a_function_of_the_seed(world: Path) -> None:
    acts, again = live(world), live.__wrapped__(world)
    straight = one_pass(acts, 30, seed=1)
    assert all(map(torch.equal, straight, one_pass(again, 30, seed=1)))
    assert not torch.equal(straight[0], one_pass(acts, 30, seed=2)[0])
    steps = acts.steps_per_pass(30)
    second = list(itertools.islice(acts.batches(30, 1, steps), steps))
    assert not torch.equal(straight[0], second[0])  # passes differ


@pytest.mark.parametrize("name", NAMES)
def test_batches_from_any_step_are_those_of_a_run_that_came_there(world: Path, name: str) -> None:
    acts = live(world, name)
    assert len(acts._buffers) > 2
    n = 2 * acts.steps_per_pass(30) + 3  # over two passes
    straight = list(itertools.islice(acts.batches(30, 5), n))
    for start in (*range(1, n - 8, 8), acts.steps_per_pass(30)):
        batches = acts.batches(30, 5, start)
        assert all(map(torch.equal, straight[start : start + 8], batches))
        batches.close()


def test_a_run_that_goes_on_computes_no_buffer_before_its_own(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts, computed = live(world), list[int]()
    compute = LiveActivations._compute

    def counted(self: LiveActivations, blocks: Any, first: int, end: int, stopped: Any) -> Any:
        computed.append(first)
        return compute(self, blocks, first, end, stopped)

    monkeypatch.setattr(LiveActivations, "_compute", counted)
    with_last = acts.batches(30, 0, acts.steps_per_pass(30) - 1)
    next(with_last)
    with_last.close()
    assert computed[0] == acts._buffers[-1][0]
    assert len(computed) <= 2  # and one ahead


def test_the_content_hash_is_of_what_is_read(world: Path, tmp_path: Path) -> None:
    ours = live(world).content_hash
    for settings in ({"layer": 2}, {"tokens": 100}, {"dtype": "float16"}, {"site": "mlp_out"}):
        assert live(world, **settings).content_hash != ours
    same = write_documents(tmp_path / "elsewhere" / "train.jsonl", make_documents())
    assert live(world, dataset=str(same.parent)).content_hash == ours
    other = write_documents(tmp_path / "other" / "train.jsonl", make_documents(seed=7))
    assert live(world, dataset=str(other)).content_hash != ours


def test_a_text_that_changes_meanwhile_is_refused(world: Path, tmp_path: Path) -> None:
    text = write_documents(tmp_path / "train.jsonl", make_documents())
    acts = live(world, dataset=str(text))
    texts = make_documents()
    write_documents(text, [*texts[:-1], "another end"])
    with pytest.raises(UserError, match="has changed since the run began"):
        one_pass(acts, 30)


# ---------------------------------------------------------------------------------------- training


@pytest.fixture
def config_for(world: Path, tmp_path: Path) -> Callable[..., Config]:
    def config_for(out: str = "o", name: str = "gpt2", **settings: Any) -> Config:
        small: dict[str, Any] = {"n_latents": 20, "n_prefixes": 3, "target_l0": 3.0, "lr": 3e-3}
        small |= {"n_steps": 70, "batch_size": 32, "checkpoint_every": 15, "device": "cpu"}
        small |= {"rows_at_once": 7, "buffer": 200, "tokens": 800, "out": str(tmp_path / out)}
        return Config(**{**sources(world, name), **small, **settings})

    return config_for


def from_cache(config: Config, cache: Path) -> dict[str, Any]:
    """Its settings, for a cache in place of the language model."""
    settings = dataclasses.asdict(config) | {"cache": str(cache)}
    return {name: value for name, value in settings.items() if name not in OF_MODEL}


@pytest.mark.processes
@pytest.mark.parametrize("name", ["gpt2", "tiny"])
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_bytes(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    straight, broken = config_for("straight", name), config_for("broken", name)
    train.run(straight)
    step, count = Training.step, itertools.count(1)

    def interrupted(self: Training, x: Tensor) -> None:
        n = next(count)
        if n == 8:
            os.kill(os.getpid(), signal.SIGTERM)  # which writes a checkpoint first
        if n == 41:
            raise MemoryError("as good as a kill: nothing is written")
        step(self, x)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="step 8 is saved"):
        train.run(broken)
    resumed = dataclasses.replace(broken, resume=True)
    with pytest.raises(UserError, match="takes more memory"):
        train.run(resumed)
    results = train.run(resumed)
    assert learnt(straight.folder) == learnt(broken.folder)
    assert results["passes"] == 2.8  # of 800 activations
    assert train.run(resumed) == results


def test_a_run_from_a_cache_and_one_without_say_the_same_of_themselves(
    config_for: Callable[..., Config], tmp_path: Path, world: Path
) -> None:
    source = sources(world, "gpt2")
    for split in ("train", "validation"):
        cache_activations.run(
            cache_activations.Config(
                **source, split=split, tokens=800, out=str(tmp_path / split), device="cpu"
            )
        )
    without = train.run(config_for("without", refit=True, n_steps=40))
    cached = train.run(Config(**from_cache(config_for("with", n_steps=40), tmp_path / "train")))
    missing = {"rows_per_shard"}
    assert cached["cache"]["make"].keys() - without["cache"]["make"].keys() == missing
    assert without["cache"]["make"].items() <= cached["cache"]["make"].items()
    about = [SAE.load(tmp_path / o / "vanilla.safetensors").about for o in ("with", "without")]
    assert {k: v for k, v in about[0].items() if k != "l0"}.items() <= about[1].items()
    assert about[1]["model"] == "gpt2"
    assert "model" not in cached["config"]
    assert without["config"]["model"] == source["model"]
    scored = evaluate.run(
        evaluate.Config(
            run=str(tmp_path / "without"), cache=str(tmp_path / "validation"), device="cpu"
        )
    )
    assert scored["cache"]["held_out"] is True
    assert {run["sae"] for run in scored["runs"]} == {"matryoshka", "vanilla"}
    assert (tmp_path / "without" / "refit" / "vanilla.safetensors").exists()


# --------------------------------------------------------------------------------- what is refused


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    error = capsys.readouterr().err.splitlines()
    error = [line for line in error if line and "%|" not in line]  # no bars
    assert stopped.value.code == 2
    assert len(error) == 1
    assert error[0].startswith("error: ")
    return error[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--cache {W}/cache",
            "--model {W}/gpt2 is in place of a cache: leave out --cache {W}/cache",
        ),
        ("--cache cache/train", "leave out --cache cache/train"),
        ("--model {W}/nowhere", "nowhere"),
        ("--tokens 999999", "holds 1"),
        ("--layer 9", "9"),
        ("--context 999", "--context must be at most"),
        ("--buffer 0", "--buffer must be a whole number between 1 and 1000000000, got 0"),
        ("--rows-at-once -1", "--rows-at-once must be a whole number"),
        ("--n-steps 0", "--n-steps"),
        ("--batch-size 99999", "too few for --batch-size 99999"),
        ("--split nowhere", "holds no nowhere.jsonl"),
        ("--validation-cache {W}/nowhere", "holds no finished cache"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    line = f"--model {world}/gpt2 --dataset {world}/text --layer 1 --context 16 --n-latents 20"
    argv = f"{line} --target-l0 3 --out {tmp_path}/o {flags}".format(W=world).split()
    assert words.format(W=world) in refused(argv, capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flag", ["--layer", "--dataset", "--buffer"])
def test_settings_of_a_model_that_is_not_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    said = refused(["--cache", str(tmp_path), flag, "5"], capsys)
    assert f"{flag} is a setting of a language model, and there is no --model" in said


def test_a_checkpoint_of_another_model_or_text_is_refused(
    config_for: Callable[..., Config], tmp_path: Path
) -> None:
    """And so is one of a cache, or with a cache."""
    text = write_documents(tmp_path / "train.jsonl", make_documents())
    config = config_for(dataset=str(text), n_steps=30, resume=True)
    train.run(config)
    (config.folder / "results.json").unlink()
    with pytest.raises(UserError, match="from a run with --layer 1, not 2"):
        train.run(dataclasses.replace(config, layer=2))
    write_documents(text, ["another beginning", *make_documents()])
    with pytest.raises(UserError, match=r"on other activations than those of .*train\.jsonl"):
        train.run(config)
    cached = Config(**from_cache(config, write_cache(tmp_path / "cache", 800, d_model=16)))
    with pytest.raises(UserError, match=r"on other activations than those of .*/cache: "):
        train.run(cached)
    train.run(dataclasses.replace(cached, out=str(tmp_path / "cached")))
    with pytest.raises(UserError, match="from a run on a cache, which had no --model"):
        train.run(dataclasses.replace(config, out=str(tmp_path / "cached")))
