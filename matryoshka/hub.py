"""SAEs on the Hugging Face hub.

A repository holds one SAE: sae.safetensors in this project's format, saelens/ in SAELens's, a
README.md made from the run's results, those results, and the figures.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from torch import Tensor

from matryoshka import convert
from matryoshka.errors import UserError
from matryoshka.files import without_paths, write_json
from matryoshka.foreign_files import read_object
from matryoshka.model_card import model_card
from sae import SAE

SAE_FILE, SAELENS = "sae.safetensors", "saelens"
RESULTS, EVALUATION = "results.json", "evaluation.json"
Result = TypeVar("Result")


def from_pretrained(repo: str, name: str = SAE_FILE, revision: str | None = None) -> SAE:
    """The SAE in a repository on the hub.

    name: what to load from it: a file of this project, or a folder of SAELens, dictionary_learning
    or sparsify. revision: a branch, a tag or a commit. No code of the repository is run. Raises
    `UserError` if there is no such SAE, or the hub cannot be reached.
    """
    require_repo_name(repo)
    patterns = [name, f"{name}/*"]
    folder = reaching_hub(
        repo,
        lambda: huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns),
    )
    path = Path(folder) / name
    if not path.exists():
        raise UserError(f"{repo} on the hub holds no {name}")
    return convert.load(path)


# ------------------------------------------------------------------------------------------- push


def write_folder(
    sae: SAE, source: Path, repo: str, licence: str, out: Path, x: Tensor
) -> dict[str, Any]:
    """Writes the content of a repository to the folder `out`, whole or not at all.

    source: the SAE's file or folder; the results, evaluation and figures beside it are copied. x:
    [n, d_model], inputs on which SAELens's form is compared with the SAE. Returns what
    `convert.export` returns. Raises `UserError`.
    """
    require_repo_name(repo)

    def write(part: Path) -> dict[str, Any]:
        sae.save(part / SAE_FILE)
        report = convert.export(sae, "saelens", part / SAELENS, x)
        scores = copy_results(source, part)
        card = model_card(sae, repo, licence, scores)
        (part / "README.md").write_text(card, encoding="utf-8")
        return report

    return convert.into_folder(out, write)


def copy_results(source: Path, out: Path) -> dict[str, Any] | None:
    """Copies the SAE's results, without this machine's paths, and the run's figures.

    Returns the SAE's entry in evaluation.json with "held_out" (whether it was not trained on those
    activations; None: not known), or None if it was not evaluated; then no figures are copied.
    Raises `UserError` if the results cannot be read.
    """
    scores = None
    for name in (RESULTS, EVALUATION):
        path = source.parent / name
        if not path.exists():
            continue
        results = read_object(path)
        try:
            results["runs"] = [run for run in results["runs"] if run["sae"] == source.stem]
            held_out = results["cache"].get("held_out") if name == EVALUATION else None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not of a run ({type(error).__name__}: {error}): move it away"
            ) from None
        if not results["runs"]:
            continue  # the results are of other SAEs in that folder
        write_json(out / name, without_paths(results))
        if name == EVALUATION:
            scores = {**results["runs"][0], "held_out": held_out}
    if scores is not None:
        for figure in sorted(source.parent.glob("*.png")):
            shutil.copyfile(figure, out / figure.name)
    return scores


def files_in(folder: Path) -> list[str]:
    """The names and sizes of the files in a folder, one line each."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)}  {path.stat().st_size:,} bytes" for path in paths]


def push(folder: Path, repo: str, private: bool = True) -> str:
    """Uploads a folder that `write_folder` wrote; returns the repository's URL.

    Raises `UserError` if no token is set, the hub cannot be reached, or `private` is True and the
    repository exists and is public.
    """
    require_repo_name(repo)
    require_token(repo)
    api = huggingface_hub.HfApi()
    url = reaching_hub(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if private and not reaching_hub(repo, lambda: api.repo_info(repo)).private:
        raise UserError(
            f"{repo} exists already and is public: give --public, or another repository"
        )
    reaching_hub(repo, lambda: api.upload_folder(repo_id=repo, folder_path=folder))
    return str(url)


def require_repo_name(repo: str) -> None:
    """Raises `UserError` unless `repo` has the form OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"a repository on the hub is OWNER/NAME, got {repo}")


def require_token(repo: str) -> None:
    """Raises `UserError` if no token for the hub is set."""
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"no token is set to push to {repo}: log in with `hf auth login`, or set HF_TOKEN"
        )


def reaching_hub(repo: str, call: Callable[[], Result]) -> Result:
    """Returns what `call` returns, and turns any exception that it raises into a `UserError`.

    Which exceptions these are depends on the versions of huggingface_hub and its HTTP library.
    """
    try:
        return call()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repo} on the hub: {type(error).__name__}: {reason}") from None
