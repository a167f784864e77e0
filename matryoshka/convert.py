"""Converts SAEs to other tools' folders and back, and checks them by reading them back.

from matryoshka import convert

sae = convert.load("folder")                            # of any format, or this project's file
report = convert.export(sae, "saelens", "folder", x)    # x: activations to compare the SAEs on
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import dictionary_learning_format, saelens_format, sparsify_format
from matryoshka.conversion_check import Codec, Comparison, codec, compare, require_same
from matryoshka.errors import UserError
from sae import SAE, seeded_generator

FORMATS: dict[str, Any] = {
    "saelens": saelens_format,
    "dictionary-learning": dictionary_learning_format,
    "sparsify": sparsify_format,
}
TARGETS = ("saelens", "dictionary-learning")
N_NOISE = 1024  # inputs to compare SAEs on if no activations are given


def formats_of(path: Path) -> list[str]:
    """Which of FORMATS a folder is in; [] for a file, or a folder without an SAE."""
    return [name for name, module in FORMATS.items() if path.is_dir() and module.recognises(path)]


def load(path: str | Path, expected: str | None = None) -> SAE:
    """The SAE in a file of this project, or in a folder of another tool.

    expected: which of FORMATS the folder must be in; None: any. Raises `UserError` if it is in
    another format, or the SAE cannot be read.
    """
    path = Path(path)
    if path.is_dir() or expected is not None:
        sae: SAE = FORMATS[the_format_of(path, expected)].read(path)
        return sae
    try:
        return SAE.load(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def the_format_of(path: Path, expected: str | None = None) -> str:
    """The format that a folder is in. Raises `UserError` if it is not in the `expected` format or,
    without one, not in exactly one of FORMATS."""
    found = formats_of(path)
    if expected in found:
        return str(expected)
    if expected is not None:
        instead = f", but of {' and '.join(found)}" if found else ""
        raise UserError(f"{path} is not a folder of {expected}{instead}")
    if not found:
        raise UserError(
            f"{path} holds no SAE: expected {saelens_format.WEIGHTS}, "
            f"{dictionary_learning_format.WEIGHTS} or {sparsify_format.WEIGHTS} in it"
        )
    if len(found) > 1:
        raise UserError(f"{path} holds SAEs of {' and '.join(found)}: choose one with --from")
    return found[0]


def noise(sae: SAE, n: int = N_NOISE) -> Tensor:
    """Gaussian inputs, float64 [n, d_model], whose mean norm is about that of the training data."""
    x = torch.randn(n, sae.d_model, generator=seeded_generator(0), dtype=torch.float64)
    return x * float(sae.mean_norm / sae.d_model**0.5)


def export(
    sae: SAE, target: str, folder: str | Path, x: Tensor, widths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Writes the SAE as a folder of `target`, one of TARGETS, if it reads back as the same SAE.

    x: [n, d_model], inputs to compare the SAEs on. widths: see `dictionary_learning_format.write`.
    Returns "notes" (what the target cannot express), "read_by" (which reader read it back) and
    "comparison". Raises `UserError`, and then writes nothing, if the folder is not empty, the
    target cannot express the SAE, or a reader reads back another SAE.
    """
    if widths and target != "dictionary-learning":
        raise UserError(f"widths are for dictionary-learning: {target} has no prefixes")

    def write(part: Path) -> dict[str, Any]:
        if target == "saelens":
            notes = saelens_format.write(sae, part)
        else:
            notes = dictionary_learning_format.write(sae, part, widths)
        read_by, comparison = prove(sae, target, part, x)
        return {"notes": notes, "read_by": read_by, "comparison": comparison}

    return into_folder(Path(folder), write)


def prove(sae: SAE, target: str, folder: Path, x: Tensor) -> tuple[str, Comparison]:
    """Reads the folder back with every reader, and compares what they read with the SAE.

    Returns the last reader's name and comparison. Raises `UserError` if any SAE differs.
    """
    readers = [("this project's reader", codec(load(folder)))]
    if target == "saelens" and has_saelens():
        readers.append(("SAELens", saelens_codec(folder)))
    for name, other in readers:
        comparison = compare(sae, other, x)
        require_same(comparison, f"what {name} reads back")
    return name, comparison


def has_saelens() -> bool:
    """Whether SAELens can be imported here."""
    try:
        import sae_lens  # noqa: F401
    except ImportError:
        return False
    return True


def saelens_codec(folder: Path) -> Codec:
    """`encode` and `decode` of the SAE that SAELens loads from a folder, in float64."""
    import sae_lens

    theirs = sae_lens.SAE.load_from_disk(folder, dtype="float64")
    return theirs.encode, theirs.decode


def into_folder(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Calls `write` on a new folder beside `folder`, then renames that folder to `folder`.

    `folder` is so written whole or not at all. Returns what `write` returns. Raises `UserError` if
    `folder` is not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder} is not empty: choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None
    try:
        result = write(part)
        part.chmod(0o755)
        part.replace(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return result
