"""Reads the folder of a training run: its SAEs, its results, its curves.

An SAE is a file NAME.safetensors or a folder NAME of another tool; NAME is its name. results.json,
if there is one, says which SAEs are part of the run, and what they were trained on.
"""

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from matryoshka import convert
from matryoshka.cache_format import MANIFEST, read_record
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.files import file_sha256
from matryoshka.live_activations import LiveActivations
from sae import SAE

RESULTS, METRICS, CHECKPOINT = "results.json", "metrics.jsonl", "checkpoint.safetensors"
# Entries of a cache's recipe that must be those of the training cache, with their defaults.
OF_MODEL = {"layer": None, "site": "resid_pre", "tokenizer_hash": None, "weights_hash": None}
CURVES = ("l0", "fvu", "sparsity_weight")  # the entries of metrics.jsonl that are drawn


def training_results(folder: Path) -> dict[str, Any]:
    """Reads results.json of a run; {} if there is none. Raises `UserError` if it is damaged."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # The entries that are read elsewhere must be there:
        float(results["config"]["target_l0"])
        str(results["config"]["cache"]), dict(results["cache"]["make"])
        {run["sae"]: run["sae"].lower() for run in results["runs"]}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, or was not written by training ({type(error).__name__}: {error})"
        ) from None
    return results


def training_curves(
    path: Path, dropped: Collection[str] = ()
) -> tuple[list[int], dict[str, dict[str, list[float]]]]:
    """Reads metrics.jsonl: the steps, and each SAE's "l0", "fvu" and "sparsity_weight" at them.

    dropped: names of SAEs to leave out, because they diverged and their training stopped. Raises
    `UserError` if the file is damaged.
    """
    steps: dict[str, list[int]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    try:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            name = str(record["sae"])
            if name in dropped:
                continue
            steps.setdefault(name, []).append(int(record["step"]))
            curve = curves.setdefault(name, {key: [] for key in CURVES})
            for key in CURVES:
                curve[key].append(float(record[key]))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if len(set(map(tuple, steps.values()))) != 1:
        raise UserError(f"{path} is damaged: it should have a line for each SAE and step")
    return next(iter(steps.values())), curves


# --------------------------------------------------------------------------------------- the SAEs


def load_saes(folder: Path, device: torch.device, trained: Mapping[str, Any]) -> dict[str, SAE]:
    """The SAEs in a run's folder, by name, in float32. `trained`: from `training_results`.

    They are in the order of results.json, followed by refits of these; without results.json, they
    are in the order of their names. A file that is not part of the run, such as one of an older run
    in the same folder, is left out, with a line on stderr. Raises `UserError` if a file's checksum
    is not the recorded one, or no SAE is left.
    """
    paths = sae_paths(folder)
    if not paths:
        raise UserError(f"{folder} holds no SAEs: finish a training with --out {folder}")
    if not trained:
        return {name: load_sae(path, device)[0] for name, path in paths.items()}
    saes, checksums = {}, set()
    for run in trained["runs"]:
        path = paths.pop(run["sae"], None)
        if path is None:
            print(f"not scored: {folder / run['sae']}.safetensors is missing", file=sys.stderr)
            continue
        saes[run["sae"]], checksum = load_sae(path, device, run.get("file_sha256"))
        checksums.add(checksum)
    for name, path in paths.items():
        sae, _ = load_sae(path, device)
        if refit_of(sae).get("file_sha256") in checksums:
            saes[name] = sae
        else:
            print(f"not scored: {path} is not of this run ({RESULTS})", file=sys.stderr)
    if not saes:
        raise UserError(f"{folder} holds no SAE of the run that its {RESULTS} is of")
    return saes


def sae_paths(folder: Path) -> dict[str, Path]:
    """The paths of the SAEs in a folder, by name: files of this project, folders of other tools.

    If the folder itself is an SAE of another tool, it is the only one.
    """
    if convert.formats_of(folder):
        return {folder.resolve().name: folder}
    paths = {path.stem: path for path in sorted(folder.glob("[!.]*.safetensors"))}
    paths.pop(Path(CHECKPOINT).stem, None)
    folders = (path for path in sorted(folder.glob("[!.]*")) if convert.formats_of(path))
    return paths | {path.name: path for path in folders}


def load_sae(
    path: Path, device: torch.device, recorded_sha256: str | None = None
) -> tuple[SAE, str]:
    """Loads one SAE in float32; returns it and its file's SHA-256, "" for another tool's folder.

    Raises `UserError` if it is not an SAE, or its checksum is not the recorded one.
    """
    sae = convert.load(path).to(device).float().requires_grad_(False)
    sha256 = "" if path.is_dir() else file_sha256(path)
    if recorded_sha256 not in (None, sha256):
        raise UserError(
            f"{path} is not the file that training wrote: its checksum is not the one in "
            f"{RESULTS}; train again, or move it to a folder of its own"
        )
    if sae.n_latents < 2:
        raise UserError(f"{path}: an SAE of {sae.n_latents} latents; at least 2 are needed")
    return sae, sha256


def refit_of(sae: SAE) -> dict[str, Any]:
    """What refit.py recorded in an SAE's file; {} if the SAE is not a refit.

    It has `file_sha256` of the SAE that was refitted, and `acts_sha256`, a list with the checksums
    of the shards that it was refitted on.
    """
    refit = sae.about.get("refit")
    if not isinstance(refit, dict) or not isinstance(refit.get("acts_sha256"), list):
        return {}
    return refit


# ----------------------------------------------------------------------- what they were trained on


def check_cache(
    cache: ActivationCache, saes: Mapping[str, SAE], trained: Mapping[str, Any]
) -> None:
    """Raises `UserError` if the SAEs cannot be scored on the cache.

    It may be too small, or have another width, layer, site, tokenizer or model than their training
    cache. For caches of arrays, only the width is known.
    """
    for name, sae in saes.items():
        if sae.d_model != cache.d_model:
            raise UserError(
                f"the {name} SAE's d_model is {sae.d_model}, that of {cache.folder} {cache.d_model}"
            )
    if cache.manifest.n_rows < 2:
        raise UserError(
            f"{cache.folder} holds {cache.manifest.n_rows} rows: too few for two halves"
        )
    require_same_model(cache, trained["cache"]["make"] if trained else {})


def require_same_model(cache: ActivationCache, recipe: Mapping[str, Any]) -> None:
    """Raises `UserError` if the cache has another layer, site, tokenizer or model than `recipe`.

    If one of them names no model, nothing is compared.
    """
    if "model" not in recipe or "model" not in cache.recipe:
        return
    for key, default in OF_MODEL.items():
        expected, found = (of.get(key, default) for of in (recipe, cache.recipe))
        if expected is not None and found != expected:
            raise UserError(f"{cache.folder}: its {key} is {found}, expected {expected}")


def is_held_out(
    cache: ActivationCache, saes: Mapping[str, SAE], trained: Mapping[str, Any]
) -> bool | None:
    """Whether the SAEs were not trained on the cache's activations; None if that is not known.

    They were if a shard has the checksum of one that an SAE was trained or refitted on, or if the
    dataset (however its path is spelled) and the split are the same. They were not if it is another
    split of the same dataset. Another dataset may be a copy of the same; then they were not only if
    the checksums of the training shards are known.
    """
    here = set(checksums_used(cache))
    refits = (refit_of(sae).get("acts_sha256", []) for sae in saes.values())
    if any(checksum in here for checksums in refits for checksum in checksums):
        return False
    if not trained:
        return None
    recipe, known = trained["cache"]["make"], trained_shards(trained)
    is_same_dataset = _is_same_place(recipe.get("dataset"), cache.recipe.get("dataset"))
    if known & here or (is_same_dataset and recipe.get("split") == cache.recipe.get("split")):
        return False
    return True if is_same_dataset or known else None


def trained_shards(trained: Mapping[str, Any]) -> set[str]:
    """The checksums of the shards that were trained on; empty if they are not known.

    They are those in results.json or, in older runs, those of the training cache if it is still in
    its place.
    """
    recorded, folder = trained["cache"], Path(trained["config"]["cache"])
    if "acts_sha256" in recorded:
        return set(recorded["acts_sha256"])
    try:
        manifest = read_record(folder / MANIFEST)
    except UserError:
        return set()
    if manifest.recipe != recorded["make"]:
        return set()
    return {shard.acts_sha256 for shard in manifest.shards}


def checksums_used(cache: ActivationCache | LiveActivations) -> list[str]:
    """The checksums of the shards that hold the cache's first `n_tokens` activations."""
    checksums, n_before = [], 0
    for shard in cache.shards:
        if n_before < cache.n_tokens:
            checksums.append(shard.acts_sha256)
        n_before += shard.n_tokens
    return checksums


def _is_same_place(a: str | None, b: str | None) -> bool:
    """Whether two names of datasets are the same folder or, if they are not folders, equal."""
    return a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b)
