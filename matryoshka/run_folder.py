"""The folder of a training run: checks whether it belongs to this run, and what is missing in it.

It holds one run, with a file NAME.safetensors for each SAE; docs/files.md describes it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.files import file_sha256
from matryoshka.saved_runs import CHECKPOINT, METRICS, RESULTS
from matryoshka.training_report import closing, problems, summary

# Settings that may differ between a run and the command that resumes it.
RESUMABLE = (
    *("out", "resume", "device", "cache", "refit"),
    *("checkpoint_every", "checkpoint_seconds"),
)


def files_of_runs(folder: Path) -> list[str]:
    """The names in the folder that are those of a run's files."""
    names = [RESULTS, METRICS, CHECKPOINT, "evaluation.json", "refit"]
    found = [name for name in names if (folder / name).exists()]
    saes = [path.name for path in sorted(folder.glob("[!.]*.safetensors"))]
    return found + [name for name in saes if name != CHECKPOINT]


def claim(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a run with these settings may use the folder.

    Returns results.json if the run is finished, otherwise {}. config: the settings as in
    results.json. Raises `UserError` if the folder holds a run and --resume was not given, or a
    finished run with other settings, or files of a run without its checkpoint.
    """
    held = files_of_runs(folder)
    if not config["resume"] and (CHECKPOINT in held or RESULTS in held):
        raise UserError(
            f"{folder} holds a run: add --resume to go on with it, or choose another --out"
        )
    if RESULTS in held:
        results = read_results(folder / RESULTS)
        require_same(config, results["config"], folder / RESULTS)
        return results
    if held and CHECKPOINT not in held:
        raise UserError(
            f"{folder} holds {', '.join(held)}, of a run without a checkpoint: move these away, or "
            "choose another --out"
        )
    return {}


def require_same(config: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raises `UserError` if settings differ from the saved ones of the file `path`.

    It names the first that differs. Settings in RESUMABLE may differ.
    """
    for name, asked in config.items():
        if name in RESUMABLE:
            continue
        if name not in saved:
            whose = "on a cache" if name == "model" else "of an earlier version"
            raise UserError(
                f"{path} is from a run {whose}, which had no --{as_flag(name)}: choose another "
                "--out"
            )
        if saved[name] != asked and name == "members":  # the values are too long for a message
            raise UserError(
                f"{path} is from a run with other SAEs than --members asks for now: ask for those, "
                "or choose another --out"
            )
        if saved[name] != asked:
            raise UserError(
                f"{path} is from a run with --{as_flag(name)} {shown(saved[name])}, not "
                f"{shown(asked)}: ask for that, or choose another --out"
            )


def as_flag(name: str) -> str:
    """A setting's name on the command line."""
    return "target-l0" if name == "target_l0s" else name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as one types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_results(path: Path) -> dict[str, Any]:
    """Reads results.json of a run, and checks that everything is in it that is printed of it.

    Raises `UserError`, which names the file, if it is damaged or another script's.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        dict(results["config"]), summary(results), problems(results), closing(results)
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError,
            ArithmeticError) as error:  # fmt: skip
        raise UserError(
            f"{path} was not written by this script ({type(error).__name__}: {error}): move it "
            "away and --resume, or choose another --out"
        ) from None
    return results


def lacking(folder: Path, results: Mapping[str, Any], with_refit: bool) -> list[str]:
    """The SAEs' files that are missing in the folder, or have other checksums than in `results`."""
    wanted = [("file_sha256", "")] + [("refit_file_sha256", "refit/")] * with_refit
    names = []
    for run in results["runs"]:
        for key, below in wanted:
            name = f"{below}{run['sae']}.safetensors"
            found = sha256_of(folder / name)
            if not found or found != run.get(key, found):  # older results have no checksums
                names.append(name)
    return names


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; "" if there is no such file."""
    return file_sha256(path) if path.is_file() else ""


def clear_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes files that a killed run left half written; they can be as large as a checkpoint.

    names: the names of the run's SAEs.
    """
    for name in (CHECKPOINT, RESULTS, *(f"{name}.safetensors" for name in names)):
        for part in (*folder.glob(f".{name}.*"), *folder.glob(f"refit/.{name}.*")):
            if part.is_file():
                part.unlink()


def last_records(path: Path, names: Sequence[str], n_bytes: int = -1) -> dict[str, dict[str, Any]]:
    """Each SAE's last record in the first `n_bytes` of metrics.jsonl, by name; -1: in all of it.

    Raises `UserError`, which names the file, if it is shorter or contains something else.
    """
    if n_bytes == 0:
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError("it is shorter than it was at the checkpoint")
        last: dict[str, dict[str, Any]] = {}
        for i, line in enumerate(data.splitlines(), start=1):
            record = json.loads(line)
            if record["sae"] not in names:
                raise ValueError(f"line {i} is of another SAE")
            float(record["fvu"]), int(record["step"])
            last[record["sae"]] = record
        return last
    except FileNotFoundError:
        reason = "it is missing"
    except OSError as error:
        reason = str(error.strerror)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} is not the run's ({reason}): to start over, delete {path.parent} or choose "
        "another --out"
    )


def cut_metrics(path: Path, n_bytes: int) -> None:
    """Cuts metrics.jsonl to its length at the checkpoint. Raises `UserError`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.truncate(n_bytes)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
