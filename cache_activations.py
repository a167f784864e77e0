"""Caches the activations of a language model on text, or your own arrays, in a folder.

    python cache_activations.py --tokens 30_000_000 --layer 3 --out cache/train
    python cache_activations.py --model gpt2 --layer 6 --begin always --dataset my_stories
    python cache_activations.py --activations acts/*.npy --out cache/mine

After an interruption, run the same command again: it continues after the last finished shard and
ends with the same bytes. matryoshka/cache_format.py describes what the folder holds.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.array_files import cache_arrays, count_activations, open_files
from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_format import bytes_each
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import cache_all, clear_leftovers, is_complete, recipe_of
from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.errors import UserError
from matryoshka.files import make_folder, one_writer


@dataclasses.dataclass(frozen=True)
class Config(CacheConfig):
    """What a cache is made of, where it is written, and on which device it is computed."""

    out: str = setting("cache", "folder that the cache is written to")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")
    activations: tuple[str, ...] | None = setting(
        None,
        "arrays to cache in place of a language model's activations: .npy, .pt or .safetensors "
        "files, or folders of them",
    )
    token_ids: tuple[str, ...] | None = setting(
        None, "files with the token ids that belong to --activations"
    )

    def check(self) -> None:
        """Raises `UserError` if a setting is impossible. Reads no files."""
        super().check()
        if self.token_ids and not self.activations:
            raise UserError("--token-ids belong to --activations: give --activations, too")
        if self.activations:
            of_arrays = {"out", "activations", "token_ids", "tokens", "dtype"}
            for field in dataclasses.fields(self):
                if field.name not in of_arrays and getattr(self, field.name) != field.default:
                    flag = f"--{field.name.replace('_', '-')}"
                    raise UserError(
                        f"{flag} has no effect with --activations, which are cached as they are: "
                        "leave it out"
                    )


def run(config: Config) -> dict[str, Any]:
    """Makes the cache, continues one that was interrupted, or finds it complete.

    Returns the figures that are reported. Raises `UserError` if a setting, the model, the dataset
    or the folder is wrong.
    """
    config.check()
    if config.activations:
        return run_on_arrays(config)
    began, folder = time.monotonic(), Path(config.out)
    source = load_source(config, pick_device(config.device))
    recipe = recipe_of(config, source)
    n_written = 0
    if not is_complete(folder, recipe):
        make_folder(folder)
        with one_writer(folder):
            clear_leftovers(folder)
            n_written = cache_all(folder, config, source)
    cache = ActivationCache(folder)
    return {
        "out": str(folder),
        "tokens_asked": config.tokens,
        **figures(cache),
        "shards_made": n_written,
        "layer": config.layer,
        "weights_hash": recipe["weights_hash"],
        "seconds": time.monotonic() - began,
    }


def run_on_arrays(config: Config) -> dict[str, Any]:
    """`run` on the arrays of `config.activations`."""
    began = time.monotonic()
    acts, ids = open_files(config.activations or (), config.token_ids)
    cache = cache_arrays(config.out, acts, ids, dtype=config.dtype, n_tokens=config.tokens)
    n_there = count_activations(acts)
    return {
        "out": config.out,
        "tokens_asked": min(config.tokens, n_there),
        "tokens_left_out": max(0, n_there - cache.n_tokens),
        **figures(cache),
        "seconds": time.monotonic() - began,
    }


def figures(cache: ActivationCache) -> dict[str, Any]:
    """The counts and sizes of a cache."""
    n_stored = sum(shard.n_tokens for shard in cache.shards)
    return {
        "tokens": cache.n_tokens,
        "rows": cache.manifest.n_rows,
        "shards": len(cache.shards),
        "bytes": n_stored * sum(bytes_each(cache.recipe).values()),
        "d_model": cache.d_model,
        "dtype": cache.recipe["dtype"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        result = run(parse(Config, __doc__, argv))
        if result["tokens"] < result["tokens_asked"]:
            print(
                f"the dataset ends after {result['tokens']:,} activations: "
                f"{result['tokens_asked']:,} were asked for"
            )
        if result.get("tokens_left_out"):
            print(f"--tokens leaves out {result['tokens_left_out']:,} activations of the files")
        if result.get("shards_made") == 0:
            print(f"{result['out']} held this cache already: nothing was computed")
        print(result_table(result))


def result_table(result: dict[str, Any]) -> str:
    """What `run` returned, as a table of one row."""
    cells = {
        "cache": result["out"],
        "tokens": f"{result['tokens']:,}",
        "rows": f"{result['rows']:,}",
        "shards": result["shards"],
        "made now": result.get("shards_made", "-"),
        "layer": result.get("layer", "-"),
        "d_model": result["d_model"],
        "MB": f"{result['bytes'] / 1e6:,.1f}",
        "s": f"{result['seconds']:.1f}",
    }
    return table(list(cells), [list(cells.values())])


if __name__ == "__main__":
    main()
