"""Writes a web page of a run's latents: what they fire on, their parents, what they promote.

    python browse.py --run runs/tinystories --cache cache/validation --out runs/tinystories/page

The folder opens in a browser from disk (index.html) or from any static host. What each latent
fires on is collected in one pass over the cache, and kept in the run's folder (examples/).
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka import neuronpedia, page_data
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device, require_not_negative, setting
from matryoshka.contexts import Text
from matryoshka.errors import CannotWrite, UserError
from matryoshka.evaluation_inputs import NO_MODEL, ModelSettings, is_of_model, load_model_of
from matryoshka.example_files import FOLDER, examples_of
from matryoshka.files import file_sha256, make_folder
from matryoshka.language_models import LanguageModel, load_language_model
from matryoshka.latent_data import OneSAE, Outputs, Shown, output_effects, shown_examples
from matryoshka.saved_runs import (
    check_cache,
    load_saes,
    require_same_model,
    training_results,
)

MARKER = "browse.json"  # this file marks a folder as written by this script
STATIC = Path(page_data.__file__).parent / "page"  # index.html and what it loads


@dataclasses.dataclass(frozen=True)
class Config:
    """Which SAEs' latents are shown, on which text, and where the page is written."""

    run: str = setting("runs/tinystories", "folder of a training run, with its SAEs")
    cache: str = setting("cache/validation", "cache of activations to show the latents on")
    out: str | None = setting(None, "folder for the page; default: page in the run's folder")
    saes: tuple[str, ...] | None = setting(None, "which of the run's SAEs; default: all")
    model: str | None = setting(
        None,
        "the language model; none: do not show what latents promote; default: the cache's model",
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer of a model that has none of its own: a hub name, a folder, or TinyModel's .pt "
        "file",
    )
    tokens: str | None = setting(
        None, "JSON file of the text of each token id, if the model's tokenizer does not know it"
    )
    labels: str | None = setting(None, "JSON file of latents' names: {SAE: {number: name}}")
    to: Literal["page", "neuronpedia"] = setting(
        "page", "what is written: a page, or Neuronpedia's JSON of each latent"
    )
    seed: int = setting(0, "seed of the random sample of firings that is shown")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")

    @property
    def out_folder(self) -> Path:
        return Path(self.out) if self.out else Path(self.run) / self.to


def run(config: Config) -> dict[str, Any]:
    """Writes the page to `config.out`; returns the number of latents of each SAE, and megabytes.

    Raises `UserError` if the input is wrong, before anything in `config.out` is touched.
    """
    require_not_negative(config, "seed")
    require_ours(config.out_folder)
    device = pick_device(config.device)
    cache = ActivationCache(config.cache)
    model = load_model(config, cache, device)
    text_of = text_source(config.tokens, model)
    labels = read_labels(config.labels)
    saes = load(config, cache, labels, device)
    vocabulary = page_data.Vocabulary(saes[0].examples.token_counts, text_of)
    source = page_data.Source(saes, Text.of(cache), vocabulary)

    def write(folder: Path) -> None:
        for k, one in enumerate(saes):
            shown = shown_examples(one, cache, source.text, device)
            outputs = output_effects(one.sae, model) if model and model.has_head else None
            write_one(config, folder, source, k, shown, outputs)
        if config.to == "page":
            title = Path(config.run).resolve().name
            page_data.write_run(folder / "data", title, source, cache, labels)

    replace_folder(config.out_folder, write)
    files = [path for path in config.out_folder.rglob("*") if path.is_file()]
    return {
        "out": str(config.out_folder),
        "latents": {one.name: one.sae.n_latents for one in saes},
        "megabytes": round(sum(path.stat().st_size for path in files) / 1e6, 1),
    }


def write_one(
    config: Config,
    folder: Path,
    source: page_data.Source,
    k: int,
    shown: Shown,
    outputs: Outputs | None,
) -> None:
    """Writes SAE number k of `source`, as data of the page or as Neuronpedia's JSON."""
    if config.to == "page":
        if k == 0:
            shutil.copytree(STATIC, folder, dirs_exist_ok=True)
        page_data.write_sae(folder / "data", source, k, shown, outputs)
    else:
        neuronpedia.write_sae(folder, source, k, shown, outputs)


# ----------------------------------------------------------------------------------- what is read


def load(
    config: Config, cache: ActivationCache, labels: page_data.Labels, device: torch.device
) -> list[OneSAE]:
    """The SAEs of the run with their examples, checked against the cache and the labels.

    Raises `UserError` if the run has no SAEs, or not those that were asked for.
    """
    folder = Path(config.run)
    if not folder.is_dir():
        raise UserError(f"--run {folder} is not a folder")
    trained = training_results(folder)
    saes = load_saes(folder, device, trained)
    unknown = [name for name in config.saes or () if name not in saes]
    if unknown:
        raise UserError(f"--saes {unknown[0]}: {folder} has {', '.join(saes)}")
    check_labels(config.labels, labels, {name: sae.n_latents for name, sae in saes.items()})
    saes = {name: saes[name] for name in config.saes or saes}
    check_cache(cache, saes, trained)
    for sae in saes.values():
        require_same_model(cache, sae.about)
    found = []
    for name, sae in saes.items():
        sha256 = file_sha256(folder / f"{name}.safetensors")
        path = folder / FOLDER / f"{name}.safetensors"
        examples = examples_of(path, sae, sha256, cache, config.seed, device)
        found.append(OneSAE(name, sae, sha256, *examples))
    return found


def load_model(
    config: Config, cache: ActivationCache, device: torch.device
) -> LanguageModel | None:
    """The language model, or None if --model is "none" or the cache was made without a model.

    Raises `UserError` if it is not the model that the cache was made with.
    """
    if is_of_model(cache):
        return load_model_of(
            cache, ModelSettings(config.model, tokenizer=config.tokenizer), device
        )[0]
    if config.model in (None, NO_MODEL):
        return None
    model = load_language_model(config.model, device=device, tokenizer=config.tokenizer)
    if model.d_model != cache.d_model:
        raise UserError(
            f"--model {config.model} has d_model {model.d_model}, --cache {cache.folder} "
            f"{cache.d_model}: give the model whose activations these are"
        )
    return model


def text_source(path: str | None, model: LanguageModel | None) -> Callable[[int], str]:
    """The text of a token id: from a JSON file, else the model's, else the id itself."""
    if path is None:
        return model.text_of if model else str
    texts = _read_json(path, "--tokens")
    if isinstance(texts, list):
        texts = dict(enumerate(texts))
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise UserError(f"--tokens {path}: it must hold texts, as a list or by token id")
    by_id = {str(key): value for key, value in texts.items()}
    return lambda tok_id: by_id.get(str(tok_id), str(tok_id))


def read_labels(path: str | None) -> page_data.Labels:
    """Names of latents, by SAE and number. Raises `UserError` if the file holds anything else."""
    labels = _read_json(path, "--labels") if path else {}
    ok = isinstance(labels, dict) and all(
        isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        for names in labels.values()
    )
    if not ok:
        raise UserError(f'--labels {path}: it must be an object such as {{"SAE": {{"3": "name"}}}}')
    return dict(labels)


def check_labels(path: str | None, labels: page_data.Labels, sizes: dict[str, int]) -> None:
    """Raises `UserError` if a name is not of a latent. sizes: the number of latents of each SAE."""
    for sae, names in labels.items():
        if sae not in sizes:
            raise UserError(f"--labels {path}: the run has no SAE {sae!r}, only {', '.join(sizes)}")
        numbers = {str(j) for j in range(sizes[sae])}
        for number in names:
            if number not in numbers:
                raise UserError(
                    f"--labels {path}: {sae!r} has no latent {number!r}, only 0 to {sizes[sae] - 1}"
                )


def _read_json(path: str, flag: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path} is not JSON: {error}") from None


# -------------------------------------------------------------------------------- what is written


def require_ours(out: Path) -> None:
    """Raises `UserError` if `out` is something that this script did not write."""
    if out.is_dir() and (not any(out.iterdir()) or (out / MARKER).is_file()):
        return
    if out.exists():
        raise UserError(
            f"--out {out} was not written by browse.py, and would be replaced: choose another "
            "folder, or move it away"
        )


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Replaces `out` by a folder that `write` fills, whole or not at all."""
    make_folder(out.absolute().parent)
    made = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        new, old = made / "new", made / "old"
        new.mkdir()
        write(new)
        (new / MARKER).write_text(json.dumps({"format": 1}) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        new.rename(out)
    except OSError as error:
        raise CannotWrite(f"cannot write --out {out} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__, argv)
        done = run(config)
        latents = ", ".join(f"{n} latents of {name}" for name, n in done["latents"].items())
        print(f"{done['out']}: {latents}; {done['megabytes']} MB")
        if config.to == "page":
            print(f"open {Path(done['out']).resolve() / 'index.html'}")


if __name__ == "__main__":
    main()
