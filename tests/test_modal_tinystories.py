"""The comparison on Modal, tried without it: flags, declarations, and every body on a folder.

No account, no network: functions run here with `.local()`, a temporary folder is the Volume.
`test_modal_service.py` has what needs a service.
"""

import ast
import dataclasses
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import modal
import pytest
import torch
from modal_cases import files, launch_for, write_data
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny_factory import write_model
from transformers_factory import make_documents, save_model, save_tokenizer, write_documents

import cache_activations
import evaluate
import modal_tinystories
import train
from matryoshka import cache_reader, cache_writer, modal_launch, modal_plan, volume_caches
from matryoshka.comparison import Comparison, flags_of, parse
from matryoshka.errors import UserError
from matryoshka.files import one_writer
from matryoshka.leases import Joined
from matryoshka.modal_calls import Refused
from matryoshka.modal_launch import Launch, launch_of
from matryoshka.training import Training
from matryoshka.volume_caches import folder_of
from train_tinystories import Config

ROOT = Path(__file__).parents[1]
SAES = ("matryoshka", "vanilla")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Launch, dict[str, Any]]:
    """A whole comparison."""
    launch = launch_for(data, tmp_path_factory.mktemp("whole"))
    return launch, modal_tinystories.run(launch)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a tiny comparison."""
    monkeypatch.setattr(modal_tinystories.parts, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)


def comparison_of(launch: Launch) -> Comparison:
    return parse(launch.words, Config)


def caches(launch: Launch) -> list[Path]:
    """The folders of the train and the validation cache, as they are named."""
    comparison = comparison_of(launch)
    both = (comparison.cache, comparison.validation)
    return [folder_of(config, Path(launch.volume)) for config in both]


def weights(launch: Launch) -> dict[str, bytes]:
    """The SAEs' files that came here."""
    out = Path(launch.out) / "tiny"
    return {sae: (out / f"{sae}_seed0" / f"{sae}.safetensors").read_bytes() for sae in SAES}


# ------------------------------------------------------------------------------------- the flags


def modal_run(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`modal run modal_tinystories.py ...` with no account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MODAL")}
    env |= {"MODAL_CONFIG_PATH": str(home / "none.toml"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "modal", "run", "modal_tinystories.py", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


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
    assert "3 H100 cache, then 2 H100 train" in printed
    assert len(printed.splitlines()) == 3


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
        ("--volume a/b", "--volume a/b is no name"),
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


@pytest.mark.parametrize("flags", ["--gpu L4 --lr 0.5", "--plan"])
def test_launching_needs_only_modal(flags: str) -> None:
    absent = "torch numpy scipy einops datasets huggingface_hub safetensors matplotlib tqdm"
    command = [sys.executable, "-c", WITHOUT_TORCH, f"{absent} transformers", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
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
        assert options["secrets"] == []
    assert asked["cache_part"]["gpu"] == asked["train_one"]["gpu"] == "H100"
    assert "gpu" not in asked["compare"]
    assert asked["compare"]["nonpreemptible"]


def test_the_flags_are_what_modal_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = declared(monkeypatch, "--gpu=A100-80GB", "--volume=mine", "--secret", "hub-token")
    assert asked["cache_part"]["gpu"] == asked["train_one"]["gpu"] == "A100-80GB"
    assert {o["volumes"]["/volume"].name for o in asked.values()} == {"mine"}
    assert {secret.name for o in asked.values() for secret in o["secrets"]} == {"hub-token"}


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
    cached = estimate(is_cached=(True, True))
    assert cached["gb"] < 1
    assert cached["gpu_minutes"] < whole["gpu_minutes"]
    assert estimate("--seeds", "3")["gpu_minutes"] > 2 * cached["gpu_minutes"]
    assert estimate("--n-steps", "300000")["minutes"] > whole["minutes"] + 4
    text = modal_plan.plan_text(parse([], Config), "H100", 3, (True, False))
    assert "The train split is cached already, the validation split is not cached yet" in text


def test_the_plan_assumes_what_the_reader_does() -> None:
    assert modal_plan.HASH == cache_reader.VERIFIERS * 1.2e9


# ------------------------------------------------------------------------------- the whole of it


@pytest.mark.usefixtures("no_figures")
def test_the_same_as_the_scripts_alone(
    finished: tuple[Launch, dict[str, Any]], tmp_path: Path
) -> None:
    launch, results = finished
    comparison, alone = comparison_of(launch), []
    for config in (comparison.cache, comparison.validation):
        out = tmp_path / config.split
        cache_activations.run(cache_activations.Config(**vars(config), out=str(out)))
        alone.append(out)
    for ours, theirs in zip(caches(launch), alone, strict=True):
        assert len(list(theirs.glob("*.acts"))) >= 2
        assert files(ours) == files(theirs)
    for run in results["runs"]:
        (sae,) = run["saes"]
        out = tmp_path / sae
        settings = {"cache": str(alone[0]), "out": str(out), "saes": (sae,), "resume": False}
        train.run(dataclasses.replace(comparison.training, **settings))
        scores = evaluate.run(evaluate.Config(run=str(out), cache=str(alone[1])))
        ours = Path(launch.out) / "tiny" / f"{sae}_seed0"
        assert (ours / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
        assert weights(launch)[sae] == (out / f"{sae}.safetensors").read_bytes()
        assert run["evaluation"]["runs"] == scores["runs"]
        assert run["evaluation"]["cross_entropy"] == scores["cross_entropy"]


def test_what_comes_back(finished: tuple[Launch, dict[str, Any]]) -> None:
    launch, results = finished
    out = Path(launch.out) / "tiny"
    kept = json.loads((out / "results.json").read_text())
    assert kept == {key: results[key] for key in kept}
    for figure in ("training_curves", "fvu_by_prefix", "density_histograms"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
    for sae in SAES:
        wanted = {f"{sae}.safetensors", "checkpoint.safetensors", "evaluation.json"}
        assert wanted <= set(files(out / f"{sae}_seed0"))
    for run in results["runs"]:
        (scores,) = run["evaluation"]["runs"]
        row = f"{scores['sae']} | {scores['fvu']:.4f} | {scores['l0']:.2f}"
        assert row in " ".join(results["table"].split())
    assert not [path for path in out.rglob(".*")], "a lock, or something half written"


@pytest.mark.usefixtures("no_figures")
def test_a_second_comparison_reads_no_token_and_runs_no_model(
    finished: tuple[Launch, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    launch, first = finished
    for module, name in (
        *((volume_caches, name) for name in ("count_rows", "finish")),
        *((volume_caches, "cache_rows"), (cache_writer, "compute_shard")),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was cached"))
    again = launch_for(data, tmp_path, volume=launch.volume, name="again")
    results = modal_tinystories.run(again)
    assert [r["evaluation"]["runs"] for r in results["runs"]] == [
        r["evaluation"]["runs"] for r in first["runs"]
    ]
    # The whole thing once more trains nothing either.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it was trained"))
    modal_tinystories.run(again)


@pytest.mark.usefixtures("no_figures")
def test_a_cache_too_large_for_the_gpu_is_trained_on_from_a_copy(
    finished: tuple[Launch, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    launch = launch_for(data, tmp_path, volume=finished[0].volume, name="tiny-copied")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(volume_caches, "fits_on_gpu", lambda _: False)
    results = modal_tinystories.run(launch)
    cache = caches(launch)[0]
    assert files(tmp_path / "disk" / cache.name) == files(cache)
    for run in results["runs"]:
        assert run["training"]["config"]["cache"] == str(tmp_path / "disk" / cache.name)
        (sae,) = run["saes"]
        ours = (Path(run["out"]) / f"{sae}.safetensors").read_bytes()
        assert ours == weights(finished[0])[sae]


def test_several_l0s_are_one_pass_a_kind_and_a_frontier(
    finished: tuple[Launch, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    volume = finished[0].volume
    launch = launch_for(data, tmp_path, volume=volume, name="frontier", target_l0=(5, 9))
    results = modal_tinystories.run(launch)
    names = {f"{sae}_l0_{l0}" for sae in SAES for l0 in (5, 9)}
    out = Path(launch.out) / "frontier"
    assert {path.name for path in out.glob("*_seed0")} == {f"{sae}_seed0" for sae in SAES}
    assert {path.stem for path in out.glob("*/*_l0_*.safetensors")} == names
    assert (out / "frontier.png").stat().st_size > 5_000
    assert all(name in results["table"] for name in names)


@pytest.mark.usefixtures("no_figures")
def test_any_model_and_text(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path)
    save_tokenizer(folder)
    for split in ("train", "validation"):
        write_documents(tmp_path / "text" / f"{split}.jsonl", make_documents(60))
    of_text = {"context": 16, "layer": 2, "tokens": 400, "validation_tokens": 200, "n_steps": 5}
    launch = launch_for(tmp_path / "text", tmp_path, model=folder, **of_text)
    results = modal_tinystories.run(launch)
    for run in results["runs"]:
        assert run["evaluation"]["cross_entropy"]["clean"] > 0
    caches_before = [files(folder) for folder in caches(launch)]
    modal_tinystories.run(launch)
    assert [files(folder) for folder in caches(launch)] == caches_before


@pytest.mark.usefixtures("no_figures")
def test_a_revision_of_the_model_is_the_one_that_is_evaluated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's main has other weights, which the evaluation would refuse after all training."""
    weights_at = {"mine": data / "model.pt", None: write_model(tmp_path / "main.pt", seed=5)}
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file, revision=None: str(weights_at[revision]),
    )
    of_hub = {"model": "owner/model", "model_revision": "mine", "n_steps": 5}
    results = modal_tinystories.run(launch_for(data, tmp_path, **of_hub))
    for run in results["runs"]:
        assert run["evaluation"]["cross_entropy"]["clean"] > 0
    # Should the hub change its mind in between, that is found before anything is trained.
    weights_at["mine"] = weights_at[None]
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(
        modal_tinystories, "located", lambda config, root: (caches_of[config], True)
    )
    launch = launch_for(data, tmp_path, **of_hub)
    comparison = comparison_of(launch)
    caches_of = dict(zip((comparison.cache, comparison.validation), caches(launch), strict=True))
    with pytest.raises(UserError, match="other weights than those of owner/model at revision mine"):
        modal_tinystories.run(launch)


# ---------------------------------------------------------------------------------------- faults


class Killed(Exception):
    """Stands for a container that is gone in the middle."""


def dies_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The `call`-th call of `module.name` raises."""
    inner, count = getattr(module, name), [0]

    def once(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise Killed("preempted")
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, once)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("module", "name", "call", "message"),
    [
        (cache_writer, "compute_shard", 3, "1 of 5 failed: caching rows 8 to 23 of train: Killed"),
        (Training, "step", 20, "1 of 2 failed: training matryoshka, seed 0: Killed: preempted"),
    ],
)
def test_a_worker_that_dies_is_named_and_gone_on_from(
    finished: tuple[Launch, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    module: Any,
    name: str,
    call: int,
    message: str,
) -> None:
    launch = launch_for(data, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        dies_at(patch, module, name, call)
        with pytest.raises(UserError, match=f"{message}.* the same command goes on from there"):
            modal_tinystories.run(launch)
    before = {path: path.stat().st_mtime_ns for path in caches(launch)[0].glob("*.acts")}
    assert before
    modal_tinystories.run(launch)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before, "a finished shard was made again"
    assert [files(f) for f in caches(launch)] == [files(f) for f in caches(finished[0])]
    assert weights(launch) == weights(finished[0])


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_cache_is_named_with_what_to_do(
    finished: tuple[Launch, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    launch = launch_for(data, tmp_path)
    modal_tinystories.run(launch)
    shard = caches(launch)[0] / "00001.acts"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    again = launch_for(data, tmp_path, name="tiny-again")
    with pytest.raises(UserError) as failure:
        modal_tinystories.run(again)
    assert "2 of 2 failed: training matryoshka, seed 0:" in str(failure.value)
    assert "shard 00001 is damaged" in str(failure.value)
    assert "delete 00001.*" in str(failure.value)
    for path in caches(launch)[0].glob("00001.*"):
        path.unlink()
    modal_tinystories.run(again)
    assert files(caches(launch)[0]) == files(caches(finished[0])[0])


@pytest.mark.parametrize("wrong", [{"model": "no.pt"}, {"dataset": "nowhere"}, {"layer": 9}])
def test_a_failed_start_leaves_nothing(data: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        modal_tinystories.run(launch_for(data, tmp_path, **wrong))
    assert list(tmp_path.iterdir()) == []


def test_without_modal_a_volume_has_one_writer(data: Path, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    with one_writer(tmp_path / "volume"), pytest.raises(UserError, match="another process"):
        modal_tinystories.run(launch_for(data, tmp_path))


def test_a_folder_is_not_called_as_a_volume_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run without Modal would leave that in the checkout, where git does not ignore it."""
    assert launch_of([], volume="runs/volume").volume == "runs/volume"
    assert launch_of(["--volume", "v"], volume="runs/volume").volume == "v"


# ---------------------------------------------------------------------------- Modal's own, faked


class FakeVolume:
    """Lists and reads a folder as `modal.Volume` does."""

    def __init__(self, folder: Path):
        self.folder = folder

    def listdir(self, path: str, *, recursive: bool) -> list[SimpleNamespace]:
        kinds = modal.volume.FileEntryType  # type: ignore[attr-defined]
        return [
            SimpleNamespace(
                path=str(p.relative_to(self.folder)),
                type=kinds.FILE if p.is_file() else kinds.DIRECTORY,
            )
            for p in sorted((self.folder / path).rglob("*"))
        ]

    def read_file(self, path: str) -> Iterator[bytes]:
        file = io.BytesIO((self.folder / path).read_bytes())
        while chunk := file.read(1000):
            yield chunk


def compare_gives(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    """What `compare` hands back, or raises."""

    def get() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    call = SimpleNamespace(get=get)
    monkeypatch.setattr(modal_tinystories, "compare", SimpleNamespace(spawn=lambda *_: call))
    monkeypatch.setattr(modal_tinystories, "book", dict)


def tree(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_entrypoint(
    finished: tuple[Launch, dict[str, Any]], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """It downloads all but what is hidden, prints the table, and says what is left."""
    launch, results = finished
    compare_gives(monkeypatch, results)
    monkeypatch.setattr(modal_tinystories, "volume", FakeVolume(Path(launch.volume)))
    source = Path(launch.volume) / "runs" / "tiny"
    (source / "vanilla_seed0" / ".training_curves.png.x8f.png").write_bytes(b"half")
    modal_tinystories.main("--name", "tiny", "--out", str(tmp_path), "--volume", "vol")
    wanted = {path: b for path, b in tree(source).items() if not path.name.startswith(".")}
    assert tree(tmp_path / "tiny") == wanted
    printed = capsys.readouterr().out
    assert results["table"] in printed
    assert "modal volume delete vol" in printed
    assert "modal volume get" not in printed, "of 47 GB"


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Refused("caching rows 0 to 7 of train: no"), "caching rows 0 to 7 of train: no"),
        (Refused("/volume/caches/x is damaged"), "modal volume rm -r matryoshka-tinystories PATH"),
        (modal.exception.RemoteError("it was stopped"), "RemoteError: it was stopped"),
    ],
)
def test_the_entrypoint_fails_in_one_line(
    outcome: Any, message: str, monkeypatch: Any, capsys: Any
) -> None:
    compare_gives(monkeypatch, outcome)
    with pytest.raises(SystemExit) as exit_:
        modal_tinystories.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_download_that_cannot_be_written_is_named(
    finished: tuple[Launch, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    volume = FakeVolume(Path(finished[0].volume))
    with pytest.raises(UserError, match=r"--out: cannot write .*out/"):
        modal_launch.download(volume, PurePosixPath("runs/tiny"), tmp_path / "out")


def test_downloads_stay_in_their_folder(tmp_path: Path) -> None:
    kind = modal.volume.FileEntryType.FILE  # type: ignore[attr-defined]
    entry = SimpleNamespace(path="elsewhere/file", type=kind)
    volume = SimpleNamespace(listdir=lambda path, recursive: [entry])
    with pytest.raises(ValueError, match="elsewhere"):
        modal_launch.download(volume, PurePosixPath("runs/x"), tmp_path)
