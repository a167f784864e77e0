"""The comparison on Modal, tried without it: every body on a folder.

No account, no network: functions run here with `.local()`, a temporary folder is the Volume.
`test_modal_launch.py` has what is typed and declared, `test_modal_service.py` what needs a service.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import modal
import pytest
from modal_cases import files, launch_for, write_data
from tiny_factory import write_model
from transformers_factory import make_documents, save_model, save_tokenizer, write_documents

import cache_activations
import evaluate
import modal_tinystories
import train
from matryoshka import cache_writer, modal_launch, plots, volume_caches
from matryoshka.comparison import Comparison, parse
from matryoshka.errors import UserError
from matryoshka.files import one_writer
from matryoshka.modal_calls import Refused
from matryoshka.modal_launch import Launch, launch_of
from matryoshka.training import Training
from matryoshka.volume_caches import folder_of
from train_tinystories import Config

SAES = ("matryoshka", "vanilla")


pytestmark = pytest.mark.usefixtures("one_thread")


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
    for others in ("training_curves", "fvu_by_prefix", "density_histograms"):
        monkeypatch.setattr(plots, others, lambda *_: None)
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


@pytest.mark.processes
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
        with pytest.raises(UserError, match=f"{message}.* the same command continues from there"):
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
        (Refused("no model x/y; without a network, HF_HUB_OFFLINE=1"), "needs --secret"),
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
