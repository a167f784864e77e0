"""The trainer: its recipe against Adam by hand, resuming, company, order, what it refuses."""

import copy
import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from core_cases import BATCH, D_MODEL, N_LATENTS, batches, make_trainer, rand, states_equal
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka import trainer as trainer_module
from matryoshka.controls import Phase, Schedule
from matryoshka.errors import UserError
from matryoshka.kernels import Params
from matryoshka.kernels.autograd import loss_of
from matryoshka.prefix_draws import StepPrefixes
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import ACTIVATIONS, SAE, WITH_K, matryoshka_loss, sample_prefixes, seeded_generator


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
    for i, sae in enumerate(together.saes):
        for name, tensor in alone[i].saes[0].state_dict().items():
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
    for ours, theirs in zip(whole.saes, second.saes, strict=True):
        assert states_equal(ours.state_dict(), theirs.state_dict())


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
        for ours, theirs in zip(trainer.saes, other.saes, strict=True):
            torch.testing.assert_close(ours(xs[0]), theirs(xs[0]))
    trainer.step(xs[-1])
    other.step(xs[-1])
    pairs = zip(trainer.saes, other.saes, strict=True)
    difference = max((a(xs[0]) - b(xs[0])).abs().max().item() for a, b in pairs)
    assert (difference < 1e-5) == (not left_behind)


def test_latents_are_handed_out_in_order():
    trainer = make_trainer()
    for x in batches(30):
        metrics = trainer.step(x)
    x, state = batches(1)[0], trainer.state_dict()
    order = state["mean_square"].sort(dim=1, descending=True).indices
    params = Params.of(state["params"], D_MODEL, N_LATENTS)
    for i, sae in enumerate(trainer.saes):
        one = params.one(i)
        acts = torch.relu(sae.scale * x @ one.W_enc.T + one.b_enc)
        torch.testing.assert_close(sae.encode(x), acts[:, order[i]])
        # the SAE is the same function whatever the order of its latents
        torch.testing.assert_close(sae(x), (acts @ one.W_dec + one.b_dec) / sae.scale)
    assert metrics["mean_square"].shape == (2, N_LATENTS)


def test_the_order_is_the_running_mean_square():
    trainer = make_trainer(order_decay=0.9)
    expected = torch.zeros(2, N_LATENTS)
    for x in batches(20):
        expected = 0.9 * expected + 0.1 * trainer.step(x)["mean_square"]
    torch.testing.assert_close(trainer.state_dict()["mean_square"], expected)


class Recorder(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_to_the_host():
    """Each read would stall a GPU; the original copies its L0 every step (defect 6).

    On a CPU inputs are looked at first; from there on nothing is read.
    """
    trainer = make_trainer()
    trainer.step(batches(1)[0])
    x = trainer._checked(batches(1)[0])
    with Recorder() as recorder, torch.inference_mode():
        numbers, phase = Schedule.of(trainer.config, 1), Phase.of(trainer.config, 1)
        trainer._step(x, trainer._prefixes.of(1), numbers, phase)
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
    config = TrainerConfig(n_steps=10, target_l0=1.0, n_prefixes=3)
    trainer = Trainer([SAE(D_MODEL, N_LATENTS).to(device)], config, [0])
    tensors = trainer.state_dict()
    tensors.pop("n_steps_done")
    assert {tensor.device.type for tensor in tensors.values()} == {device}
    prefixes = trainer._prefixes.of(0)  # a kernel reads their ends on the host
    assert (prefixes.reach.device.type, prefixes.ends[0].device.type) == (device, "cpu")
    if device != "meta":
        metrics = trainer.step(batches(1)[0].to(device))
        assert {tensor.device.type for tensor in metrics.values()} == {device}


def test_seeds_decide_everything_and_the_global_generator_nothing():
    """The original drew prefixes from NumPy's global generator (defect 9)."""
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
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


def test_gradients_are_clipped_by_sae():
    """Huge inputs to one SAE leave the other's step as it was."""
    quiet, loud = make_trainer(), make_trainer()
    x = rand(2, BATCH, D_MODEL)
    heavy = x * torch.tensor([1.0, 1.0])[:, None, None]
    heavy[1, 0] *= 1e4
    for _ in range(3):
        a, b = quiet.step(x), loud.step(heavy)
    assert b["grad_norm"][1] > a["grad_norm"][1]
    ours, theirs = quiet.saes[0].state_dict(), loud.saes[0].state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_recipe_is_adam_on_the_clipped_gradient_of_the_loss():
    """By hand in float64, from the published settings: any other constant ends elsewhere."""
    n_steps, seed = 60, 3
    sae = SAE(D_MODEL, N_LATENTS, seed).double()
    config = TrainerConfig(n_steps=n_steps, target_l0=2.0, n_prefixes=4)
    trainer = Trainer([sae], config, [seed])
    leaves = [p.detach().clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    first = [torch.zeros_like(p) for p in leaves]
    second = [torch.zeros_like(p) for p in leaves]
    mean_square = torch.zeros(N_LATENTS).double()
    mean_norm, weight = 0.0, 0.2 / 12  # 12 steps of warm-up: 0.2 of 60
    lengths = sample_prefixes(N_LATENTS, 4, seeded_generator(seed, 1, 0), 256)
    for t, x in enumerate(batches(n_steps)):
        x = x.double() * (30 if t % 7 == 0 else 1)
        share = max(0.01, 1 / (t + 1))
        mean_norm += share * (x.norm(dim=1).mean().item() - mean_norm)
        scaled = x * math.sqrt(D_MODEL) / mean_norm
        order = mean_square.argsort(descending=True, stable=True)
        W_enc, b_enc, W_dec, b_dec = (p.requires_grad_() for p in leaves)
        acts = torch.relu(scaled @ W_enc + b_enc)
        loss = matryoshka_loss(
            scaled, acts[:, order], W_dec[order], b_dec, lengths[t], None, weight
        )
        grads = torch.autograd.grad(loss, leaves)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        lr = 0.03 * min(1, t / 3) * (1 - 0.9 * max(0, t - 48) / 12)
        for p, g, m, v in zip(leaves, grads, first, second, strict=True):
            g = g * min(1, 1.0 / (norm + 1e-6))
            m.mul_(0.5).add_(g, alpha=0.5)
            v.mul_(0.9375).add_(g * g, alpha=1 - 0.9375)
            step = (m / (1 - 0.5 ** (t + 1))) / ((v / (1 - 0.9375 ** (t + 1))).sqrt() + 1e-8)
            p.detach_().sub_(lr * step)
        metrics = trainer.step(x)
        grad_norm = torch.tensor([norm]).double()
        torch.testing.assert_close(metrics["grad_norm"], grad_norm, rtol=1e-5, atol=0)
        assert metrics["sparsity_weight"].item() == pytest.approx(weight, rel=1e-5)
        l0 = (acts > 0).double().sum(1).mean().item()
        assert metrics["l0"].item() == pytest.approx(l0)
        mean_square += 0.05 * (metrics["mean_square"][0] - mean_square)
        rises = t + 1 < 12
        weight = 0.2 * (t + 2) / 12 if rises else weight * (1 + (3e-4 if l0 >= 2 else -3e-4))
    final = Params.of(trainer.state_dict()["params"], D_MODEL, N_LATENTS).one(0)
    ours = (final.W_enc.T, final.b_enc[0], final.W_dec, final.b_dec[0])
    for a, b in zip(ours, leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparsity", ["l1", "log"])
def test_the_logged_loss_of_many_prefixes_is_the_loss(sparsity):
    """By its closed form there, which does not loop over every length."""
    trainer = make_trainer(
        n_latents=200,
        n_prefixes=(4, 9),
        dtype=torch.float64,
        prefixes="expected",
        sparsity=sparsity,
    )
    for x in batches(4):
        trainer.step(x)
    (x,), step = batches(1, seed=7), trainer.n_steps_done
    mean_norm = trainer._input_scale.mean_with(trainer._checked(x), 1 / (step + 1))
    scaled = trainer._input_scale.scaled_by(mean_norm, trainer._checked(x))
    objective = trainer._objective(scaled, trainer._prefixes.of(step))
    assert all(len(ends) == 200 for ends in objective.ends)
    for i, loss in enumerate(trainer.loss(x)):
        expected, _ = loss_of(trainer._params.one(i), objective.x[i], i, objective)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("prefixes", ["sampled", "expected"])
@pytest.mark.parametrize("sparsity", ["l1", "log"])
def test_a_step_descends_the_loss_that_is_logged_before_it(sparsity, prefixes):
    """The gradient is the logged loss's slope at every step, so each setting arrives in both."""
    config = {"sparsity": sparsity, "prefixes": prefixes, "sparsity_weight": 5.0}
    trainer = make_trainer(dtype=torch.float64, max_grad_norm=1e9, **config)
    expected = make_trainer(dtype=torch.float64, **config)
    nudge = 1e-7 * rand(*trainer.state_dict()["params"].shape, seed=3, dtype=torch.float64)
    for x in batches(12):
        before, losses = trainer.state_dict(), []
        for params in (before["params"] + nudge, before["params"] - nudge):
            expected.load_state_dict(before | {"params": params})
            losses.append(expected.loss(x))
        trainer.step(x)
        slope = (trainer._flat_grads * nudge).sum(1)
        torch.testing.assert_close((losses[0] - losses[1]) / 2, slope, rtol=1e-5, atol=1e-12)
    lengths = trainer._prefixes.of(11).ends[0]
    assert len(lengths) == (4 if prefixes == "sampled" else N_LATENTS)
    trainer._state["sparsity_weight"].copy_(torch.tensor([5.0, 1.0]))  # each SAE has its own
    reach, price = torch.ones(2, N_LATENTS).double(), torch.tensor([[5.0], [1.0]]).double()
    objective = trainer._objective(x.expand(2, -1, -1).double(), StepPrefixes(reach, [lengths] * 2))
    assert objective.sparsity == sparsity
    torch.testing.assert_close(objective.price, price.expand_as(reach))


def test_what_is_too_small_to_be_seen_in_a_run_is_as_published(monkeypatch):
    asked = {}
    monkeypatch.setattr(trainer_module, "adam", lambda *_, **settings: asked.update(settings))
    make_trainer().step(batches(1)[0])
    assert (asked["eps"], asked["weight_decay"]) == (1e-8, 0.0)
    assert not asked["amsgrad"]
    assert not asked["maximize"]


@pytest.mark.parametrize("made", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_trainer_goes_on_exactly(made):
    trainer, xs = make_trainer(), batches(20)
    for x in xs[:10]:
        trainer.step(x)
    other = made(trainer)
    for x in xs[10:]:
        trainer.step(x)
        other.step(x)
    assert states_equal(trainer.state_dict(), other.state_dict())


def test_steps_past_the_last_stay_where_they_are():
    """The learning rate would be negative there, and training climb."""
    trainer = make_trainer(n_steps=50)
    for x in batches(300):
        trainer.step(x)
    assert trainer.config.learning_rate(299) == trainer.config.learning_rate(50) > 0
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


@pytest.mark.parametrize("norm", [0.0, 1e-22])
@pytest.mark.parametrize("sparsity", ["l1", "log"])
@pytest.mark.parametrize("n_latents", [7, 300])
def test_a_decoder_row_without_a_length_stays_finite(norm, sparsity, n_latents):
    sae = SAE(D_MODEL, n_latents)
    with torch.no_grad():
        sae.W_dec[2] *= norm / sae.W_dec[2].norm()
    config = TrainerConfig(n_steps=10, target_l0=2.0, n_prefixes=3, sparsity=sparsity)
    trainer = Trainer([sae], config, [0])
    for x in batches(3):
        trainer.step(x)
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


def test_a_first_batch_of_zeros_does_no_harm():
    trainer = make_trainer()
    trainer.step(torch.zeros(BATCH, D_MODEL))
    assert all(sae.mean_norm > 0 for sae in trainer.saes)
    for x in batches(5):
        trainer.step(x)
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_refused_before_anything_changes(bad):
    trainer = make_trainer()
    trainer.step(batches(1)[0])
    before, x = trainer.state_dict(), batches(1)[0]
    x[3, 2] = bad
    with pytest.raises(ValueError, match="step 1: x holds values that are not finite"):
        trainer.step(x)
    assert states_equal(before, trainer.state_dict())


@pytest.mark.parametrize("shape", [(BATCH, D_MODEL + 1), (3, BATCH, D_MODEL), (D_MODEL,)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="x must be"):
        make_trainer().step(torch.zeros(shape))


def test_a_batch_of_nothing_is_refused_before_anything_changes():
    trainer = make_trainer()
    before = trainer.state_dict()
    with pytest.raises(ValueError, match="at least one sample"):
        trainer.step(torch.zeros(0, D_MODEL))
    assert states_equal(before, trainer.state_dict())


@pytest.mark.parametrize("name", ["params", "mean_norm", "n_steps_done"])
def test_a_state_that_lacks_something_changes_nothing(name):
    trainer, other = make_trainer(), make_trainer()
    for x in batches(3):
        trainer.step(x)
    state, before = trainer.state_dict(), other.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(state)
    assert states_equal(before, other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saes_and_inputs_of_other_dtypes_are_trained(dtype):
    trainer = make_trainer(dtype=dtype)
    for x in batches(5):
        trainer.step(x.to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {sae.W_dec.dtype for sae in trainer.saes} == {wide}
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


@pytest.mark.parametrize("prefixes", ["sampled", "expected"])
def test_more_prefixes_than_latents_are_refused(prefixes):
    with pytest.raises(ValueError, match="n-prefixes 8 is more than there are latents: 7"):
        make_trainer(n_prefixes=(8, 1), prefixes=prefixes)


def test_what_cannot_be_stepped_together_is_refused(monkeypatch):
    config = TrainerConfig(n_steps=1, target_l0=1.0, n_prefixes=1)
    with pytest.raises(ValueError, match="numbers must be equal"):
        Trainer([SAE(2, 3)], config, [0, 1])
    monkeypatch.setitem(ACTIVATIONS, "other", ACTIVATIONS["relu"])
    with pytest.raises(ValueError, match="same activation"):
        Trainer([SAE(2, 3), SAE(2, 3, activation="other")], config, [0, 1])
    with pytest.raises(ValueError, match="same n_latents"):
        Trainer([SAE(2, 3), SAE(2, 4)], config, [0, 1])
    other = dataclasses.replace(config, lr=0.5)
    with pytest.raises(ValueError, match="not in lr"):
        Trainer([SAE(2, 3), SAE(2, 3)], [config, other], [0, 1])


@pytest.mark.parametrize("gradient", ["auto", "dense", "autograd"])
@pytest.mark.parametrize("n_latents", [7, 300])
def test_every_gradient_trains_the_same_saes(gradient, n_latents):
    auto = make_trainer(n_latents=n_latents)
    other = make_trainer(n_latents=n_latents, gradient=gradient)
    for x in batches(4):
        auto.step(x)
        other.step(x)
    for ours, theirs in zip(auto.saes, other.saes, strict=True):
        torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)
    assert (other.kernels == ("autograd",) * 2) == (gradient == "autograd")


def test_an_sae_hands_on_its_activation_and_what_it_is_about():
    sae = SAE.from_tensors(SAE(D_MODEL, N_LATENTS).state_dict(), about={"name": "mine"})
    config = TrainerConfig(n_steps=1, target_l0=1.0, n_prefixes=1)
    (trained,) = Trainer([sae], config, [0]).saes
    assert (trained.activation, trained.about) == ("relu", {"name": "mine"})


def test_saes_on_two_devices_are_refused():
    config = TrainerConfig(n_steps=1, target_l0=1.0, n_prefixes=1)
    with pytest.raises(ValueError, match="same device"):
        Trainer([SAE(2, 3), SAE(2, 3).to("meta")], config, [0, 1])


def test_an_activation_that_the_kernels_would_get_wrong_is_refused(monkeypatch):
    softplus = torch.nn.functional.softplus
    monkeypatch.setitem(ACTIVATIONS, "softplus", lambda z, _: softplus(z))
    monkeypatch.setitem(ACTIVATIONS, "hard", lambda preacts, gate: preacts * (preacts > 0.1))
    settings = {"n_steps": 9, "target_l0": 1.0, "n_prefixes": 1}
    for name, gradient in (("hard", "auto"), ("relu", "auto"), ("softplus", "autograd")):
        config = TrainerConfig(**settings, gradient=gradient)
        Trainer([SAE(D_MODEL, N_LATENTS, activation=name)], config, [0]).step(batches(1)[0])
    with pytest.raises(ValueError, match="slope of softplus is not 0 or 1"):
        Trainer([SAE(D_MODEL, N_LATENTS, activation="softplus")], TrainerConfig(**settings), [0])


# ------------------------------------------------------- fixed widths, other activations, the dead


def train_one(activation="relu", n_steps=40, xs=None, sae=None, **config):
    settings = {"n_steps": n_steps, "target_l0": 2.0, "lr": 0.01, "n_prefixes": 3} | config
    sae = sae or SAE(D_MODEL, N_LATENTS, 0, activation, 2.0 if activation in WITH_K else None)
    trainer = Trainer([sae], TrainerConfig(**settings), [0])
    for x in batches(n_steps) if xs is None else xs:
        trainer.step(x)
    return trainer


def test_latents_keep_their_places_where_widths_are_fixed():
    trainer = train_one(widths=(2, 4, 7))
    state = trainer.state_dict()
    mean_square = state["mean_square"][0]
    assert not torch.equal(mean_square, mean_square.sort(descending=True).values)
    assert torch.equal(trainer.order(), torch.arange(N_LATENTS)[None])
    stored = Params.of(state["params"], D_MODEL, N_LATENTS).one(0)
    (sae,) = trainer.saes
    assert torch.equal(sae.W_dec, stored.W_dec)
    assert torch.equal(sae.W_enc, stored.W_enc.T)
    drawn = train_one()
    assert not torch.equal(drawn.order(), torch.arange(N_LATENTS)[None])


def test_every_step_has_the_prefixes_of_the_widths():
    trainer = train_one(widths=(0, 2, 7), width_weights=(1, 1, 2), n_steps=3)
    for step in (0, 3, 700):
        reach = trainer._prefixes.of(step).reach[0]
        expected = torch.tensor([0.75] * 2 + [0.5] * 5)
        torch.testing.assert_close(reach, expected)


def test_the_threshold_of_batchtopk_is_the_running_mean_of_the_least_let_through():
    """By hand: of each batch the least of the 2 * 11 largest a_j ||d_j||, as steps go."""
    expected, trainer = 0.0, train_one("batchtopk", xs=[], norm_decay=0.9, n_steps=40)
    for t, x in enumerate(batches(40)):
        share = max(0.1, 1 / (t + 1))
        mean_norm = trainer._input_scale.mean_with(trainer._checked(x), share)
        scaled = trainer._input_scale.scaled_by(mean_norm, trainer._checked(x))[0].double()
        p = Params.of(trainer.state_dict()["params"], D_MODEL, N_LATENTS).one(0)
        acts = torch.relu(scaled @ p.W_enc.double().T + p.b_enc)
        scores = (acts * p.W_dec.double().norm(dim=1)).flatten().sort(descending=True).values
        expected += share * (float(scores[2 * BATCH - 1]) - expected)
        trainer.step(x)
        assert trainer.state_dict()["least"].item() == pytest.approx(expected, rel=1e-4)
    (sae,) = trainer.saes
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(sae.threshold * norms, torch.full((N_LATENTS,), expected).float())


DEAD = {"dead_after": 2 * BATCH, "resample_every": 4, "restart_window": (0.7, 0.9)}


@pytest.mark.parametrize(
    ("activation", "auxiliary"),
    [
        ("relu", "none"),  # an auxiliary loss has nothing to learn there
        *itertools.product(("topk", "batchtopk", "jumprelu"), ("all", "level")),
    ],
)
@pytest.mark.parametrize("n_latents", [N_LATENTS, 300])
def test_resuming_is_exact_whatever_the_activation(activation, auxiliary, n_latents):
    """With the auxiliary loss and resampling, which follow how long each latent was silent."""
    config = DEAD | {"auxiliary": auxiliary, "widths": (0.25, 1.0)}
    xs, k = batches(40), 2.0 if activation in WITH_K else None
    sae = SAE(D_MODEL, n_latents, 0, activation, k)
    with torch.no_grad():
        sae.b_enc[: n_latents // 2] = -30.0  # dead from the start
    whole = train_one(xs=xs, sae=sae, **config)
    first = train_one(xs=xs[:23], sae=sae, **config)
    state = first.state_dict()
    assert (state["silent"] > 0).any()
    second = train_one(xs=[], sae=sae, **config)
    second.load_state_dict(state)
    for x in xs[23:]:
        second.step(x)
    assert states_equal(whole.state_dict(), second.state_dict())
    without = train_one(xs=xs, sae=sae, widths=(0.25, 1.0))
    assert not torch.equal(whole.saes[0].W_dec, without.saes[0].W_dec)


def test_dead_latents_start_anew_when_it_is_time():
    """After 2 batches of silence, at the steps whose turn it is, within the window."""
    sae = SAE(D_MODEL, N_LATENTS)
    with torch.no_grad():
        sae.b_enc[3] = -1e4
    config = {"dead_after": 2 * BATCH, "resample_every": 4, "restart_window": (0.2, 0.5)}
    biases = []
    trainer = train_one(xs=[], sae=sae, n_steps=40, **config)
    for x in batches(40):
        trainer.step(x)
        p = Params.of(trainer.state_dict()["params"], D_MODEL, N_LATENTS)
        biases.append(float(p.b_enc[0, 0, 3]))
    assert all(bias < -9e3 for bias in biases[:8])
    assert biases[8] == 0.0, "step 8 is 0.2 of 40, and a multiple of 4"
    late = train_one(sae=sae, n_steps=40, **config | {"restart_window": (0.9, 1.0)}, xs=batches(36))
    assert float(Params.of(late.state_dict()["params"], D_MODEL, N_LATENTS).b_enc[0, 0, 3]) < -9e3


def test_an_auxiliary_loss_of_relu_is_refused():
    config = TrainerConfig(n_steps=9, target_l0=2.0, n_prefixes=2, auxiliary="all")
    with pytest.raises(UserError, match="--auxiliary does nothing for relu"):
        Trainer([SAE(D_MODEL, N_LATENTS)], config, [0])


def test_an_sae_of_another_k_than_the_target_is_refused():
    config = TrainerConfig(n_steps=9, target_l0=3.0, n_prefixes=2)
    with pytest.raises(ValueError, match=r"k = 2 must have that as target_l0, not 3"):
        Trainer([SAE(D_MODEL, N_LATENTS, 0, "batchtopk", 2.0)], config, [0])
