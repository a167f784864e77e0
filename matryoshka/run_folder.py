"""A training's folder: whose it is, what is in it, and whether that is all.

It holds one run, with a file NAME.safetensors an SAE; docs/files.md describes it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka.errors import UserError
from matryoshka.saved_runs import CHECKPOINT, METRICS, RESULTS, file_sha256
from matryoshka.training_report import closing, problems, summary

# Settings that may differ between a run and the command that resumes it.
RESUMABLE = (
    *("out", "resume", "device", "cache", "refit"),
    *("checkpoint_every", "checkpoint_seconds"),
)


def files_of_runs(folder: Path) -> list[str]:
    """What is in the folder that the scripts would take for a run's."""
    names = [RESULTS, METRICS, CHECKPOINT, "evaluation.json", "refit"]
    found = [name for name in names if (folder / name).exists()]
    saes = [path.name for path in sorted(folder.glob("[!.]*.safetensors"))]
    return found + [name for name in saes if name != CHECKPOINT]


def claim(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of the run in the folder where that is finished, else {}.

    config: the settings as JSON has them. Raises `UserError` where the folder holds a run and
    nobody asked to resume it, or a finished run of other settings, or what is left of a run
    without a checkpoint.
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
            f"{folder} holds {', '.join(held)}, of a run without a checkpoint: move that away, or "
            "choose another --out"
        )
    return {}


def require_same(config: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raises `UserError` naming the first setting in which the run of the file `path` differs."""
    for name, asked in config.items():
        if name in RESUMABLE:
            continue
        if name not in saved:
            whose = "from a cache" if name == "model" else "of an earlier version"
            raise UserError(
                f"{path} is of a run {whose}, which had no --{as_flag(name)}: choose another --out"
            )
        if saved[name] != asked and name == "members":  # too long to be shown
            raise UserError(
                f"{path} is of a run with other SAEs than --members asks for now: ask for those, "
                "or choose another --out"
            )
        if saved[name] != asked:
            raise UserError(
                f"{path} is of a run with --{as_flag(name)} {shown(saved[name])}, not "
                f"{shown(asked)}: ask for that, or choose another --out"
            )


def as_flag(name: str) -> str:
    """A setting's name as the command line has it."""
    return "target-l0" if name == "target_l0s" else name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run. Raises `UserError` naming it where it is damaged or another script's.

    What is printed of it is there: {"config", "runs", "seconds", "waited_for_data"}.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        dict(results["config"]), summary(results), problems(results), closing(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is no results of this script ({type(error).__name__}: {error}): move it away "
            "and --resume, or choose another --out"
        ) from None
    return results


def lacking(folder: Path, results: Mapping[str, Any], with_refit: bool) -> list[str]:
    """Which of the SAEs' files are not in the folder as `results` has them."""
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
    """Of a file's bytes, in hexadecimal; "" where there is no such file."""
    return file_sha256(path) if path.is_file() else ""


def clear_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what a killed run left half written, which can be as large as a checkpoint.

    names: of the SAEs.
    """
    for name in (CHECKPOINT, RESULTS, *(f"{name}.safetensors" for name in names)):
        for part in (*folder.glob(f".{name}.*"), *folder.glob(f"refit/.{name}.*")):
            if part.is_file():
                part.unlink()


def last_records(path: Path, names: Sequence[str], n_bytes: int = -1) -> dict[str, dict[str, Any]]:
    """Each SAE's last record in the first `n_bytes` of metrics.jsonl (-1: in all), by its name.

    Raises `UserError` naming the file where it is shorter, or holds anything else.
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
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} is not the run's ({reason}): to start over, delete {path.parent} or choose "
        "another --out"
    )


def cut_metrics(path: Path, n_bytes: int) -> None:
    """Makes metrics.jsonl as long as it was at the checkpoint. Raises `UserError`."""
    try:
        with path.open("a") as file:
            file.truncate(n_bytes)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
