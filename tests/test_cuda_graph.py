"""cuda_graph.py and the step that it replays: on a GPU where there is one, and without one by its
rules: what is recorded sees no number of Python's again, and may read none back from the device."""

import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from matryoshka import prefix_draws
from matryoshka import trainer as trainer_module
from matryoshka.controls import Phase, Schedule
from matryoshka.cuda_graph import CudaGraph, Function
from matryoshka.prefix_draws import StepPrefixes
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE, seeded_generator

D_MODEL, N_LATENTS, BATCH, N_STEPS = 16, 264, 16, 60
CONFIG = {"n_steps": N_STEPS, "target_l0": 20.0, "lr": 1e-3, "matmul_dtype": "bfloat16"}
CONFIG["gradient"] = "dense"
CONTROLS = [
    {"l0_control": "original", "restart_every": 5},
    {"l0_control": "steady", "sparsity": "log"},
    {"l0_control": "steady", "prefixes": "expected"},
]


def make_trainer(device: str = "cpu", **config: object) -> Trainer:
    saes = [SAE(D_MODEL, N_LATENTS, seed).to(device) for seed in (0, 1)]
    return Trainer(saes, configs_of(**config), [0, 1])


def configs_of(n_prefixes: tuple[int, int] = (10, 1), **config: object) -> list[TrainerConfig]:
    settings = CONFIG | config
    return [TrainerConfig(n_prefixes=n, **settings) for n in n_prefixes]  # type: ignore[arg-type]


def batches(n: int) -> Tensor:
    return torch.randn(n, BATCH, D_MODEL, generator=seeded_generator(0))


class Recorded(CudaGraph):
    """A CudaGraph without a GPU: a list of operators is recorded and replayed.

    As on a GPU, recording computes nothing, Python's numbers become constants, and reading a
    tensor's value raises.
    """

    recorded: Sequence["Recorded"] = ()

    def _call(self, function: Function) -> dict[str, Tensor]:
        return function(*self._inputs)

    def _record(self, function: Function) -> None:
        trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
        operators = trace(*self._inputs)
        Recorded.recorded = [*Recorded.recorded, self]

        class Graph:
            def replay(_) -> None:
                self._outputs = operators(*self._inputs)

        self._graph = Graph()  # type: ignore[assignment]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's way through a step, on the CPU."""
    monkeypatch.setattr(trainer_module, "CudaGraph", Recorded)
    monkeypatch.setattr(Recorded, "recorded", [])


@pytest.mark.parametrize("control", CONTROLS, ids=["original", "steady", "expected"])
def test_a_replayed_step_is_the_step(
    control: dict[str, object], without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through warm-up, restarts and a block's end."""
    for module in (prefix_draws, trainer_module):
        monkeypatch.setattr(module, "STEPS_A_BLOCK", 25)
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    plain, replayed = make_trainer(**control), make_trainer(**control)
    xs = batches(N_STEPS)
    found = [replayed.step(x) for x in xs]
    n_phases = len(replayed._graphs)
    assert n_phases == (3 if "restart_every" in control else 2)
    assert len(Recorded.recorded) == n_phases  # each was replayed
    monkeypatch.setattr(Recorded, "WARM_UP", N_STEPS)  # never recorded
    expected = [plain.step(x) for x in xs]
    assert len(Recorded.recorded) == n_phases
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], tensor)


def test_a_first_step_from_tensors_is_one_from_numbers(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate and the like are Python's numbers on a CPU."""
    numbers, tensors = make_trainer(), make_trainer()
    (x,) = batches(1)
    expected = numbers.step(x)
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    for name, tensor in tensors.step(x).items():
        torch.testing.assert_close(tensor, expected[name])
    for name, tensor in numbers.state_dict().items():
        torch.testing.assert_close(tensors.state_dict()[name], tensor)


def test_what_a_replay_returned_stays(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    trainer = make_trainer()
    found = [trainer.step(x) for x in batches(20)]
    kept = [{name: tensor.clone() for name, tensor in metrics.items()} for metrics in found]
    trainer.step(batches(1)[0])
    for metrics, copy in zip(found, kept, strict=True):
        assert all(torch.equal(metrics[name], copy[name]) for name in copy)
    assert len({float(metrics["l0"][0]) for metrics in found}) > 1


def test_each_size_of_a_batch_has_its_graph(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch of a pass is smaller."""
    plain, replayed = make_trainer(), make_trainer()
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    for i, x in enumerate(batches(20)):
        x = x[: BATCH // 2] if i % 3 == 2 else x
        found = replayed.step(x)
        with monkeypatch.context() as patch:
            patch.setattr(Recorded, "WARM_UP", N_STEPS)
            expected = plain.step(x)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], tensor)


def test_replaying_goes_on_from_a_checkpoint(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph keeps the addresses of the state: loading must not move it."""
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    whole, first, second = (make_trainer() for _ in range(3))
    xs = batches(40)
    for x in xs:
        whole.step(x)
    for x in xs[:20]:
        first.step(x)
        second.step(x.flip(0) + 1)  # recorded, and elsewhere
    second.load_state_dict(first.state_dict())
    for x in xs[20:]:
        second.step(x)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_a_trainer_goes_with_its_last_name(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cycle through its graphs: their memory is a GPU's, and is wanted at once."""
    monkeypatch.setattr(Trainer, "_is_replayed", True)
    gc.disable()
    try:
        trainer = make_trainer()
        for x in batches(5):
            trainer.step(x)
        gone = weakref.ref(trainer)
        monkeypatch.setattr(Recorded, "recorded", [])
        del trainer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", ["d_model", "batch"])
def test_sizes_that_bfloat16_cannot_have_are_refused(size: str) -> None:
    d_model = 20 if size == "d_model" else 16

    def train() -> None:
        trainer = Trainer([SAE(d_model, N_LATENTS)], configs_of()[:1], [0])
        trainer.step(torch.ones(20, d_model))

    with pytest.raises(ValueError, match=f"{size} is 20, not a multiple of 8"):
        train()


@pytest.mark.parametrize("matmul_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n_reaches", [(10, 1), (N_LATENTS, 1)])
@pytest.mark.parametrize("control", CONTROLS[:2], ids=["original", "steady"])
def test_a_step_on_a_gpu_reads_nothing_back(
    control: dict[str, object],
    n_reaches: tuple[int, int],
    matmul_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors that lie on no CPU and hold no values: reading one raises."""
    monkeypatch.setattr(Trainer, "_adam", lambda *_: None)  # torch has none without values
    saes = [SAE(D_MODEL, N_LATENTS, seed).to("meta") for seed in (0, 1)]
    trainer = Trainer(saes, configs_of(matmul_dtype=matmul_dtype, **control), [0, 1])
    with torch.device("meta"):
        x, reach = torch.empty(2, BATCH, D_MODEL), torch.empty(2, N_LATENTS)
        numbers = Schedule(*torch.empty(3).unbind())
    # where `PrefixDraws` puts them: on the device, or where `by_prefix` reads them
    ends_on = "meta" if matmul_dtype == "bfloat16" else "cpu"
    ends = [torch.arange(1, n + 1, device=ends_on) for n in n_reaches]
    ends[1].fill_(N_LATENTS)
    ends[0][-1:].fill_(N_LATENTS)
    with torch.inference_mode():
        for restarts in (False, True):  # never together: a restart is after the warm-up
            phase = Phase(False, restarts, False, next_is_in_warmup=not restarts)
            metrics = trainer._step(x, StepPrefixes(reach, ends), numbers, phase)
            assert {tensor.device.type for tensor in metrics.values()} == {"meta"}
    with pytest.raises(RuntimeError):
        float(metrics["l0"][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("control", CONTROLS, ids=["original", "steady", "expected"])
def test_replays_on_a_gpu(control: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    xs = batches(N_STEPS).cuda()
    replayed, plain = make_trainer("cuda", **control), make_trainer("cuda", **control)
    if not replayed._is_replayed:
        pytest.skip("not of compute capability 9 or 10")
    found = [replayed.step(x) for x in xs]
    monkeypatch.setattr(CudaGraph, "WARM_UP", N_STEPS)
    for ours, x in zip(found, xs, strict=True):
        for name, tensor in plain.step(x).items():
            torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("major", "replayed"), [(8, False), (9, True), (10, True), (12, False)])
def test_a_step_is_replayed_on_hopper_and_blackwell_in_bfloat16(
    major: int, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the GPU says of itself, of which none is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    grads = SimpleNamespace(is_cuda=True, device="cuda:0")
    for dtype, gradient in (("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "autograd")):
        (config,) = configs_of(matmul_dtype=dtype, gradient=gradient)[:1]
        trainer = SimpleNamespace(config=config, _flat_grads=grads)
        expected = replayed and (dtype, gradient) == ("bfloat16", "auto")
        assert Trainer._is_replayed.fget(trainer) == expected  # type: ignore[attr-defined]
