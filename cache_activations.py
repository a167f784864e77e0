"""Token ids -> TinyModel -> a cache of activations on disk.

    python cache_activations.py --tokens 30_000_000 --layer 3 --out cache/train

Whatever interrupts it, the same command goes on after the last finished shard and ends with the
same bytes. What the folder holds is described in matryoshka/cache_format.py.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_format import bytes_each
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import cache_all, clear_leftovers, is_complete, recipe_of
from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.files import make_folder, one_writer


@dataclasses.dataclass(frozen=True)
class Config(CacheConfig):
    """What a cache is made of, where it goes, and what computes it."""

    out: str = setting("cache", "folder that the cache goes to")
    device: str = setting("auto", "auto, cpu, cuda, ...")


def run(config: Config) -> dict[str, Any]:
    """Caches what `config` says, or goes on with it, or finds it done; returns the figures.

    Raises `UserError` where a setting, the model, the dataset or the folder is not right.
    """
    config.check()
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
        "tokens": cache.n_tokens,
        "rows": cache.manifest.n_rows,
        "shards": len(cache.shards),
        "shards_made": n_written,
        "bytes": sum(shard.n_tokens for shard in cache.shards) * sum(bytes_each(recipe).values()),
        "layer": config.layer,
        "d_model": cache.d_model,
        "dtype": config.dtype,
        "weights_hash": recipe["weights_hash"],
        "seconds": time.monotonic() - began,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        result = run(parse(Config, "Cache a language model's activations.", argv))
        if result["tokens"] < result["tokens_asked"]:
            print(
                f"the dataset ends after {result['tokens']:,} activations: "
                f"{result['tokens_asked']:,} were asked for"
            )
        if result["shards_made"] == 0:
            print(f"{result['out']} held this cache already: nothing was computed")
        print(result_table(result))


def result_table(result: dict[str, Any]) -> str:
    """What `run` returned, as a table of one row."""
    cells = {
        "cache": result["out"],
        "tokens": f"{result['tokens']:,}",
        "rows": f"{result['rows']:,}",
        "shards": result["shards"],
        "made now": result["shards_made"],
        "layer": result["layer"],
        "d_model": result["d_model"],
        "MB": f"{result['bytes'] / 1e6:,.1f}",
        "s": f"{result['seconds']:.1f}",
    }
    return table(list(cells), [list(cells.values())])


if __name__ == "__main__":
    main()
