"""The ablation: each defect does what it says to a trainer, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_commands import blank_figures

import train_toy
from matryoshka.errors import UserError
from matryoshka.kernels import Params
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE, seeded_generator
from studies import ablate_toy
from studies.ablate_toy import VARIANTS, Config

N_SAES, N_LATENTS, D_MODEL = 2, 12, 8


def trainer_of(variant: str) -> Trainer:
    saes = [SAE(D_MODEL, N_LATENTS, seed) for seed in range(N_SAES)]
    configs = [TrainerConfig(n_steps=200, target_l0=3.0, n_prefixes=k, lr=0.01) for k in (5, 1)]
    return VARIANTS[variant](saes, configs, [0, 1])


def batches(n: int) -> torch.Tensor:
    return torch.randn(n, 64, D_MODEL, generator=seeded_generator(5)) * 3


def test_the_reference_is_the_trainer_itself():
    assert VARIANTS["none"] is Trainer
    assert list(VARIANTS) == ["none", "moments", "order", "normalizer", "all"]


def moments_by_place(trainer: Trainer, name: str) -> list[torch.Tensor]:
    """Of W_enc, b_enc and W_dec: what the latent in each place has, [n_saes, n_latents, ...]."""
    parts = Params.of(trainer.state_dict()[name], D_MODEL, N_LATENTS)
    order = trainer.order()
    rows = (parts.W_enc, parts.b_enc.mT, parts.W_dec)
    return [t.take_along_dim(order[..., None], dim=1).clone() for t in rows]


def test_moments_stay_in_their_place_when_the_order_changes():
    """The step is the trainer's own; what differs is whose the moments are after it."""
    defect, reference = trainer_of("moments"), trainer_of("none")
    reordered = 0
    for x in batches(30):
        reference.load_state_dict(defect.state_dict())
        order = defect.order()
        reference.step(x)
        defect.step(x)
        for name, tensor in reference.state_dict().items():
            if not name.startswith("adam_mean") and not name.startswith("adam_square"):
                assert torch.equal(tensor, defect.state_dict()[name]), name
        for name in ("adam_mean", "adam_square"):
            parts = Params.of(reference.state_dict()[name], D_MODEL, N_LATENTS)
            rows = (parts.W_enc, parts.b_enc.mT, parts.W_dec)
            old_places = [t.take_along_dim(order[..., None], dim=1) for t in rows]
            for old, new in zip(old_places, moments_by_place(defect, name), strict=True):
                assert torch.equal(old, new)
            last = Params.of(defect.state_dict()[name], D_MODEL, N_LATENTS).b_dec
            assert torch.equal(last, parts.b_dec)
        reordered += not torch.equal(order, defect.order())
    assert reordered > 5, "otherwise nothing was tested"


def test_the_running_mean_square_stays_with_places():
    """Against the original's own form: sort what places hold, then move the latents alike."""
    trainer = trainer_of("order")
    by_place = torch.zeros(N_SAES, N_LATENTS)
    at = torch.arange(N_LATENTS).repeat(N_SAES, 1)
    assert torch.equal(trainer.order(), at)
    for x in batches(30):
        mean_square = trainer.step(x)["mean_square"]
        for i in range(N_SAES):
            by_place[i] = torch.lerp(by_place[i], mean_square[i, at[i]], 1 - 0.95)
            # what a place holds stays there; only the latents are moved by it
            moves = by_place[i].sort(descending=True, stable=True).indices
            at[i] = at[i, moves]
        assert torch.equal(trainer.order(), at)
    assert not torch.equal(at, torch.arange(N_LATENTS).repeat(N_SAES, 1))


def test_the_norm_starts_at_zero():
    trainer, x = trainer_of("normalizer"), batches(2)
    mean = torch.zeros(N_SAES)
    for batch in x:
        trainer.step(batch)
        mean = 0.99 * mean + 0.01 * batch.norm(dim=1).mean()
        torch.testing.assert_close(trainer.state_dict()["mean_norm"], mean)
    right = trainer_of("none")
    right.step(x[0])
    expected = x[0].norm(dim=1).mean().expand(N_SAES)
    torch.testing.assert_close(right.state_dict()["mean_norm"], expected)


def test_all_is_the_three_together():
    everything = VARIANTS["all"]
    for name in ("moments", "order", "normalizer"):
        assert issubclass(everything, VARIANTS[name])
    states = {}
    for name in VARIANTS:
        trainer = trainer_of(name)
        for x in batches(20):
            trainer.step(x)
        states[name] = trainer.state_dict()["params"]
    for name, params in states.items():
        for other in states:
            assert (name == other) == torch.equal(params, states[other]), (name, other)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_toy, "draw", blank_figures)


SHORT: dict[str, Any] = {"seeds": 1, "n_steps": 20, "workers": 1}


@pytest.mark.usefixtures("no_figures")
def test_every_variant_asked_for_is_trained_and_summed_up(tmp_path, capsys):
    args = ["--seeds=1", "--steps=20", "--workers=1", f"--out={tmp_path}"]
    ablate_toy.main([*args, "--variants=none,normalizer"])
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert list(results["variants"]) == ["none", "normalizer"]
    for name, by_sae in results["variants"].items():
        rows = json.loads((tmp_path / name / "results.json").read_text())
        assert rows["config"]["n_steps"] == 20
        for row in rows["runs"]:
            of_sae = by_sae[row["sae"]]
            assert of_sae["fvu"] == row["fvu"]
            assert of_sae["clean_features"] == {str(row["clean_features"]): 1}
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "normalizer" in printed


@pytest.mark.usefixtures("no_figures")
def test_another_ablation_is_not_overwritten(tmp_path):
    ablate_toy.run(Config(out=str(tmp_path), variants="none", **SHORT))
    with pytest.raises(UserError, match="--variants none, not --variants moments: choose another"):
        ablate_toy.run(Config(out=str(tmp_path), variants="moments", **SHORT))
    with pytest.raises(UserError, match="--n-steps 20, not --n-steps 21"):
        ablate_toy.run(Config(out=str(tmp_path), variants="none", **(SHORT | {"n_steps": 21})))
    assert not (Path(tmp_path) / "moments").exists()
    ablate_toy.run(Config(out=str(tmp_path), variants="moments", overwrite=True, **SHORT))


def test_counts_and_medians_are_over_seeds():
    rows = [
        {"sae": sae, "clean_features": clean, "fvu": fvu, "l0": 2 * fvu}
        for sae, clean, fvu in (("matryoshka", 20, 0.1), ("matryoshka", 16, 0.5),
                                ("matryoshka", 20, 0.2), ("vanilla", 11, 0.3))
    ]  # fmt: skip
    summed = ablate_toy.summarise(rows)
    assert summed["matryoshka"] == {"clean_features": {"16": 1, "20": 2}, "fvu": 0.2, "l0": 0.4}
    results = {"config": {"seeds": 3}, "variants": {"none": summed}}
    assert ablate_toy.rows_of(results) == [
        ["none", "2 of 3 (9-99%)", "1 x 16", "0.2000", "0.400", "1 of 3 (1-91%)"]
    ]


@pytest.mark.parametrize("bad", [{"variants": "none,nothing"}, {"seeds": 0}, {"n_steps": -1}])
def test_bad_input_is_refused(tmp_path, bad):
    with pytest.raises(UserError):
        ablate_toy.run(Config(out=str(tmp_path / "out"), **(SHORT | bad)))
    assert not (tmp_path / "out").exists()
