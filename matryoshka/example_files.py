"""The file examples/NAME.safetensors: what latents fire on, and which latents fire together.

docs/files.md describes its format. The file records which SAE and which cache it was made from, and
is used again only for the same ones.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch

from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_atomically, write_json
from matryoshka.hierarchy import (
    THRESHOLD,
    Pairs,
    as_json,
    directed,
    excess,
    level_widths,
    levels_of,
    may_be_parent,
    overlap,
    parent_given_child,
)
from matryoshka.top_examples import Examples, collect
from sae import SAE

FORMAT = 1
FOLDER = "examples"  # in a run's folder
N_COACTIVE, N_PARENTS = 10, 3

Array = np.ndarray


class Relations(NamedTuple):
    """Which latents each latent fires together with. Lists that are not full end with -1.

    The arrays have 0 columns if there were too many latents to count pairs of them.
    """

    coactive: Array  # int64 [n_latents, N_COACTIVE]: the latents with the highest overlap
    coactive_overlap: Array  # float32 [n_latents, N_COACTIVE]
    parents: Array  # int64 [n_latents, N_PARENTS]: the first is the parent in the forest
    parent_measures: Array  # float32 [n_latents, N_PARENTS, 4]: see MEASURES


MEASURES = ("p_parent_given_child", "p_child_given_parent", "excess", "directed")


def relations_of(
    pairs: Pairs | None, sae: SAE, threshold: float = THRESHOLD, n_latents: int = 0
) -> Relations:
    """For each latent, the most co-active latents and the parents whose excess is at least
    `threshold`, best first. n_latents: used only if `pairs` is None."""
    if pairs is None:
        none, floats = np.zeros((n_latents, 0), np.int64), np.zeros((n_latents, 0), np.float32)
        return Relations(none, floats, none, np.zeros((n_latents, 0, 4), np.float32))
    level = levels_of(level_widths(sae)).to(pairs.fired.device)
    together, above = overlap(pairs), excess(pairs)
    eligible = may_be_parent(pairs, level) & (above >= threshold)
    parents, _ = _highest(torch.where(eligible, together, 0.0), N_PARENTS)
    columns = torch.arange(len(level), device=level.device)[:, None]
    given = parent_given_child(pairs)
    chosen = parents.clamp(min=0), columns
    measures = [given[chosen], given.T[chosen], above[chosen], directed(pairs)[chosen]]
    together.fill_diagonal_(0)
    coactive, how_much = _highest(together, N_COACTIVE)
    return Relations(
        coactive.cpu().numpy(),
        how_much.float().cpu().numpy(),
        parents.cpu().numpy(),
        torch.stack(measures, dim=2).float().cpu().numpy(),
    )


def _highest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the k highest scores above 0 in each of n columns, and these scores: [n, k] each.

    Where a column has fewer, -1 and 0 follow.
    """
    best = scores.topk(min(k, len(scores)), dim=0)
    rows = torch.where(best.values > 0, best.indices, -1)
    return rows.T, best.values.T


# ---------------------------------------------------------------------------------------- the file


def about_of(sae_sha256: str, cache: ActivationCache, seed: int) -> dict[str, Any]:
    """What identifies such a file: hashes of the SAE's file and the cache, and the seed."""
    return {
        "format": FORMAT,
        "sae_sha256": sae_sha256,
        "cache_sha256": cache.content_hash,
        "seed": seed,
    }


def write(path: Path, examples: Examples, relations: Relations, about: dict[str, Any]) -> None:
    """Writes both to a safetensors file, whole or not at all. Raises `CannotWrite`."""
    tensors = {**examples._asdict(), **relations._asdict()}
    tensors["n_tokens"] = np.array([examples.n_tokens])
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        metadata={"examples": json.dumps(about)},
    )
    write_atomically(path, lambda part: part.write_bytes(content))


def read(path: Path) -> tuple[Examples, Relations, dict[str, Any]]:
    """The examples, relations and `about` in a file. Raises `UserError` if it holds none."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["examples"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, and this version reads {FORMAT}")
        relations = Relations(*(tensors.pop(name) for name in Relations._fields))
        examples = Examples(**{**tensors, "n_tokens": int(tensors["n_tokens"][0])})
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} holds no examples of latents ({error}): delete it, and they are collected "
            "again"
        ) from None
    return examples, relations, about


def examples_of(
    path: Path,
    sae: SAE,
    sae_sha256: str,
    cache: ActivationCache,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Examples, Relations]:
    """The examples and relations of an SAE.

    They are read from the file `path` if it is of the same SAE, cache and seed. Otherwise they are
    collected and written there, and the forest as JSON beside it. Raises `UserError` if the file is
    damaged or the folder cannot be written to, and what `top_examples.collect` raises.
    """
    about = about_of(sae_sha256, cache, seed)
    if path.exists():
        examples, relations, about_file = read(path)
        if about_file == about:
            return examples, relations
    make_folder(path.parent, "--run")
    examples, pairs = collect(sae, cache, seed, device)
    relations = relations_of(pairs, sae, n_latents=sae.n_latents)
    if pairs is not None:
        write_json(path.with_suffix(".json"), {**about, **as_json(pairs, sae)})
    write(path, examples, relations, about)
    return examples, relations
