"""The trainer's settings: published values, the schedule, what is refused."""

import dataclasses
import math

import pytest

from matryoshka.errors import UserError
from matryoshka.trainer_config import TrainerConfig, shared_settings

CONFIG = TrainerConfig(n_steps=40_000, target_l0=1.2338)


def test_the_published_recipe():
    """The original's settings for the toy: nobody changes one without this being seen."""
    assert dataclasses.asdict(CONFIG) == {
        "n_steps": 40_000, "target_l0": 1.2338, "n_prefixes": 10, "prefixes": "sampled",
        "widths": (), "width_weights": (), "auxiliary": "none", "auxiliary_weight": 1 / 32,
        "dead_after": 250_000, "resample_every": 0, "bandwidth": 0.001,
        "sparsity": "l1", "sparsity_weight": 0.2, "sparsity_warmup": 0.2,
        "l0_control": "original", "lr": 0.03, "lr_warmup_steps": 100, "lr_decay": 0.2,
        "lr_end": 0.1, "betas": (0.5, 0.9375), "max_grad_norm": 1.0, "norm_decay": 0.99,
        "order_decay": 0.95, "restart_every": 0, "restart_window": (0.2, 0.8),
        "unhedged": 0.0,
        "gradient": "auto", "matmul_dtype": "float32",
    }  # fmt: skip


def test_learning_rate_warms_up_stays_and_decays():
    by_hand = {0: 0.0, 50: 0.5, 100: 1.0, 20_000: 1.0, 32_000: 1.0, 36_000: 0.55, 40_000: 0.1}
    for step, share in by_hand.items():
        assert CONFIG.learning_rate(step) == pytest.approx(0.03 * share)
    assert CONFIG.learning_rate(10**6) == CONFIG.learning_rate(40_000)


def test_the_warm_up_is_short_where_training_is():
    config = dataclasses.replace(CONFIG, n_steps=200)
    assert config.learning_rate(5) == pytest.approx(0.015)  # 200 // 20 = 10 steps
    assert config.learning_rate(10) == pytest.approx(0.03)


def test_the_sparsity_weight_rises_over_its_share_of_the_steps():
    assert CONFIG.n_warmup_steps == 8_000
    assert CONFIG.weight_in_warmup(0) == pytest.approx(0.2 / 8_000)
    assert CONFIG.weight_in_warmup(3_999) == pytest.approx(0.1)
    assert CONFIG.weight_in_warmup(9_000) == 0.2
    assert dataclasses.replace(CONFIG, sparsity_warmup=0.0).n_warmup_steps == 1


def test_restarts_have_a_window():
    config = dataclasses.replace(CONFIG, restart_every=100)
    steps = [step for step in range(40_001) if config.restarts_at(step)]
    assert steps == list(range(8_000, 32_001, 100))
    assert not any(CONFIG.restarts_at(step) for step in range(40_001))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_steps": 0}, "--n-steps"), ({"target_l0": math.nan}, "--target-l0"),
        ({"target_l0": 21}, "--target-l0 21 is more than there are latents: 20"),
        ({"n_prefixes": 21}, "--n-prefixes 21"), ({"lr": math.inf}, "--lr"), ({"lr": 0}, "--lr"),
        ({"sparsity_weight": 0}, "--sparsity-weight"),
        ({"sparsity_weight": 1e39}, "--sparsity-weight is more"),
        ({"max_grad_norm": 1e300}, "--max-grad-norm is more"), ({"lr": 1e39}, "--lr is more"),
        ({"max_grad_norm": 0}, "--max-grad-norm"),
        ({"restart_every": -1}, "--restart-every"), ({"lr_end": -1}, "--lr-end"),
        ({"lr_warmup_steps": -1}, "--lr-warmup-steps"), ({"lr_decay": 1.1}, "--lr-decay"),
        ({"sparsity_warmup": -0.1}, "--sparsity-warmup"), ({"norm_decay": 2}, "--norm-decay"),
        ({"order_decay": math.nan}, "--order-decay"), ({"betas": (0.5, 1.0)}, "--betas"),
        ({"betas": (-0.1, 0.9)}, "--betas"), ({"restart_window": (0.2, 1.1)}, "--restart-window"),
        ({"restart_window": (-0.1, 0.8)}, "--restart-window"),
        ({"restart_window": (0.8, 0.2)}, "--restart-window"),
        ({"matmul_dtype": "bfloat16"}, "--n-latents 20"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(change, named):
    CONFIG.check(20)
    with pytest.raises(UserError) as refused:
        dataclasses.replace(CONFIG, **change).check(20)
    assert named in str(refused.value)


def test_bfloat16_takes_multiples_of_eight():
    config = dataclasses.replace(CONFIG, matmul_dtype="bfloat16")
    config.check(300, 64)
    with pytest.raises(UserError, match="--batch-size is 60, not a multiple of 8"):
        config.check(300, 60)


def test_a_training_of_a_few_steps_has_no_warm_up():
    config = dataclasses.replace(CONFIG, n_steps=10)
    assert config.learning_rate(1) == pytest.approx(0.03)


def test_settings_that_a_stack_shares_are_refused_where_they_differ():
    other = dataclasses.replace(CONFIG, n_prefixes=1)
    assert shared_settings([CONFIG, other]) == CONFIG
    for change in ({"lr": 1.0}, {"gradient": "dense"}, {"betas": (0.1, 0.2)}):
        with pytest.raises(ValueError, match=f"not in {next(iter(change))}"):
            shared_settings([CONFIG, dataclasses.replace(CONFIG, **change)])
