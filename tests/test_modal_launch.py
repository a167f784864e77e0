"""What is typed for `modal run`, and what Modal is asked for: with no account, no network."""

import ast
import dataclasses
import importlib.util
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import modal
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import cache_activations
import modal_tinystories
from matryoshka import cache_reader, modal_plan, volume_caches
from matryoshka.comparison import flags_of, parse
from matryoshka.errors import UserError
from matryoshka.leases import Joined
from matryoshka.modal_calls import Refused
from matryoshka.modal_launch import Launch, launch_of
from train_tinystories import Config

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------- the flags


def modal_run(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`modal run modal_tinystories.py ...` with no account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MODAL")}
    env |= {"MODAL_CONFIG_PATH": str(home / "none.toml"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "modal", "run", "modal_tinystories.py", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.processes
def test_help_needs_no_account(tmp_path: Path) -> None:
    result = modal_run("--help", home=tmp_path)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "usage: modal run modal_tinystories.py" in text
    fields = [*dataclasses.fields(flags_of(Config)), *dataclasses.fields(Launch)[:-1]]
    for field in fields:
        if not field.metadata.get("is_flag", True):
            continue
        flag = field.metadata.get("flag") or field.name
        assert f"--{flag.replace('_', '-')} " in text, field.name
        if field.default not in (None, False, ()):
            assert f"(default: {field.default})" in text, field.name


def test_a_plan_is_printed_and_nothing_started(monkeypatch: Any, capsys: Any) -> None:
    argv = ["modal", "run", "modal_tinystories.py", "--n-steps", "3000", "--plan"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        modal_tinystories.typed()
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert "4 H100 cache, then 2 H100 train" in printed
    assert len(printed.splitlines()) == 3


@pytest.mark.processes
def test_without_a_token_there_is_one_line(tmp_path: Path) -> None:
    result = modal_run("--tokens", "5000000", home=tmp_path)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Token missing" in line
    assert "modal token new" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu H1000", "--gpu H1000 is none of T4, "),
        ("--cache-workers 0", "--cache-workers is 0"),
        ("--cache-workers many", "argument --cache-workers: invalid int value: 'many'"),
        ("--secret", "argument --secret: expected one argument"),
        ("--volume a/b", "--volume a/b cannot be the name of a Modal Volume"),
        ("--model ./here", "--model ./here: a container has none of this machine's files"),
        ("--dataset=/x/y", "--dataset /x/y: a container has none"),
        ("--members saes.toml", "--members saes.toml: a container has none"),
        ("--lr 0", "matryoshka: --lr is 0"),
        ("--step 3", "unrecognized arguments: --step 3"),
    ],
)
def test_a_wrong_setting_is_refused_before_modal_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    argv = ["modal", "run", "--detach", "some/modal_tinystories.py::main", *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        modal_tinystories.typed()
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_what_lies_on_the_volume_is_accepted_and_the_advice_leads_there() -> None:
    launch_of(["--model", "/volume/data/m.pt", "--dataset=/volume/data"]).check_for_modal()
    with pytest.raises(UserError) as refused:
        launch_of(["--model", "../weights/m.pt"]).check_for_modal()
    advice = str(refused.value).split("give ")[1]
    assert advice == "--model /volume/m.pt"
    launch_of(advice.split()).check_for_modal()


WITHOUT_TORCH = """
import sys

ABSENT = sys.argv[1].split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
sys.argv = ["modal", "run", "modal_tinystories.py", *sys.argv[2:]]
import modal_tinystories
print(sorted(modal_tinystories.app.registered_functions))
print(modal_tinystories.LAUNCH)
"""


@pytest.mark.processes
@pytest.mark.parametrize("flags", ["--gpu L4 --lr 0.5", "--plan"])
def test_launching_needs_only_modal(flags: str) -> None:
    absent = "torch numpy scipy einops datasets huggingface_hub safetensors matplotlib tqdm"
    command = [sys.executable, "-c", WITHOUT_TORCH, f"{absent} transformers", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if flags.startswith("--gpu"):
        assert "['cache_part', 'compare', 'train_one']" in done.stdout
        assert "gpu='L4'" in done.stdout
        assert "words=('--lr', '0.5')" in done.stdout
    else:
        assert "install torch here" in done.stdout


# -------------------------------------------------------------------------------- what is declared


def declared(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, dict[str, Any]]:
    """What the file asks Modal for, a function each, when `modal run` imports it with `flags`."""
    asked = {}

    def function(self: modal.App, **options: Any) -> Any:
        def keep(body: Any) -> Any:
            asked[body.__name__] = options
            return body

        return keep

    spec = importlib.util.spec_from_file_location(
        "modal_tinystories", ROOT / "modal_tinystories.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modal_tinystories", module)
    monkeypatch.setattr(modal.App, "function", function)
    monkeypatch.setattr(sys, "argv", ["modal", "run", "modal_tinystories.py", *flags])
    spec.loader.exec_module(module)
    return asked


def test_gpus_volumes_retries_and_no_idle_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = declared(monkeypatch)
    assert set(asked) == {"cache_part", "train_one", "compare"}
    assert len({id(options["image"]) for options in asked.values()}) == 1
    for options in asked.values():
        volumes = {at: v.name for at, v in options["volumes"].items()}
        assert volumes == {"/volume": "matryoshka-tinystories"}
        assert options["single_use_containers"]
        assert options["retries"].max_retries == 5
        assert options["retries"].initial_delay.total_seconds() >= 10
        assert 3600 <= options["timeout"] <= 24 * 3600
    assert asked["cache_part"]["gpu"] == asked["train_one"]["gpu"] == "H100"
    assert "gpu" not in asked["compare"]
    assert asked["compare"]["nonpreemptible"]


def test_the_flags_are_what_modal_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = declared(monkeypatch, "--gpu=A100-80GB", "--volume=mine", "--secret", "hub-token")
    assert asked["cache_part"]["gpu"] == asked["train_one"]["gpu"] == "A100-80GB"
    assert {o["volumes"]["/volume"].name for o in asked.values()} == {"mine"}
    assert {secret.name for o in asked.values() for secret in o["secrets"]} == {"hub-token"}
    # A container imports the file with no flags. Modal tells its objects by their places in a list.
    without = declared(monkeypatch)
    for name, options in asked.items():
        for what in ("secrets", "volumes"):
            assert len(options[what]) == len(without[name][what]) == 1


def test_what_is_sent_to_a_container_can_be_sent() -> None:
    job = volume_caches.CacheJob(cache_activations.CacheConfig(), Path("caches/x"), 0, 8)
    for value in (launch_of(["--lr", "0.1"]), job, Refused("no"), Joined("fc-1")):
        assert pickle.loads(pickle.dumps(value)) == value


def test_the_image_holds_every_module_and_package_that_is_imported() -> None:
    def imports(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        return found

    def file_of(name: str) -> Path:
        return ROOT / f"{name.replace('.', '/')}.py"

    needed, todo = set(), ["modal_tinystories"]
    while todo:
        new = imports(file_of(todo.pop())) - needed
        needed |= new
        todo += [name for name in new if file_of(name).exists()]
    needed = {name.split(".")[0] for name in needed}
    ours = {name for name in needed if (ROOT / name).exists() or file_of(name).exists()}
    theirs = needed & set(dependencies())
    pinned = {requirement.split("==")[0] for requirement in modal_tinystories.REQUIREMENTS}
    assert "modal" not in pinned, "Modal brings its own"
    assert theirs - pinned == {"modal"}
    assert ours - {*modal_tinystories.MODULES} <= {"toy_model"}, "but where types are checked only"


def dependencies() -> dict[str, SpecifierSet]:
    """The project's, and which versions it allows."""
    text = (ROOT / "pyproject.toml").read_text()
    found = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    return {requirement.name: requirement.specifier for requirement in found}


def test_versions_in_the_image_are_those_that_the_project_allows() -> None:
    allowed = dependencies()
    for pin in map(Requirement, modal_tinystories.REQUIREMENTS):
        (version,) = [spec.version for spec in pin.specifier]
        assert version in allowed[pin.name], pin


def test_the_plan_counts_what_is_billed() -> None:
    def estimate(*words: str, **rest: Any) -> dict[str, float]:
        return modal_plan.estimate(parse(words, Config), "H100", 3, **rest)

    whole = estimate()
    assert whole["gb"] == pytest.approx(47.4, rel=0.01)
    assert whole["gpu_minutes"] < 5 * whole["minutes"]
    of_containers = {n: modal_plan.caching_containers(3, n) for n in ((False, True), (True, False))}
    assert list(of_containers.values()) == [(3, 0), (0, 1)], "the validation split has its own"
    cached = estimate(is_cached=(True, True))
    assert cached["gb"] < 1
    assert cached["gpu_minutes"] < whole["gpu_minutes"]
    assert estimate("--seeds", "3")["gpu_minutes"] > 2 * cached["gpu_minutes"]
    assert estimate("--n-steps", "300000")["minutes"] > whole["minutes"] + 4
    text = modal_plan.plan_text(parse([], Config), "H100", 3, (True, False))
    assert "The train split is cached already, the validation split is not cached yet" in text
    assert text.startswith("1 H100 cache, then 2 H100 train")


def test_the_plan_assumes_what_the_reader_does() -> None:
    assert modal_plan.HASH == cache_reader.VERIFIERS * 1.2e9
