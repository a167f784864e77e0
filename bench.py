"""How fast, against what: times are medians of repeats, and what matters are ratios in one run.

    python bench.py                    all of it; under five minutes on two CPU cores
    python bench.py --part step        a training step at full size, against dense arithmetic
    python bench.py --part toy-whole   train_toy.py itself, for one seed and for ten

Machines are noisy: the variants of a table take turns, so that a slow moment hits all of them. The
yardstick at full size is the five dense matrix products that a step cannot do without if it works
densely: encode, decode, and three in the backward pass.

The SAE "at L0 30" is not trained here, which would take too long: its dictionary is that of the
synthetic data it is measured on, 3,072 directions that are active with frequencies falling from
common to rare, and its biases are set so that it fires 30 latents an input. Writes a JSON file with
every median, its quartiles, and where it was measured.
"""

import dataclasses
import itertools
import json
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache_activations
import script
import tiny_model
import train_toy
from gradients import Params, write_gradient
from sae import SAE, Trainer, TrainerConfig, reach, sample_prefixes, seeded_generator
from script import setting

Times = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the figures go."""

    part: str = setting(
        "all", "what to measure", choices=["all", "toy", "toy-whole", "step", "growth", "data"]
    )
    repeats: int = setting(7, "how often each variant is timed; the median counts")
    out: str = setting("runs/bench", "folder for the JSON file")
    device: str = setting(
        "auto", "torch device of the full-size step; auto: the GPU if there is one"
    )


def alternate(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> Times:
    """Milliseconds a call of each variant: its median, and its quartiles. They take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, call in variants.items():
            _wait_for(device)
            start = time.perf_counter()
            call()
            _wait_for(device)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _quartiles(values) for name, values in times.items()}


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------- the toy

TOY_STEPS = 100  # timed at once
TOY_SAMPLES = 200_000  # at once: what training draws; a call for more is bound by its allocation


def bench_toy(repeats: int) -> Times:
    """The tree, and a step of both SAEs alone and of both for several seeds at once, on the CPU.

    Step times are for one step of the whole stack; a stack is stepped on one thread, as
    `train_toy.py` does it.
    """
    tree = train_toy.load_tree("tree.json")
    generator = seeded_generator(0)
    cpu = torch.device("cpu")
    with script.threads(1):
        variants = {
            "a step of the pair": toy_steps([10, 1]),
            "of vanilla": toy_steps([1]),
            "of matryoshka": toy_steps([10]),
            "of 10 pairs": toy_steps([10, 1] * 10),
            "of 100 pairs": toy_steps([10, 1] * 100),
        }
        times = alternate(variants, repeats, cpu)
    for quartiles in times.values():
        for name in quartiles:
            quartiles[name] /= TOY_STEPS
    samples = alternate({"": lambda: tree.sample(TOY_SAMPLES, generator)}, 5 * repeats, cpu)[""]
    return times | {"a million samples of the tree": {q: 5 * ms for q, ms in samples.items()}}


def toy_steps(n_prefixes: Sequence[int]) -> Callable[[], None]:
    """A call that takes TOY_STEPS steps of a stack of SAEs at the toy's size."""
    n_saes = len(n_prefixes)
    stack = SAE.stack([SAE(20, 20, seed) for seed in range(n_saes)])
    config = TrainerConfig(n_steps=40_000, target_l0=1.2338)
    trainer = Trainer(stack, config, list(range(n_saes)), n_prefixes)
    x = torch.randn(10, n_saes, 200, 20, generator=seeded_generator(1))

    def steps() -> None:
        for t in range(TOY_STEPS):
            trainer.step(x[t % len(x)])

    return steps


def bench_toy_whole() -> Times:
    """`train_toy.py` from its settings to its figures, once each: one seed, and ten.

    Add about 3 s for Python to start and import torch.
    """
    times = {}
    for seeds in (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            train_toy.run(train_toy.Config(seeds=seeds, out=folder))
            ms = 1e3 * (time.perf_counter() - start)
        times[f"train_toy.py, {seeds} seed{'s' * (seeds > 1)}"] = {"median": ms}
    return times


# ------------------------------------------------------------------------------------- full size

D_MODEL, N_LATENTS, BATCH, L0 = 768, 3072, 1024, 30


class Case:
    """An SAE at full size, its data, and its steps with any number of prefixes."""

    def __init__(self, device: torch.device, n_latents: int = N_LATENTS, l0: float = L0):
        """`l0` latents fire on an input; `math.inf`: a fresh SAE, half of whose latents do."""
        self.device, self.n_latents = device, n_latents
        generator = seeded_generator(0)
        sae = SAE(D_MODEL, n_latents)
        dictionary = torch.nn.functional.normalize(
            torch.randn(n_latents, D_MODEL, generator=generator), dim=1
        )
        x = torch.randn(BATCH, D_MODEL, generator=generator)
        if l0 < math.inf:
            # frequencies fall as a power of the place, none above 1/2, and sum to l0
            frequency = (torch.arange(n_latents) + 10.0) ** -0.8
            for _ in range(50):
                frequency = (frequency * (l0 / frequency.sum())).clamp(max=0.5)
            active = torch.rand(BATCH, n_latents, generator=generator) < frequency
            strength = active * (0.5 + torch.rand(BATCH, n_latents, generator=generator))
            x = strength @ dictionary + 0.02 * x
            with torch.no_grad():
                preacts = x @ dictionary.T
                kept = (frequency * BATCH).round().clamp(1, BATCH // 2).long()
                ranked = preacts.sort(dim=0, descending=True).values
                sae.b_enc.copy_(-ranked.gather(0, kept[None])[0])
                sae.W_enc.copy_(dictionary.T)
                sae.W_dec.copy_(dictionary)
        sae.mean_norm.fill_(math.sqrt(D_MODEL))  # inputs are taken as they are
        self.x, self.sae = x.to(device), SAE.stack([sae]).to(device)

    def step(self, n_prefixes: int, prefixes: str = "sampled") -> Callable[[], object]:
        """A call that takes one step, with a learning rate too small to change anything."""
        config = TrainerConfig(
            n_steps=10**6,
            target_l0=L0,
            lr=1e-12,
            prefixes=prefixes,  # type: ignore[arg-type]
        )
        trainer = Trainer(self.sae, config, [0], [n_prefixes])
        trainer._scaled = lambda x: x  # type: ignore[method-assign]
        return lambda: trainer.step(self.x)

    def five_products(self) -> Callable[[], object]:
        """The dense step's matrix products alone, on dense operands."""
        W_enc, W_dec, x = self.sae.W_enc[0].detach(), self.sae.W_dec[0].detach(), self.x
        acts = torch.rand(BATCH, self.n_latents, device=self.device)
        g_x, g_acts = torch.randn_like(x), torch.rand_like(acts)

        def call() -> None:
            x @ W_enc
            acts @ W_dec
            g_x @ W_dec.T
            acts.T @ g_x
            g_acts.T @ x

        return call

    def gradient(self, n_prefixes: int) -> Callable[[], object]:
        """The gradient alone, without scaling, clipping, Adam and the order."""
        parts = [self.sae.W_enc.mT, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec]
        flat = torch.cat([part.detach().flatten(1) for part in parts], dim=1)
        params = Params.of(flat, D_MODEL, self.n_latents)
        grads = Params.of(torch.zeros_like(flat), D_MODEL, self.n_latents)
        drawn = sample_prefixes(self.n_latents, n_prefixes, seeded_generator(0))
        reached = reach(drawn, self.n_latents)[None].to(self.device)
        x = self.x[None]
        return torch.inference_mode()(lambda: write_gradient(grads, params, x, reached, reached))


def bench_step(repeats: int, device: torch.device) -> Times:
    """A step at full size: trained and fresh, by prefixes, and its parts."""
    trained, fresh = Case(device), Case(device, l0=math.inf)
    W_enc, x = trained.sae.W_enc[0].detach(), trained.x
    order = torch.rand(1, N_LATENTS, device=device)
    variants = {
        "five dense products": trained.five_products(),
        "vanilla": trained.step(1),
        "matryoshka, 10 prefixes": trained.step(10),
        "2 prefixes": trained.step(2),
        "100 prefixes": trained.step(100),
        "expected prefixes": trained.step(10, "expected"),
        "vanilla, fresh": fresh.step(1),
        "matryoshka, 10 prefixes, fresh": fresh.step(10),
        "of these: the encoder's product": lambda: x @ W_enc,
        "of these: the gradient, 10 prefixes": trained.gradient(10),
        "of these: the order": lambda: order.sort(dim=1, descending=True, stable=True),
    }
    return alternate(variants, repeats, device)


def bench_growth(repeats: int, device: torch.device) -> Times:
    """Matryoshka steps and dense products, by size at L0 30, and by L0 at full size."""
    variants: dict[str, Callable[[], object]] = {}
    times: Times = {}
    for n_latents in (3072, 6144, 12288, 24576, 49152):
        case = Case(device, n_latents)
        variants = {
            f"{n_latents} latents": case.step(10),
            f"{n_latents} latents, five products": case.five_products(),
        }
        times |= alternate(variants, max(2, repeats // 3), device)
    variants = {f"L0 {l0}": Case(device, l0=l0).step(10) for l0 in (10, 30, 100, 300)}
    return times | alternate(variants, repeats, device)


# ------------------------------------------------------------------------------------- the data


def bench_data(repeats: int, device: torch.device) -> Times:
    """Caching against the bare forward pass, on a model of the stand-in's shape with random
    weights and rows; and a batch of 1,024 from a cache of it that is streamed, not held."""
    shapes = tiny_model.expected_shapes(256, 4, 1024, 10_000, 256)
    generator = seeded_generator(0)
    state = {name: 0.02 * torch.randn(s, generator=generator) for name, s in shapes.items()}
    rows = torch.randint(0, 9_000, (1024, 128), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.save(state, out / "model.pt")
        lines = (json.dumps({"tok_ids": row}) + "\n" for row in rows.tolist())
        (out / "train.jsonl").write_text("".join(lines))
        config = cache_activations.Config(
            model=str(out / "model.pt"),
            dataset=folder,
            rows_per_shard=256,
            out=str(out / "cache"),
            device=str(device),
        )
        model = cache_activations.load_model(config)

        def forward() -> None:
            with torch.inference_mode():
                for block in rows.to(device).split(config.batch_size):
                    model.residual(block, config.layer)

        def cache() -> None:
            shutil.rmtree(config.out, ignore_errors=True)
            Path(config.out).mkdir()
            cache_activations.cache_rows(config, model, 0, len(rows))

        times = alternate({"bare forward": forward, "caching": cache}, max(3, repeats // 2), device)
        cache_activations.finish(Path(config.out), len(rows))
        reader = cache_activations.ActivationCache(config.out)
        batches = reader.batches(1024, 0, max_resident=0)
        return times | alternate({"a batch, streamed": lambda: next(batches)}, 200, device)


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def show(times: Times) -> str:
    """Milliseconds, with the spread and the ratio to the table's first row."""
    first = next(iter(times.values()))["median"]
    rows = []
    for name, t in times.items():
        spread = f"{t['q1']:.2f} to {t['q3']:.2f}" if "q1" in t else "once"
        rows.append([name, f"{t['median']:.2f}", spread, f"{t['median'] / first:.2f}"])
    return script.table(["", "ms", "quartiles", "ratio"], rows)


def run(config: Config) -> dict[str, Any]:
    """Measures what `config.part` says, and writes it to a JSON file in `config.out`."""
    script.require_positive(config, "repeats")
    device = script.pick_device(config.device)
    out = Path(config.out)
    script.make_folder(out)
    parts: dict[str, Callable[[], Times]] = {
        "toy": lambda: bench_toy(config.repeats),
        "toy-whole": bench_toy_whole,
        "step": lambda: bench_step(config.repeats, device),
        "growth": lambda: bench_growth(config.repeats, device),
        "data": lambda: bench_data(config.repeats, device),
    }
    asked = list(parts) if config.part == "all" else [config.part]
    results: dict[str, Any] = {name: parts[name]() for name in asked}
    results["environment"] = script.environment(device)
    results["peak_memory"] = peak_memory(device)
    script.write_json(out / f"{config.part}.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        results = run(script.parse(Config, __doc__, argv))
        for name in itertools.takewhile(lambda name: name != "environment", results):
            print(f"\n{name}\n{show(results[name])}")
        print(f"\n{results['environment']['device']}; peak memory {results['peak_memory']}")


if __name__ == "__main__":
    main()
