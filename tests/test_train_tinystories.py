"""The write-up's comparison: its settings, its flags, Ctrl-C before it has begun."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import ROOT

import train
import train_tinystories
from matryoshka import training_report
from matryoshka.command_line import parse
from matryoshka.live_config import OF_MODEL
from matryoshka.member_training import MemberTraining
from matryoshka.members import members_of
from train_tinystories import Config


def test_the_published_recipe() -> None:
    """What the write-up trained TinyStories with: nobody changes it without this being seen."""
    config = Config()
    members = members_of(config)
    trainers = [MemberTraining(m, 16, torch.device("cpu")).trainer for m in members]
    assert config.batch_size == 1024
    assert [(t.n_latents, t.seeds, t.activation) for t in trainers] == [(3072, [0], "relu")] * 2
    assert [trainer.config.n_prefixes for trainer in trainers] == [10, 1]
    matryoshka, vanilla = (dataclasses.asdict(trainer.config) for trainer in trainers)
    assert matryoshka | {"n_prefixes": 1} == vanilla
    found = matryoshka
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
        "widths": (),
        "width_weights": (),
        "auxiliary": "none",
        "resample_every": 0,
    }
    assert {name: found[name] for name in recipe} == recipe
    assert training_report.DEAD_AFTER == 2_000_000
    assert not config.refit


@pytest.mark.parametrize(
    "flags", [["--sae", "topk"], ["--sparsity", "l2"], ["--n-steps", "many"], ["--topk", "3"]]
)
def test_unknown_flags_exit_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tinystories.main(flags)
    assert stopped.value.code == 2


def test_ctrl_c_during_the_imports_prints_nothing(tmp_path: Path) -> None:
    """Here the one that takes longest sends it."""
    stub = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(stub)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_tinystories.py")],
        capture_output=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_what_the_write_up_does_not_name_is_as_in_train_py() -> None:
    """The two scripts differ in where the SAEs go, and train.py takes a language model, too."""
    ours, general = dataclasses.asdict(Config()), dataclasses.asdict(train.Config())
    assert {name for name in ours if ours[name] != general[name]} == {"out"}
    assert general.keys() - ours.keys() == set(OF_MODEL)


@pytest.mark.parametrize("flags", [["--sae", "vanilla"], ["--saes", "vanilla"], ["--sae=vanilla"]])
def test_one_sae_is_asked_for_as_before(flags: list[str]) -> None:
    assert parse(Config, "", flags).saes == ("vanilla",)
