"""Converts SAEs to other tools' files and back, and checks each conversion by reading it back.

    python export.py --sae runs/x/matryoshka.safetensors --to saelens --out exported \\
        --cache cache/validation
    python export.py --sae exported --from saelens --out runs/y/sae.safetensors

--sae is a file of this project, or a folder of SAELens, dictionary_learning or sparsify; the files
in it show which. --from says which of them it must be; --out is then a file of this project unless
--to names another tool. What was written is read back, also by SAELens where that is installed,
and must encode and decode a sample of the cache (or Gaussian noise, without a cache) like the
original SAE, in float64. If anything but rounding differs, nothing is written. What the other tool
cannot express is printed, and kept in the metadata. `matryoshka.convert` does the same from Python.

    python export.py --sae runs/x/matryoshka.safetensors --push user/repo --out for_hub --dry-run

writes a folder for the Hugging Face hub: the SAE, its SAELens form, the run's results, evaluation
and figures, and a model card made of them. Without --dry-run it is uploaded, to a private
repository.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from matryoshka import convert, hub, sae_files
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, require_positive, setting
from matryoshka.conversion_check import codec, compare, require_same
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_atomically
from sae import SAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAE is converted, to which format, and where it is written."""

    sae: str = setting(help="the SAE: a file of this project, or a folder of another tool")
    to: Literal["saelens", "dictionary-learning", "matryoshka"] | None = setting(
        None,
        "format of --out; matryoshka: a file of this project (default: saelens; with --from: "
        "matryoshka)",
    )
    from_: Literal["saelens", "dictionary-learning", "sparsify"] | None = setting(
        None, "format that --sae must be in (default: whichever it is in)", flag="from"
    )
    out: str = setting(help="where to write: a folder, or a file in this project's format")
    cache: str | None = setting(
        None, "cache of activations to compare the two SAEs on; default: Gaussian noise"
    )
    n_tokens: int = setting(4096, "number of activations to compare on, from all over the cache")
    widths: tuple[int, ...] | None = setting(
        None, "with --to dictionary-learning: prefix lengths to keep; default: those trained at"
    )
    push: str | None = setting(
        None, "OWNER/NAME on the Hugging Face hub to upload to; --out is the folder to upload"
    )
    dry_run: bool = setting(False, "with --push: write the folder, but upload nothing")
    public: bool = setting(False, "with --push: make the repository public")
    licence: str = setting("mit", "with --push: the licence, by the hub's name for it")


def run(config: Config) -> dict[str, Any]:
    """Writes `config.out`, and uploads it if `push` is set.

    Returns what is reported: "notes", "read_by", "inputs" (what the SAEs were compared on),
    "comparison" and, of an upload, "url". Raises `UserError`, and then leaves nothing written,
    unless only the upload failed.
    """
    require_positive(config, "n_tokens")
    target = config.to or ("matryoshka" if config.from_ else "saelens")
    check_push(config)
    if config.widths and (config.push or target != "dictionary-learning"):
        raise UserError(
            "--widths is only for --to dictionary-learning: no other format has prefixes to choose"
        )
    sae = convert.load(config.sae, config.from_).requires_grad_(False)
    x, inputs = sample(config, sae)
    if config.push is not None:
        report = for_hub(config, sae, x)
    elif target == "matryoshka":
        report = to_file(sae, Path(config.out), x)
    else:
        report = convert.export(sae, target, config.out, x, config.widths)
    return {"inputs": inputs, **report}


def check_push(config: Config) -> None:
    """Raises `UserError`, before anything is written, if what is asked for cannot be uploaded."""
    if config.push is not None:
        if config.to is not None:
            raise UserError(
                f"--to {config.to} cannot be used with --push, which uploads this project's file "
                "and SAELens's: leave it out"
            )
        hub.require_repo_name(config.push)
        if not config.dry_run:
            hub.require_token(config.push)
    elif config.dry_run or config.public:
        flag = "--dry-run" if config.dry_run else "--public"
        raise UserError(f"{flag} is only for --push OWNER/NAME: give that, or leave it out")


def for_hub(config: Config, sae: SAE, x: Tensor) -> dict[str, Any]:
    """Writes the folder for the hub, and uploads it unless `dry_run` is set."""
    assert config.push is not None
    out = Path(config.out)
    report = hub.write_folder(sae, Path(config.sae), config.push, config.licence, out, x)
    print(f"for {config.push}:", *hub.files_in(out), sep="\n  ")
    if config.dry_run:
        return report
    return {**report, "url": hub.push(out, config.push, private=not config.public)}


def sample(config: Config, sae: SAE) -> tuple[Tensor, str]:
    """Inputs [n, d_model] to compare the SAEs on, and a description of them."""
    if config.cache is None:
        norm = f"{float(sae.mean_norm):.4g}"
        return convert.noise(sae), f"Gaussian noise of mean norm {norm} (no --cache was given)"
    cache = ActivationCache(config.cache)
    if cache.d_model != sae.d_model:
        raise UserError(
            f"d_model of {config.sae} is {sae.d_model}, that of {config.cache} {cache.d_model}"
        )
    n = min(config.n_tokens, cache.n_tokens)
    return next(cache.batches(n, seed=0)), f"activations of {config.cache}"


def to_file(sae: SAE, path: Path, x: Tensor) -> dict[str, Any]:
    """Writes this project's file, after checking that it reads back as the same SAE."""
    if path.exists():
        raise UserError(f"--out {path} is there already: choose another name")
    make_folder(path.parent)

    def write(part: Path) -> None:
        part.write_bytes(sae_files.to_bytes(sae))
        require_same(compare(sae, codec(convert.load(part)), x), "what was written")

    write_atomically(path, write)
    comparison = compare(sae, codec(convert.load(path)), x)
    return {"notes": [], "read_by": "this project's reader", "comparison": comparison}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__, argv)
        report = run(config)
        for note in report["notes"]:
            print(f"note: {note}")
        print(f"{config.out}: read back by {report['read_by']}, {report['comparison']}")
        print(f"inputs: {report['inputs']}")
        if config.push:
            print(report.get("url", f"nothing was uploaded; {config.out} is the folder to upload"))


if __name__ == "__main__":
    main()
