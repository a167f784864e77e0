"""Measures browsing: time to collect the statistics, size of the page, time to open it.

    python -m studies.bench_browse --no-page                           # the ratio, at full size
    python -m studies.bench_browse --d-model 64 --tokens 500000        # the memory
    python -m studies.bench_browse --d-model 64 --n-latents 65536 --tokens 20000 --repeats 0

The time to collect is compared with that of a pass that only encodes. Activations are random, and
the SAE's biases are set so that 30 latents fire on a token, some of them often and most of them
seldom. If Chromium is installed, the page is opened in it.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import browse
from matryoshka.array_files import cache_arrays
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import (
    main_guard,
    parse,
    require_not_negative,
    require_positive,
    setting,
)
from matryoshka.environment import environment
from matryoshka.files import make_folder, write_json
from matryoshka.top_examples import BATCH_SIZE, collect
from sae import SAE, seeded_generator
from studies import screenshots
from studies.bench import alternate, peak_memory

ROW = 128  # tokens
D_VOCAB = 10_000
LATENTS_OPENED = 20  # how many latents' views are opened in the browser


@dataclasses.dataclass(frozen=True)
class Config:
    """The size of the SAE and the cache, and what is measured."""

    n_latents: int = setting(3072, "latents of the SAE")
    d_model: int = setting(768, "width of the activations")
    tokens: int = setting(100_000, "activations in the cache")
    l0: float = setting(30.0, "latents that fire on a token, on average")
    repeats: int = setting(3, "how often the two passes are timed; 0: not at all")
    page: bool = setting(True, "write the page, and open it if Chromium is installed")
    out: str = setting("runs/bench", "folder for browse.json")


def placed_sae(config: Config) -> SAE:
    """An SAE of which l0 latents fire on a random activation, on average."""
    generator = seeded_generator(0)
    sae = SAE(config.d_model, config.n_latents).requires_grad_(False)
    share = torch.rand(config.n_latents, generator=generator) ** 3
    share = (share * (config.l0 / share.sum())).clamp(1e-4, 0.5)
    column = sae.W_enc.norm(dim=0) * sae.scale  # the standard deviation of a pre-activation
    sae.b_enc.copy_(-column * torch.special.ndtri(1 - share.double()).float())
    sae.about = {"n_prefixes": 10}
    return sae


def arrays(config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields activations and token ids of rows, a few thousand tokens at a time."""
    generator = seeded_generator(1)
    for start in range(0, config.tokens, BATCH_SIZE):
        n = -(-min(BATCH_SIZE, config.tokens - start) // ROW)
        acts = torch.randn(n, ROW, config.d_model, generator=generator)
        ids = (torch.rand(n, ROW, generator=generator) ** 4 * D_VOCAB).long()
        yield acts, ids


def timed_passes(sae: SAE, cache: ActivationCache, repeats: int) -> dict[str, Any]:
    """Milliseconds of a pass that only encodes, of one that collects, and the ratio of the two."""

    @torch.inference_mode()
    def encode() -> None:
        for batch in cache.sequential(BATCH_SIZE):
            sae.encode(batch.acts)

    passes = {"encode only": encode, "collect": lambda: collect(sae, cache)}
    times = alternate(passes, repeats, torch.device("cpu"))
    return {**times, "ratio": times["collect"]["median"] / times["encode only"]["median"]}


def opened(page: Path, n_latents: int) -> dict[str, Any]:
    """Median seconds until Chromium shows the first view, and until it shows a latent's view."""
    if screenshots.why_not():
        return {"not opened": screenshots.why_not()}
    index = (page / "index.html").resolve().as_uri()
    with screenshots.chromium() as driver:
        driver.get(index)  # the browser itself is warm after this
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            screenshots.show(driver, index, "")
            seconds.append(time.perf_counter() - start)
        latents = []
        for i in range(LATENTS_OPENED):
            address = f"#/matryoshka/{i * (n_latents // LATENTS_OPENED)}"
            latents.append(
                driver.execute_async_script(
                    """const [address, done] = arguments; const start = performance.now();
                    const ready = () => document.getElementById('main').dataset.shown === address
                      ? done((performance.now() - start) / 1000) : setTimeout(ready, 1);
                    location.hash = address; ready();""",
                    address,
                )
            )
    return {"first view": statistics.median(seconds), "a latent": statistics.median(latents)}


def written_page(folder: Path, n_latents: int) -> dict[str, Any]:
    """Writes the page of `folder`'s run; its megabytes, seconds to write and seconds to open."""
    start, page = time.perf_counter(), folder / "page"
    run, cache = str(folder / "run"), str(folder / "cache")
    wrote = browse.run(browse.Config(run=run, cache=cache, out=str(page), device="cpu"))
    seconds = time.perf_counter() - start
    of_page = {"megabytes": wrote["megabytes"], "seconds to write": seconds}
    return of_page | opened(page, n_latents)


def run(config: Config) -> dict[str, Any]:
    """Measures; writes browse.json to `config.out` and returns what it holds."""
    require_positive(config, "n_latents", "d_model", "tokens", "l0")
    require_not_negative(config, "repeats")
    make_folder(Path(config.out))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        acts, ids = (pair[0] for pair in arrays(config)), (pair[1] for pair in arrays(config))
        cache = cache_arrays(folder / "cache", acts, ids)
        sae = placed_sae(config)
        (folder / "run").mkdir()
        sae.save(folder / "run" / "matryoshka.safetensors")
        results: dict[str, Any] = {"config": dataclasses.asdict(config)}
        if config.repeats:
            results["passes"] = timed_passes(sae, cache, config.repeats)
        if config.page:
            results["page"] = written_page(folder, config.n_latents)
        results["l0"] = float((sae.encode(cache.acts(0, 4096)) > 0).sum(1).double().mean())
    results["peak_memory"] = peak_memory(torch.device("cpu"))
    results["environment"] = environment(torch.device("cpu"))
    write_json(Path(config.out) / "browse.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        results = run(parse(Config, __doc__ or "", argv))
        for name in ("l0", "passes", "page", "peak_memory"):
            print(f"{name}: {results.get(name, 'not timed')}")


if __name__ == "__main__":
    main()
