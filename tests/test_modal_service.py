"""The comparison where containers are killed and commands come twice, on a stand-in for Modal."""

import functools
import json
import os
import random
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modal_service
import pytest
from modal_cases import files, launch_for, write_data
from modal_service import NoMount, Service

import evaluate
import modal_tinystories
from matryoshka import cache_config, volume_caches
from matryoshka.errors import UserError
from matryoshka.leases import Work
from matryoshka.modal_launch import Launch
from matryoshka.training import Training

STEPS, CHECKPOINT_EVERY = 120, 20
N_KILLS = int(os.environ.get("KILLS", "1"))  # of each kind of container


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    (tmp_path / "service").mkdir()
    modal_service.stand_in(tmp_path / "service", monkeypatch.setattr, None, NoMount())
    one = Service(tmp_path / "service", tmp_path / "the-shared-volume", without_figures)
    yield one
    one.close()


def without_figures(folder: Path, call_id: str) -> None:
    """In a container: figures take most of a tiny comparison's time. Steps are counted; training
    and evaluating leave a mark."""
    modal_tinystories.parts.draw = lambda *_: None  # type: ignore[assignment]
    evaluate.draw = lambda *_: None  # type: ignore[assignment]
    step, score = Training.step, evaluate.run

    def counted(self: Training, x: Any) -> Any:
        with (folder / f"{self.out.name}.steps").open("ab") as file:
            file.write(b".")
        (folder / f"{call_id}.trains").touch()
        return step(self, x)

    def marked(config: evaluate.Config) -> Any:
        (folder / f"{call_id}.evaluates").touch()
        return score(config)

    Training.step = counted  # type: ignore[method-assign]
    evaluate.run = marked  # type: ignore[assignment]


def n_steps_in(service: Service) -> int:
    """How many steps were taken, of all SAEs, those taken twice included."""
    return sum(path.stat().st_size for path in service.folder.glob("*.steps"))


def launch_in(data: Path, at: Path, **settings: Any) -> Launch:
    settings = {"n_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, **settings}
    return launch_for(data, at, **settings)


def command(launch: Launch, service: Service) -> Any:
    """What `main` does until it downloads."""
    root = str(service.volume)
    work = Work(modal_tinystories.book(), modal_tinystories.compare, None, launch, root)
    return work.result(lambda joined: modal_tinystories.is_of(joined, launch))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Volume of a comparison that nobody disturbs, without Modal."""
    launch = launch_in(data, tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modal_tinystories.parts, "draw", lambda *_: None)
        patch.setattr(evaluate, "draw", lambda *_: None)
        modal_tinystories.run(launch)
    return Path(launch.volume)


def made(volume: Path) -> dict[str, bytes]:
    """What must be the same byte for byte: the caches, the SAEs, the metrics."""
    found = {f"{c.name}/{n}": b for c in (volume / "caches").iterdir() for n, b in files(c).items()}
    for out in (volume / "runs" / "tiny").glob("*_seed*"):
        for name, content in files(out).items():
            if name == "metrics.jsonl":
                found[f"{out.name}/{name}"] = content
            elif name.endswith(".safetensors") and name != "checkpoint.safetensors":
                found[f"{out.name}/{name}"] = content[8 + int.from_bytes(content[:8], "little") :]
        scores = json.loads((out / "evaluation.json").read_text())["runs"]
        found[f"{out.name}/evaluation"] = json.dumps(scores).encode()
    return found


def running(service: Service, kind: str) -> list[str]:
    """The calls at work of cache_part, train_one, compare; or of train_one those that train, or
    evaluate."""
    if kind not in ("trains", "evaluates"):
        return [call for call in list(service.processes) if call.startswith(kind)]
    marks = {call: service.folder / f"{call}.{kind}" for call in running(service, "train_one")}
    return [call for call, mark in marks.items() if mark.exists()]


def kill_some(service: Service, kind: str, rng: random.Random, is_over: Callable[[], bool]) -> int:
    """Kills N_KILLS containers at random moments, while there are any; returns how many."""
    n_killed = 0
    while n_killed < N_KILLS and not is_over():
        calls = running(service, kind)
        time.sleep(rng.uniform(0.0, 0.1))
        if calls and service.kill(call := rng.choice(calls)):
            n_killed += 1
            (service.folder / f"{call}.{kind}").unlink(missing_ok=True)  # it begins again
    return n_killed


def at_once(*functions: Callable[[], Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.slow
def test_kills_at_random_moments_and_two_commands_at_once(
    undisturbed: Path, data: Path, tmp_path: Path, service: Service
) -> None:
    launch, outcomes, killed = launch_in(data, tmp_path), [], {}
    commands = at_once(*2 * [lambda: outcomes.append(command(launch, service))])

    def kill(kind: str) -> None:
        rng = random.Random(f"{kind} {N_KILLS}")
        killed[kind] = kill_some(
            service, kind, rng, lambda: not any(thread.is_alive() for thread in commands)
        )

    kinds = ("compare", "cache_part", "train_one", "trains", "evaluates")
    killers = at_once(*(functools.partial(kill, kind) for kind in kinds))
    for thread in [*commands, *killers]:
        thread.join(600)
    print(f"killed: {killed}; calls: {len(service.begun)}; steps: {n_steps_in(service)}")
    assert len(outcomes) == 2, service.logs()
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    assert made(service.volume) == made(undisturbed)
    n_steps, n_killed = n_steps_in(service), sum(killed.values())
    assert n_steps <= 2 * STEPS + CHECKPOINT_EVERY * n_killed, "something was trained twice"
    # The same command once more evaluates, and trains nothing.
    again = command(launch, service)
    assert n_steps_in(service) == n_steps
    for one, other in zip(again["runs"], outcomes[0]["runs"], strict=True):
        assert one["training"]["runs"] == other["training"]["runs"]
        assert one["evaluation"]["runs"] == other["evaluation"]["runs"]


@pytest.mark.slow
def test_a_command_that_asks_for_more_waits_and_does_the_rest(
    data: Path, tmp_path: Path, service: Service
) -> None:
    outcomes: dict[int, Any] = {}

    def run(seeds: int) -> None:
        outcomes[seeds] = command(launch_in(data, tmp_path, seeds=seeds), service)

    first = at_once(lambda: run(1))
    service.wait_for(lambda: bool(running(service, "train_one")))
    for thread in [*first, *at_once(lambda: run(2))]:
        thread.join(600)
    assert [len(outcomes[seeds]["runs"]) for seeds in (1, 2)] == [2, 4]
    assert n_steps_in(service) == 4 * STEPS, "something was trained twice"


class Answer(OSError):
    """What the hub's client raises: it carries the HTTP status."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"the hub says {status_code}")
        self.response = types.SimpleNamespace(status_code=status_code)


def hub_says(status_code: int, n_times: int, folder: Path, call_id: str) -> None:
    """In a container: the hub answers so to each kind of call, the first `n_times`."""
    without_figures(folder, call_id)
    kind, score = call_id.split("-")[0], evaluate.run

    def trouble() -> None:
        with (folder / f"{kind}.asked").open("ab") as file:
            file.write(b".")
            n_asked = file.tell()
        if n_asked <= n_times:
            raise UserError("cannot get it from the Hugging Face hub") from Answer(status_code)

    def load_source(*args: Any) -> Any:
        trouble()
        return cache_config.load_source(*args)

    def evaluated(config: evaluate.Config) -> Any:
        trouble()
        return score(config)

    volume_caches.load_source = load_source
    evaluate.run = evaluated  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize("status_code", [503])
def test_a_passing_error_of_the_hub_is_waited_for(
    data: Path, tmp_path: Path, service: Service, status_code: int
) -> None:
    service.before = functools.partial(hub_says, status_code, 2)
    outcome = command(launch_in(data, tmp_path), service)
    assert isinstance(outcome, dict), outcome
    assert n_steps_in(service) == 2 * STEPS
    for kind in ("compare", "cache_part", "train_one"):
        assert (service.folder / f"{kind}.asked").stat().st_size > 2


def test_a_permanent_error_of_the_hub_is_refused_at_once(
    data: Path, tmp_path: Path, service: Service
) -> None:
    service.before = functools.partial(hub_says, 404, 1)
    launch = launch_in(data, tmp_path)
    outcome = command(launch, service)
    assert len(service.begun) == 1
    with pytest.raises(UserError, match=r"cannot get it .* --secret"):
        modal_tinystories.checked(outcome, launch)
    assert not list(service.volume.iterdir())
