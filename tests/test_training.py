"""Training from a cache: its figures, its seeds, its settings, where it stops, its L0."""

import dataclasses
import functools
import io
import itertools
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_factory import fresh_processes
from training_cases import (
    N_TOKENS,
    WRITTEN,
    config_for,
    die_with,
    exit_code,
    learnt,
    records_of,
    resumed,
    write_cache,
)

import train
from matryoshka import member_training, training
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import pick_device
from matryoshka.errors import UserError
from matryoshka.kinds import KINDS
from matryoshka.member_training import MemberTraining
from matryoshka.members import members_of
from matryoshka.metrics import fvu
from matryoshka.prefix_draws import expected_reach
from matryoshka.trainer import Trainer
from matryoshka.training import Training
from matryoshka.training_config import TrainingConfig, check_training
from sae import (
    SAE,
    STREAM_PREFIXES,
    matryoshka_loss,
    sample_prefixes,
    seeded_generator,
)
from train import run
from train_tinystories import Config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", N_TOKENS)


@pytest.mark.parametrize(
    ("n_steps", "dead_after"),
    [(1, 5), (41, 5), (41, 6)],  # 2.5 batches or 3: dead after three
)
def test_the_figures_are_what_they_say(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int, dead_after: int
) -> None:
    """FVU, L0 and dead share, recomputed from the batches and from what each step reported."""
    monkeypatch.setattr(training, "N_RECORDS", 10)  # every 4 steps, and the last
    monkeypatch.setattr(member_training, "DEAD_AFTER", dead_after)
    steps_of: dict[int, list[dict[str, torch.Tensor]]] = {10: [], 1: []}  # by n_prefixes
    real = Trainer.step

    def spy(self: Trainer, x: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = steps_of[self.config.n_prefixes]
        steps.append(real(self, x))
        return steps[-1]

    monkeypatch.setattr(Trainer, "step", spy)
    settings = {"n_latents": 60, "n_prefixes": 10, "batch_size": 2}
    config = config_for(cache, tmp_path, n_steps=n_steps, **settings)
    results = run(config)
    records = records_of(tmp_path)
    expected_steps = [1] if n_steps == 1 else [*range(4, 41, 4), 41]
    assert [r["step"] for r in records[::2]] == expected_steps
    for i, name in enumerate(("matryoshka", "vanilla")):
        previous, steps = 0, steps_of[10 if name == "matryoshka" else 1]
        assert len(steps) == n_steps
        for record in records[i::2]:
            assert record["sae"] == name
            step = record["step"]
            l0 = [metrics["l0"][0].item() for metrics in steps[previous:step]]
            assert record["l0"] == pytest.approx(np.mean(l0), rel=1e-6)
            silent = [metrics["mean_square"][0] == 0 for metrics in steps[max(0, step - 3) : step]]
            dead = torch.stack(silent).all(0).double().mean().item() if step >= 3 else None
            assert record["dead_share"] == (None if dead is None else pytest.approx(dead))
            weight = steps[step - 1]["sparsity_weight"][0].item()
            assert record["sparsity_weight"] == pytest.approx(weight)
            previous = step
        result = results["runs"][i]
        final = [metrics["l0"][0].item() for metrics in steps[-2:]]  # 5% of 41
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
        alone_tensors, tensors = (
            safetensors.torch.load_file(tmp_path / folder / f"{name}.safetensors")
            for folder in (name, "both")
        )
        for key in tensors:
            torch.testing.assert_close(alone_tensors[key], tensors[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_latents", [20, 300])
def test_the_same_seed_gives_the_same_bytes(cache: Path, tmp_path: Path, n_latents: int) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(config_for(cache, tmp_path / name, n_latents=n_latents, seed=seed))
    assert set(learnt(tmp_path / "a")) == WRITTEN
    assert learnt(tmp_path / "a") == learnt(tmp_path / "b")
    assert not set(learnt(tmp_path / "a").values()) & set(learnt(tmp_path / "c").values())


def test_products_in_bfloat16_train_nearly_the_same_saes(tmp_path: Path) -> None:
    """What is learnt is in float32, and FVU and L0 agree with those of float32 to 1%."""
    cache = write_cache(tmp_path / "cache", N_TOKENS, d_model=16)
    settings: dict[str, Any] = {"n_latents": 300, "n_steps": 80, "target_l0": 20.0}
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
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self, x: (next(steps), step(self, x))[1])
    run(resumed(config))
    assert next(steps) == 50 - 22
    assert learnt(tmp_path / "out") == learnt(tmp_path / "whole")


def test_divergence_stops_with_the_last_good_metrics(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: the matryoshka SAE has an FVU of") as stopped:
        run(config_for(cache, tmp_path, lr=1e30))
    message, records = str(stopped.value), records_of(tmp_path)
    assert records
    assert all(np.isfinite(record["fvu"]) for record in records)
    for name, said in zip(("matryoshka", "vanilla"), message.split("; step "), strict=True):
        assert f"the {name} SAE has an FVU of" in said
        step = int(said.removeprefix("step ").split(":")[0])
        last = [record for record in records if record["sae"] == name][-1]
        assert last["step"] == step - 1
        assert json.dumps(last) in said
        assert "--lr" in said
    assert not (tmp_path / "results.json").exists()


def test_divergence_after_a_resume_names_the_metrics_of_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(cache, tmp_path)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    real_fvu, real_step = fvu, Training.step

    def stop_at_17(self: Training, x: torch.Tensor) -> Any:
        if self.n_steps_done == 16:
            raise KeyboardInterrupt
        return real_step(self, x)

    monkeypatch.setattr(Training, "step", stop_at_17)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Training, "step", real_step)
    good = [record for record in records_of(tmp_path) if record["step"] == 15]
    monkeypatch.setattr(member_training, "fvu", lambda x, x_hat: real_fvu(x, x_hat) * nan)
    with pytest.raises(UserError, match="step 16: the matryoshka SAE has an FVU of nan") as stopped:
        run(resumed(config))
    assert len(good) == 2
    assert all(json.dumps(record) in str(stopped.value) for record in good)


def test_a_batch_at_fault_is_named_and_the_learning_rate_is_not(
    cache: Path, tmp_path: Path
) -> None:
    state = Training(config_for(cache, tmp_path), ActivationCache(cache), torch.device("cpu"))
    x = next(state.cache.batches(128, 0))
    for _ in range(7):
        state.step(x)
    same, broken = torch.ones_like(x), x.clone()
    broken[3, 2] = torch.nan
    for at_fault, named in (
        (broken, "activations that are not finite"),
        (same, "the batch's activations are all the same"),
    ):
        with pytest.raises(UserError, match=f"step 7: .*{named}") as stopped:
            state.record(at_fault)
        assert "--lr" not in str(stopped.value)
        assert str(stopped.value).count("step 7") == 1, "said once, not once an SAE"
    assert state.members[0].diverged({"step": 7, "fvu": 1e9}, same) == ""


@pytest.mark.parametrize("prefixes", ["sampled", "expected"])
def test_the_loss_of_a_record_is_the_loss_as_sae_py_writes_it(
    cache: Path, tmp_path: Path, prefixes: str
) -> None:
    """Of each SAE as it stands, on the batch, as the next step would descend it there."""
    config = config_for(cache, tmp_path, prefixes=prefixes, sparsity="log", seed=2)
    training = Training(config, ActivationCache(cache), torch.device("cpu"))
    for x in itertools.islice(training.cache.batches(128, 2), 6):
        training.step(x)
    records = training.record(x)
    draws = sample_prefixes(20, 3, seeded_generator(2, STREAM_PREFIXES, 0), 256)
    reach = expected_reach(20, 3)
    shares = reach - torch.cat([reach[1:], torch.zeros(1)])
    for i, member in enumerate(training.members):
        (sae,) = member.trainer.saes
        weight = float(member.trainer.state_dict()["sparsity_weight"])
        lengths, of_length = draws[6], [1 / 3] * 3
        if i == 1:
            lengths, of_length = torch.tensor([20]), [1.0]
        elif prefixes == "expected":
            lengths, of_length = torch.arange(1, 21), shares.tolist()
        # the step would take x's own norm into the running mean: of 7 so far, all weigh the same
        sae.mean_norm.lerp_(x.norm(dim=1).mean(), 1 / 7)
        with torch.no_grad():
            loss = matryoshka_loss(
                x * sae.scale,
                sae.encode(x),
                sae.W_dec,
                sae.b_dec,
                lengths,
                of_length,
                weight,
                "log",
            )
        assert records[i]["loss"] == pytest.approx(float(loss), rel=1e-5)


# What a setting is replaced by, and where a trainer then has it (default: in its config).
OF_TRAINER: dict[str, tuple[Any, Callable[[Trainer], Any]]] = {
    "n_latents": (320, lambda t: t.n_latents),
    "n_prefixes": (7, lambda t: t.config.n_prefixes),
    "activation": ("batchtopk", lambda t: t.activation),
    "target_l0": (7.5, lambda t: t.config.target_l0),
    "lr": (0.02, lambda t: t.config.lr),
    "n_steps": (77, lambda t: t.config.n_steps),
    "sparsity": ("log", lambda t: t.config.sparsity),
    "sparsity_weight": (0.7, lambda t: t.config.sparsity_weight),
    "prefixes": ("expected", lambda t: t.config.prefixes),
    "widths": ((30.0, 300.0), lambda t: t.config.widths),
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
    "unhedged": (0.3, lambda t: t.config.unhedged),
    "auxiliary": ("level", lambda t: t.config.auxiliary),
    "auxiliary_weight": (0.5, lambda t: t.config.auxiliary_weight),
    "dead_after": (77, lambda t: t.config.dead_after),
    "resample_every": (9, lambda t: t.config.resample_every),
    "bandwidth": (0.5, lambda t: t.config.bandwidth),
    "seed": (9, lambda t: t.seeds[0]),
}


def trainers_of(config: TrainingConfig) -> dict[str, Trainer]:
    made = [MemberTraining(m, 16, torch.device("cpu")) for m in members_of(config)]
    return {member.name: member.trainer for member in made}


@pytest.mark.parametrize("name", OF_TRAINER)
def test_a_setting_arrives_at_the_trainer(name: str) -> None:
    value, where = OF_TRAINER[name]
    base = Config(n_latents=300, activation="topk" if name == "auxiliary" else "relu")
    assert getattr(base, name) != value
    config = dataclasses.replace(base, **{name: value})
    trainers = trainers_of(config)
    assert where(trainers["matryoshka"]) == value
    if name not in KINDS["vanilla"]:
        assert where(trainers["vanilla"]) == value
    assert list(trainers) == ["matryoshka", "vanilla"]
    for trainer in trainers.values():
        (sae,) = trainer.saes  # before the first step all latents are as good, and not moved
        assert torch.equal(sae.W_enc, SAE(16, config.n_latents, config.seed).W_enc)
    n_prefixes = [trainer.config.n_prefixes for trainer in trainers.values()]
    assert n_prefixes == [config.n_prefixes, 1], "Matryoshka has them, vanilla one"


def test_which_saes_and_which_targets_arrive(tmp_path: Path) -> None:
    assert list(trainers_of(Config(saes=("vanilla",)))) == ["vanilla"]
    of_targets = trainers_of(Config(saes=("vanilla",), target_l0s=(2.0, 7.5)))
    assert [trainer.config.target_l0 for trainer in of_targets.values()] == [2.0, 7.5]
    (tmp_path / "saes.json").write_text('{"sae": [{"name": "a"}, {"name": "b", "lr": 0.5}]}')
    listed = trainers_of(Config(members=str(tmp_path / "saes.json")))
    assert {name: trainer.config.lr for name, trainer in listed.items()} == {"a": 1e-3, "b": 0.5}


def test_weights_of_widths_arrive() -> None:
    config = Config(n_latents=300, widths=(30.0, 300.0), width_weights=(1.0, 3.0))
    trainers = trainers_of(config)
    assert trainers["matryoshka"].config.width_weights == (1.0, 3.0)
    assert trainers["vanilla"].config.width_weights == ()


def test_a_checkpoint_waits_for_its_seconds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of which every step takes 2 s: of the checkpoints each 3 steps, every other."""
    clock, saved_at = [0.0], []
    step, save = Training.step, Training.save

    def slow_step(self: Training, x: torch.Tensor) -> None:
        clock[0] += 2.0
        step(self, x)

    def noted_save(self: Training) -> None:
        saved_at.append(self.n_steps_done)
        save(self)

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Training, "step", slow_step)
    monkeypatch.setattr(Training, "save", noted_save)
    settings = {"n_steps": 19, "checkpoint_every": 3, "checkpoint_seconds": 7.0}
    run(config_for(cache, tmp_path / "o", **settings))
    assert saved_at == [0, 6, 12, 18, 19]


OF_RUN = {"cache", "tokens", "batch_size", "seed", "out", "resume", "checkpoint_every", "device"}
OF_RUN |= {"checkpoint_seconds"}  # has its test above
OF_RUN |= {"refit"}  # resume and refit have tests of their own
OF_RUN |= {"saes", "target_l0s", "members", "width_weights"}  # have theirs above
OF_RUN |= {"validation_cache", "recipe"}  # in test_member_training.py


def test_the_other_settings_arrive(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real, device = ActivationCache.batches, pick_device

    def batches(self: ActivationCache, size: int, seed: int, *args: Any) -> Any:
        asked.update(cache=str(self.folder), tokens=self.n_tokens, batch_size=size, seed=seed)
        return real(self, size, seed, *args)

    def pick(name: str) -> torch.device:
        asked.update(device=name)
        return device(name)

    monkeypatch.setattr(ActivationCache, "batches", batches)
    monkeypatch.setattr(train, "pick_device", pick)
    settings = {"tokens": 3_000, "batch_size": 40, "seed": 4, "device": "cpu"}
    config = config_for(cache, tmp_path / "o", n_steps=7, checkpoint_every=3, **settings)
    saved_at = []
    original = Training.save

    def save(self: Training) -> None:
        saved_at.append(self.n_steps_done)
        original(self)

    monkeypatch.setattr(Training, "save", save)
    run(config)
    assert asked == {"cache": str(cache), **settings}
    assert saved_at == [0, 3, 6, 7]
    assert (tmp_path / "o" / "results.json").exists()
    assert {f.name for f in dataclasses.fields(Config)} == OF_RUN | set(OF_TRAINER)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger") / "cache"
    return write_cache(folder, 100_000, d_model=24, n_features=96)


@pytest.mark.parametrize("start", [pytest.param(0.02, marks=pytest.mark.slow), 20.0])
def test_l0_ends_at_its_target(larger: Path, tmp_path: Path, start: float) -> None:
    config = config_for(
        larger,
        tmp_path,
        n_latents=64,
        n_prefixes=5,
        target_l0=6.0,
        n_steps=2_000,
        batch_size=128,
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


@pytest.mark.processes
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    n_tokens, d_model = 1_000_000, 32
    folder = write_cache(tmp_path / "cache", n_tokens, d_model=d_model, n_features=8)
    config = config_for(
        folder, tmp_path / "out", n_steps=n_tokens // 8_192, batch_size=8_192, checkpoint_every=100
    )
    context = fresh_processes()
    receive, send = context.Pipe(duplex=False)
    assert exit_code(train_and_measure, config, send, os.getpid()) == 0
    grown = receive.recv()
    shutil.rmtree(folder)
    # 128 MB of activations; two buffers of them are 2 x 17 MB, a third may be being freed, and
    # what an allocator keeps differs from run to run: 23 to 61 MB were seen.
    assert grown < 80e6


def test_a_training_has_at_most_300_records_an_sae() -> None:
    assert training.N_RECORDS == 300


def test_one_activation_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="no variance"):
        check_training(TrainingConfig(batch_size=1))


def test_a_checkpoint_of_no_steps_is_gone_on_from(cache: Path, tmp_path: Path) -> None:
    """A run has one from its beginning on."""
    made = [
        Training(config_for(cache, tmp_path), ActivationCache(cache), torch.device("cpu"))
        for _ in range(2)
    ]
    made[0].save()
    made[1].load()
    assert made[1].n_steps_done == 0
