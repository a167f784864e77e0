"""SAEs to other tools' files and back, each proven by reading it back.

    python export.py --sae runs/x/matryoshka.safetensors --to saelens --out exported \\
        --cache cache/validation
    python export.py --sae exported --from saelens --out runs/y/sae.safetensors

--sae is a file of this project, or a folder of SAELens, dictionary_learning or sparsify. Which, is
seen from its files; --from says which it must be, and leads back to a file of this project unless
--to names another tool. What is written is read back, by SAELens too where that is installed, and
encodes and decodes a sample of the cache in float64; without a cache, Gaussian noise. If anything
but rounding differs, nothing is written. What the other tool cannot express is printed, and kept in
the metadata. Python has the same as `matryoshka.convert`.

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
    """What is converted, to what, and where it is written."""

    sae: str = setting(help="the SAE: a file of this project, or a folder of another tool")
    to: Literal["saelens", "dictionary-learning", "matryoshka"] | None = setting(
        None,
        "format of --out; matryoshka: a file of this project (default: saelens, or with --from "
        "matryoshka)",
    )
    from_: Literal["saelens", "dictionary-learning", "sparsify"] | None = setting(
        None, "format that --sae must be in (default: whichever it is in)", flag="from"
    )
    out: str = setting(help="the folder to write, or the file where it is of this project")
    cache: str | None = setting(None, "activations to prove it on; default: Gaussian noise")
    n_tokens: int = setting(4096, "how many of them, from all over the cache")
    widths: tuple[int, ...] | None = setting(
        None, "prefixes to keep, for dictionary-learning; default: those trained at"
    )
    push: str | None = setting(
        None, "OWNER/NAME on the Hugging Face hub to upload to; --out is then the hub's folder"
    )
    dry_run: bool = setting(False, "with --push: write the folder, and upload nothing")
    public: bool = setting(False, "with --push: let everyone read it")
    licence: str = setting("mit", "with --push: under which licence, by the hub's name for it")


def run(config: Config) -> dict[str, Any]:
    """Writes `config.out`; returns what is reported: "notes", "read_by", "inputs" (what it was
    proven on) and "comparison". Raises `UserError`; then nothing is written."""
    require_positive(config, "n_tokens")
    target = config.to or ("matryoshka" if config.from_ else "saelens")
    check_push(config)
    if config.widths and (config.push or target != "dictionary-learning"):
        raise UserError(
            "--widths is for --to dictionary-learning: nothing else has prefixes to set"
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
    """Raises `UserError` before anything is written where nothing could be pushed."""
    if config.push is not None:
        if config.to is not None:
            raise UserError(f"--to {config.to} is not for --push, which uploads both forms")
        hub.require_repo_name(config.push)
        if not config.dry_run:
            hub.require_token(config.push)
    elif config.dry_run or config.public:
        raise UserError(f"--{'dry-run' if config.dry_run else 'public'} is for --push OWNER/NAME")


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
    """Inputs [n, d_model] to prove a conversion on, and what they are."""
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
    """Writes the SAE's file, once it reads back as the same SAE."""
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
            print(report.get("url", f"nothing was uploaded; {config.out} is what would be"))


if __name__ == "__main__":
    main()
