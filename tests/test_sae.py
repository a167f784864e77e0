"""sae.py against loops in float64, autograd, closed forms, and the defects of the original code."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import sae as sae_module
from gradients import Params
from sae import (
    SAE,
    Trainer,
    TrainerConfig,
    expected_reach,
    prefix_probabilities,
    reach,
    sample_prefixes,
    seeded_generator,
)

D_MODEL, N_LATENTS, BATCH = 5, 7, 11


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded_generator(seed, 99), dtype=dtype)


def make_trainer(seeds=(0, 1), n_prefixes=(4, 1), n_latents=N_LATENTS, **config):
    config = {"n_steps": 200, "target_l0": 2.0, "lr": 0.01} | config
    stack = SAE.stack([SAE(D_MODEL, n_latents, seed) for seed in seeds])
    return Trainer(stack, TrainerConfig(**config), list(seeds), list(n_prefixes))


def batches(n, seed=0):
    return [3 * rand(BATCH, D_MODEL, seed=1000 * seed + i) for i in range(n)]


def states_equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


# ------------------------------------------------------------------------------------- prefixes


def test_prefix_probabilities_are_the_formula():
    p = prefix_probabilities(50)
    weights = [math.sqrt(m) - math.sqrt(m - 1) for m in range(1, 50)]
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(p, expected)


def test_prefixes_are_drawn_by_the_formula_without_replacement():
    """Against every ordered draw of two lengths, enumerated."""
    n_latents, n_draws = 6, 200_000
    p = prefix_probabilities(n_latents).tolist()
    drawn = sample_prefixes(n_latents, 3, seeded_generator(0), n_draws)
    assert (drawn[:, -1] == n_latents).all()
    assert (drawn.diff(dim=1) > 0).all()
    for low, high in itertools.combinations(range(1, n_latents), 2):
        a, b = p[low - 1], p[high - 1]
        exact = a * b / (1 - a) + b * a / (1 - b)
        seen = ((drawn[:, 0] == low) & (drawn[:, 1] == high)).double().mean().item()
        assert abs(seen - exact) < 5 * math.sqrt(exact * (1 - exact) / n_draws)


@given(n_latents=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_reach_counts_prefixes(n_latents, data):
    n_prefixes = data.draw(st.integers(1, n_latents))
    prefixes = sample_prefixes(n_latents, n_prefixes, seeded_generator(n_latents), 3)
    for row, shares in zip(prefixes, reach(prefixes, n_latents), strict=True):
        counts = [sum(int(m) >= place for m in row) for place in range(1, n_latents + 1)]
        torch.testing.assert_close(shares, torch.tensor(counts) / n_prefixes)


@pytest.mark.parametrize(("n_latents", "n_prefixes"), [(2, 2), (6, 1), (6, 3), (6, 5), (6, 6)])
def test_expected_reach_is_the_mean_over_every_draw(n_latents, n_prefixes):
    """Against every ordered draw without replacement, enumerated with its probability."""
    p = prefix_probabilities(n_latents).tolist()
    expected = torch.zeros(n_latents, dtype=torch.float64)
    for lengths in itertools.permutations(range(1, n_latents), n_prefixes - 1):
        probability, left = 1.0, 1.0
        for m in lengths:
            probability *= p[m - 1] / left
            left -= p[m - 1]
        shares = [sum(m >= j for m in (*lengths, n_latents)) for j in range(1, n_latents + 1)]
        expected += probability * torch.tensor(shares, dtype=torch.float64) / n_prefixes
    assert (expected_reach(n_latents, n_prefixes) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("n_latents", "n_prefixes"), [(20, 10), (300, 10), (200, 60)])
def test_expected_reach_is_the_mean_of_many_draws(n_latents, n_prefixes):
    draws = reach(sample_prefixes(n_latents, n_prefixes, seeded_generator(1), 50_000), n_latents)
    exact = expected_reach(n_latents, n_prefixes)
    error = draws.double().std(0) / math.sqrt(50_000)
    assert ((draws.double().mean(0) - exact).abs() <= 5 * error + 1e-6).all()
    assert exact.sum() * n_prefixes > n_latents  # and the inclusion probabilities add up:
    assert abs(float(exact[0]) - 1) < 1e-9


def test_the_loss_at_the_expected_reach_is_the_mean_loss():
    """Many sampled gradients average to that of the expected loss."""
    sampled, exact = (
        make_trainer(seeds=(0,), n_prefixes=(4,), prefixes=kind, sparsity_weight=1.0)
        for kind in ("sampled", "expected")
    )
    x = batches(1)[0]
    for trainer in (sampled, exact):
        trainer.config = dataclasses.replace(trainer.config, lr=0.0, max_grad_norm=1e9)
    exact.step(x)
    gradients = []
    for _ in range(3000):
        sampled.step(x)
        sampled._state["mean_square"].copy_(exact._state["mean_square"] * 0)  # the same order
        sampled._state["mean_norm"].copy_(exact._state["mean_norm"])
        sampled._state["sparsity_weight"].fill_(sampled.config.weight_in_warmup(0))
        gradients.append(sampled._grads.clone())
    gradients = torch.stack(gradients).double()
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - exact._grads).abs() <= 5 * error + 1e-5).all()


def test_impossible_prefixes_are_refused():
    for n_prefixes in (0, 6):
        with pytest.raises(ValueError, match="within 1 and 5"):
            sample_prefixes(5, n_prefixes, seeded_generator(0))


# ------------------------------------------------------------------------------------------- SAE


def test_sae_is_its_equations():
    sae = SAE(D_MODEL, N_LATENTS, seed=1)
    sae.mean_norm.fill_(3.0)
    x = rand(BATCH, D_MODEL)
    scale = math.sqrt(D_MODEL) / 3.0
    acts = torch.relu(scale * x @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), (acts @ sae.W_dec + sae.b_dec) / scale)
    two = (acts[:, :2] @ sae.W_dec[:2] + sae.b_dec) / scale
    torch.testing.assert_close(sae.decode(acts, prefix=2), two)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((N_LATENTS,), 0.1))
    assert abs(SAE(400, 400).W_enc.std().item() * math.sqrt(400) - 1) < 0.02


def test_save_and_load(tmp_path):
    sae = SAE(D_MODEL, N_LATENTS, seed=4)
    sae.mean_norm.fill_(2.5)
    sae.save(tmp_path / "sae.safetensors")
    loaded = SAE.load(tmp_path / "sae.safetensors")
    assert states_equal(sae.state_dict(), loaded.state_dict())
    assert (loaded.d_model, loaded.n_latents) == (D_MODEL, N_LATENTS)
    import safetensors

    with safetensors.safe_open(tmp_path / "sae.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["sae"])
    assert config == {"d_model": D_MODEL, "n_latents": N_LATENTS}

    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SAE.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"W": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an SAE"):
        SAE.load(tmp_path / "other.safetensors")


def test_a_stack_is_its_saes():
    saes = [SAE(D_MODEL, N_LATENTS, seed) for seed in range(3)]
    x = rand(3, BATCH, D_MODEL)
    stack = SAE.stack(saes)
    torch.testing.assert_close(stack(x), torch.stack([s(x[i]) for i, s in enumerate(saes)]))
    for one, back in zip(saes, stack.unstack(), strict=True):
        assert states_equal(one.state_dict(), back.state_dict())


# --------------------------------------------------------------------------------------- trainer


def test_in_company_as_alone():
    """Three SAEs stepped together end where each ends alone."""
    seeds, prefixes = (3, 4, 5), (4, 1, 2)
    together = make_trainer(seeds, prefixes)
    alone = [make_trainer([s], [k]) for s, k in zip(seeds, prefixes, strict=True)]
    xs = [3 * rand(3, BATCH, D_MODEL, seed=i) for i in range(60)]
    for x in xs:
        together.step(x)
        for i, trainer in enumerate(alone):
            trainer.step(x[i : i + 1])
    for i, sae in enumerate(together.sae.unstack()):
        for name, tensor in alone[i].sae.unstack()[0].state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_stop_and_resume_is_not_stopping():
    """Bit for bit; the original forgot its sparsity weight and step count (defect 5)."""
    xs = batches(300)
    whole, first = make_trainer(n_steps=300), make_trainer(n_steps=300)
    for x in xs:
        whole.step(x)
    for x in xs[:270]:
        first.step(x)
    state = first.state_dict()
    assert state["sparsity_weight"].tolist() != [0.2, 0.2]  # there is something to forget
    second = make_trainer(n_steps=300)
    second.load_state_dict(state)
    for x in xs[270:]:
        second.step(x)
    assert states_equal(whole.state_dict(), second.state_dict())
    assert states_equal(whole.sae.state_dict(), second.sae.state_dict())


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="params"):
        make_trainer().load_state_dict(make_trainer(n_latents=9).state_dict())


def test_state_dict_is_a_copy():
    trainer = make_trainer()
    state = trainer.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    trainer.step(batches(1)[0])
    assert states_equal(before, state)


def permuted(trainer, order, left_behind=()):
    """The trainer's state with its stored latents permuted, except in what is `left_behind`."""
    state = trainer.state_dict()
    for name in {"params", "adam_mean", "adam_square"} - set(left_behind):
        parts = Params.of(state[name], D_MODEL, N_LATENTS)
        moved = [parts.W_enc[:, order], parts.b_enc[:, :, order], parts.W_dec[:, order]]
        state[name] = torch.cat([p.flatten(1) for p in (*moved, parts.b_dec)], dim=1)
    if "mean_square" not in left_behind:
        state["mean_square"] = state["mean_square"][:, order]
    return state


@pytest.mark.parametrize("left_behind", [(), ("adam_mean",), ("adam_square",), ("mean_square",)])
def test_permuting_latents_changes_nothing(left_behind):
    """Neither the function nor the next step: moments and running means belong to their latents.

    Leaving one behind, as the original does (defects 1 and 2), does change the next step.
    """
    xs = batches(40)
    trainer, other = make_trainer(), make_trainer()
    for x in xs[:-1]:
        trainer.step(x)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    other.load_state_dict(permuted(trainer, order, left_behind))
    if not left_behind:
        torch.testing.assert_close(trainer.sae(xs[0]), other.sae(xs[0]))
    trainer.step(xs[-1])
    other.step(xs[-1])
    difference = (trainer.sae(xs[0]) - other.sae(xs[0])).abs().max().item()
    assert (difference < 1e-5) == (not left_behind)


def test_latents_are_handed_out_in_order():
    trainer = make_trainer()
    for x in batches(30):
        metrics = trainer.step(x)
    x = batches(1)[0]
    state = trainer.state_dict()
    ranked = state["mean_square"].sort(dim=1, descending=True).values
    assert (ranked.diff(dim=1) <= 0).all()
    # the SAE is the same function whatever the order of its latents
    params = Params.of(state["params"], D_MODEL, N_LATENTS)
    scale = trainer.sae.scale
    acts = torch.relu(scale * x @ params.W_enc.mT + params.b_enc)
    torch.testing.assert_close(trainer.sae(x), (acts @ params.W_dec + params.b_dec) / scale)
    order = state["mean_square"].sort(dim=1, descending=True).indices
    torch.testing.assert_close(trainer.sae.encode(x), acts.take_along_dim(order[:, None], dim=2))
    assert metrics["mean_square"].shape == (2, N_LATENTS)


def test_the_order_is_the_running_mean_square():
    trainer = make_trainer(order_decay=0.9)
    expected = torch.zeros(2, N_LATENTS)
    for x in batches(20):
        expected = 0.9 * expected + 0.1 * trainer.step(x)["mean_square"]
    torch.testing.assert_close(trainer.state_dict()["mean_square"], expected)


def test_inputs_are_scaled_right_from_the_first_step():
    """The original's scale is 100 times too large at first (defect 3)."""
    trainer = make_trainer()
    norms = []
    for x in batches(250):
        trainer.step(x)
        norms.append(x.norm(dim=1).mean().item())
        running = trainer.state_dict()["mean_norm"][0].item()
        if len(norms) <= 100:  # a plain mean so far
            assert abs(running - sum(norms) / len(norms)) < 1e-4
    ema = sum(norms[:100]) / 100
    for norm in norms[100:]:
        ema = 0.99 * ema + 0.01 * norm
    assert abs(running - ema) < 1e-4


def test_fvu_of_a_prefix_is_of_all_latents_up_to_it():
    """The original would have scored a block's output by itself (defect 4)."""
    sae = SAE(D_MODEL, N_LATENTS)
    x = rand(BATCH, D_MODEL)
    acts = sae.encode(x)
    for m in range(N_LATENTS + 1):
        x_hat = (
            sum((acts[:, j, None] * sae.W_dec[j] for j in range(m)), torch.zeros_like(x))
            / sae.scale
        )
        torch.testing.assert_close(
            evaluate.fvu(x, sae.decode(acts, prefix=m)),
            ((x - x_hat) ** 2).sum().double() / ((x - x.mean(0)) ** 2).sum(),
            check_dtype=False,
        )


class Recorder(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_to_the_host():
    """Each read would stall a GPU; the original copies its L0 every step (defect 6)."""
    trainer = make_trainer()
    trainer.step(batches(1)[0])
    with Recorder() as recorder:
        trainer.step(batches(1)[0])
    assert any("bmm" in name for name in recorder.names)
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"}
    assert not reads & set(recorder.names)
    with Recorder() as recorder:
        float(rand(1))
    assert reads & set(recorder.names)  # the recorder would have seen one


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_all_state_lives_on_the_saes_device(device):
    """The original made its optimizer before the move, and a CUDA scaler everywhere (defect 7)."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    stack = SAE.stack([SAE(D_MODEL, N_LATENTS)]).to(device)
    trainer = Trainer(stack, TrainerConfig(n_steps=10, target_l0=1.0), [0], [3])
    tensors = trainer.state_dict()
    tensors.pop("n_steps_done")
    assert {tensor.device.type for tensor in tensors.values()} == {device}
    if device != "meta":
        metrics = trainer.step(batches(1)[0].to(device))
        assert {tensor.device.type for tensor in metrics.values()} == {device}


def test_seeds_decide_everything_and_the_global_generator_nothing():
    """The original drew prefixes from NumPy's global generator (defect 9)."""
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        import numpy as np

        np.random.seed(global_seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        trainer = make_trainer()
        for x in batches(5):
            trainer.step(x)
        results.append(trainer.state_dict())
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert states_equal(*results)
    assert not states_equal(results[0], make_trainer(seeds=(7, 8)).state_dict())


def test_vanilla_is_one_prefix():
    """With one prefix every reach is 1, whatever the order."""
    trainer = make_trainer(seeds=(0,), n_prefixes=(1,))
    for x in batches(3):
        trainer.step(x)
        assert (trainer._reaches == 1).all()


def test_prefixes_differ_by_seed_step_and_block():
    trainer = make_trainer(seeds=(0, 1), n_prefixes=(4, 4), n_latents=500)
    rows = torch.cat(trainer._draw_prefixes(0) + trainer._draw_prefixes(1))  # [4 * 256, 4]
    assert len(torch.unique(rows, dim=0)) > 0.99 * len(rows)


def test_learning_rate_warms_up_stays_and_decays():
    config = TrainerConfig(n_steps=40_000, target_l0=1.0, lr=0.03)
    by_hand = {0: 0.0, 50: 0.5, 100: 1.0, 20_000: 1.0, 32_000: 1.0, 36_000: 0.55, 40_000: 0.1}
    for step, share in by_hand.items():
        assert config.learning_rate(step) == pytest.approx(0.03 * share)


def test_sparsity_weight_warms_up_then_follows_l0():
    up = make_trainer(seeds=(0,), n_prefixes=(2,), target_l0=0.0, n_steps=100)  # always at or over
    down = make_trainer(seeds=(0,), n_prefixes=(2,), target_l0=99.0, n_steps=100)
    for t, x in enumerate(batches(30)):
        above, below = up.step(x)["sparsity_weight"], down.step(x)["sparsity_weight"]
        n_moves = max(0, t - 19)  # the warm-up's last step is the first that moves the weight
        ramp = min(1, (t + 1) / 20)
        assert above.item() == pytest.approx(0.2 * ramp * (1 + 3e-4) ** n_moves, rel=1e-5)
        assert below.item() == pytest.approx(0.2 * ramp * (1 - 3e-4) ** n_moves, rel=1e-5)


@pytest.mark.parametrize("start", [0.02, 0.2, 2.0, 20.0])
def test_steady_control_reaches_the_target_l0_from_any_start(start):
    """Within 1%, averaged over the last 5% of the steps, and with no latent killed on the way."""
    n_steps, target = 2_000, 6.0
    truth = torch.nn.functional.normalize(rand(48, 16), dim=1)
    stack = SAE.stack([SAE(16, 48, 0), SAE(16, 48, 0)])
    config = TrainerConfig(n_steps, target, lr=3e-3, sparsity_weight=start, l0_control="steady")
    trainer = Trainer(stack, config, [0, 0], [5, 1])
    generator, l0s, fired = seeded_generator(0), [], torch.zeros(2, 48)
    for t in range(n_steps):
        active = torch.rand(256, 48, generator=generator) < 0.1
        x = (active * torch.rand(256, 48, generator=generator)) @ truth
        metrics = trainer.step(x)
        if t >= 0.95 * n_steps:
            l0s.append(metrics["l0"])
            fired += metrics["mean_square"]
    mean = torch.stack(l0s).mean(0)
    assert ((mean / target - 1).abs() < 0.01).all(), mean
    assert (fired > 0).double().mean() > 0.97


def test_a_lost_feature_is_restarted_and_a_found_one_is_left_alone():
    """Two orthogonal features, two latents: one latent on each, or the second on nothing."""
    x = torch.eye(2).repeat(8, 1) * 3
    found = SAE(2, 2)
    with torch.no_grad():
        found.W_enc.copy_(torch.eye(2))
        found.W_dec.copy_(torch.eye(2))
    lost = SAE.from_tensors(found.state_dict())
    with torch.no_grad():
        lost.W_enc[:, 1] = -lost.W_enc[:, 1]  # never fires, so no gradient would move it
    config = TrainerConfig(
        n_steps=10, target_l0=1.0, lr=0.0, restart_every=1, restart_window=(0, 1)
    )
    trainer = Trainer(SAE.stack([found, lost]), config, [0, 0], [1, 1])
    for moments in ("adam_mean", "adam_square"):
        trainer._state[moments].fill_(1.0)
    # lr 0, and Adam's moments of what is restarted are forgotten
    trainer.step(x)
    ours, other = trainer.sae.unstack()
    assert evaluate.fvu(x, ours(x)) < 1e-6
    assert evaluate.fvu(x, other(x)) < 1e-6
    state = trainer.state_dict()
    kept, moved = Params.of(state["adam_square"], 2, 2).W_dec
    assert (kept > 0).all()
    assert ((moved == 0).all(dim=1)).tolist() == [False, True]


def test_gradients_are_clipped_by_sae():
    """Huge inputs to one SAE leave the other's step as it was."""
    quiet, loud = make_trainer(), make_trainer()
    x = rand(2, BATCH, D_MODEL)
    heavy = x * torch.tensor([1.0, 1.0])[:, None, None]
    heavy[1, 0] *= 1e4
    for _ in range(3):
        a, b = quiet.step(x), loud.step(heavy)
    assert b["grad_norm"][1] > a["grad_norm"][1]
    ours, theirs = quiet.sae.unstack()[0].state_dict(), loud.sae.unstack()[0].state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_a_stack_of_another_length_is_refused():
    with pytest.raises(ValueError, match="as many"):
        Trainer(SAE.stack([SAE(2, 3)]), TrainerConfig(n_steps=1, target_l0=1.0), [0, 1], [1, 1])


def test_streams_of_random_numbers_differ():
    assert sae_module.STREAM_INIT != sae_module.STREAM_PREFIXES
    a, b = (torch.rand(4, generator=seeded_generator(0, stream)) for stream in (0, 1))
    assert not torch.equal(a, b)


def test_no_two_seeds_or_streams_share_a_generator():
    big = 2**32
    keys = [(5,), (5, 0), (5, 1), (5, 1, 0), (5, 0, 1), (5 + 10 * big, 11), (5, 10, 11), (big, 5), (-5,)]
    drawn = [tuple(torch.rand(2, generator=seeded_generator(*key)).tolist()) for key in keys]
    assert len(set(drawn)) == len(keys)
