"""The hub's folder and its card, what is uploaded, and what goes wrong on the way; no network."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from sae_zoo import any_sae, inputs

import export
from matryoshka import convert, hub
from matryoshka.errors import UserError
from matryoshka.model_card import model_card
from sae import SAE

REPO = "someone/an-sae"


@pytest.fixture
def run(tmp_path):
    """A run's folder with two SAEs, results, an evaluation and a figure."""
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    for name, seed in (("matryoshka", 1), ("vanilla", 2)):
        any_sae("relu", seed).save(folder / f"{name}.safetensors")
    runs = [{"sae": "matryoshka", "fvu": 0.25, "l0": 5.5}, {"sae": "vanilla", "fvu": 0.5}]
    results = {
        "config": {"cache": str(tmp_path / "cache")},
        "cache": {"held_out": True},
        "runs": runs,
    }
    for name in ("results.json", "evaluation.json"):
        (folder / name).write_text(json.dumps(results))
    (folder / "fvu_by_prefix.png").write_bytes(b"picture")
    return folder


class Hub:
    """Stands in for the hub: what was asked of it, and one repository."""

    def __init__(self, private: bool = True):
        self.calls: list[tuple[str, object]] = []
        self.private = private

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", private))
        return f"hub/{repo}"

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id: str, folder_path: Path) -> None:
        files = {str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()}
        self.calls.append(("upload", files))


@pytest.fixture
def there(monkeypatch):
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "set")
    return stand_in


def push(run: Path, out: Path, *more: str) -> None:
    sae = str(run / "matryoshka.safetensors")
    export.main(["--sae", sae, "--push", REPO, "--out", str(out), *more])


FILES = {
    "README.md",
    "sae.safetensors",
    "saelens/cfg.json",
    "saelens/sae_weights.safetensors",
    "results.json",
    "evaluation.json",
    "fvu_by_prefix.png",
}


def test_a_dry_run_writes_the_folder_and_uploads_nothing(run, tmp_path, there, capsys):
    push(run, tmp_path / "out", "--dry-run")
    assert there.calls == []
    out = tmp_path / "out"
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == FILES
    printed = capsys.readouterr().out
    assert all(name in printed for name in FILES)
    assert "nothing was uploaded" in printed
    assert torch.equal(SAE.load(out / "sae.safetensors").W_dec, any_sae("relu", 1).W_dec)
    assert convert.load(out / "saelens").n_latents == any_sae("relu", 1).n_latents


def test_no_path_of_the_machine_and_no_other_sae_is_uploaded(run, tmp_path, there):
    push(run, tmp_path / "out", "--dry-run")
    for name in ("results.json", "evaluation.json"):
        results = json.loads((tmp_path / "out" / name).read_text())
        assert [line["sae"] for line in results["runs"]] == ["matryoshka"]
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_what_is_pushed_is_private_and_whole(run, tmp_path, there, capsys):
    push(run, tmp_path / "out")
    assert there.calls == [("create", True), ("upload", FILES)]
    assert f"hub/{REPO}" in capsys.readouterr().out


def test_public_is_asked_for(run, tmp_path, there):
    there.private = False
    push(run, tmp_path / "out", "--public")
    assert there.calls[0] == ("create", False)
    with pytest.raises(UserError, match="is public"):
        hub.push(tmp_path / "out", REPO)
    assert len(there.calls) == 3  # created or found, and not uploaded


def refused(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as ended:
        export.main(list(line))
    assert ended.value.code == 2
    stderr: str = capsys.readouterr().err.strip()
    assert stderr.count("\n") == 0
    return stderr


def test_what_cannot_be_pushed_is_one_line_before_anything_is_written(
    run, tmp_path, there, monkeypatch, capsys
):
    sae, out = str(run / "matryoshka.safetensors"), str(tmp_path / "out")
    common = ("--sae", sae, "--out", out)
    assert "OWNER/NAME" in refused(capsys, *common, "--push", "name")
    assert "is only for --push" in refused(capsys, *common, "--dry-run")
    assert "is only for --push" in refused(capsys, *common, "--public")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in refused(capsys, *common, "--push", REPO)
    assert not Path(out).exists()


def test_a_hub_that_cannot_be_reached_is_one_line(run, tmp_path, there, monkeypatch, capsys):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(there, "create_repo", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    sae, out = str(run / "matryoshka.safetensors"), str(tmp_path / "out")
    stderr = refused(capsys, "--sae", sae, "--out", out, "--push", REPO)
    assert "no route" in stderr
    with pytest.raises(UserError, match="no route"):
        hub.from_pretrained(REPO)


def test_from_pretrained_reads_a_file_of_ours_or_a_folder_of_anothers(
    run, tmp_path, there, monkeypatch
):
    push(run, tmp_path / "out", "--dry-run")
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sae, x = SAE.from_pretrained(REPO, revision="v1"), inputs(any_sae("relu", 1), 1)
    assert asked == [(REPO, "v1", ["sae.safetensors", "sae.safetensors/*"])]
    torch.testing.assert_close(sae(x), any_sae("relu", 1)(x))
    torch.testing.assert_close(
        SAE.from_pretrained(REPO, "saelens")(x), sae(x), rtol=1e-4, atol=1e-3
    )
    with pytest.raises(UserError, match="holds no other"):
        SAE.from_pretrained(REPO, "other")
    with pytest.raises(UserError, match="OWNER/NAME"):
        SAE.from_pretrained("../elsewhere/x")


def test_the_card_says_what_it_is_and_how_it_scored():
    sae = any_sae("topk", 1)
    sae.about |= {"model": "gpt2", "layer": 0, "seed": 0, "lr": 1e-3, "n_tokens": 349677}
    card = model_card(sae, REPO, "mit", {"fvu": 0.0587, "l0": 19.6, "loss_recovered": None})
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert head is not None
    assert "library_name: saelens" in head[1]
    assert "license: mit" in head[1]
    for text in ("layer 0 of gpt2", "topk with k = 4", "0.0587", "349,677", "2503.17547", REPO):
        assert text in card
    assert "loss recovered" not in card
    assert "Not evaluated" in model_card(sae, REPO, "mit", None)


@pytest.mark.parametrize(
    ("held_out", "words"),
    [(True, "On held-out"), (False, "TRAINED on"), (None, "not known whether it was trained on")],
)
def test_the_card_says_whether_it_was_scored_on_what_it_was_trained_on(
    run, tmp_path, there, held_out, words
):
    results = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(results | {"cache": {"held_out": held_out}}))
    push(run, tmp_path / "out", "--dry-run")
    assert words in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", [{}, {"runs": 3}, {"runs": [3]}, {"runs": [{"a": 1}]}])
def test_results_of_something_else_are_refused(run, tmp_path, there, capsys, content):
    (run / "results.json").write_text(json.dumps(content))
    sae, out = str(run / "matryoshka.safetensors"), str(tmp_path / "out")
    stderr = refused(capsys, "--sae", sae, "--out", out, "--push", REPO, "--dry-run")
    assert "results.json is not of a run" in stderr
    assert not Path(out).exists()
