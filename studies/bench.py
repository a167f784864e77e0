"""Measures speed. Times are medians of repeats; compare times of one run only, as ratios.

    python -m studies.bench                    all but the pair; under 5 minutes on two CPU cores
    python -m studies.bench --part step        a step at full size, against dense arithmetic
    python -m studies.bench --part toy-whole   train_toy.py itself, for one seed and for ten
    python -m studies.bench --part pair        train.py itself, 30,000 steps: for a GPU

Machines are noisy, so the variants of a table take turns: a slow moment hits all of them. At full
size, times are compared with those of the five dense matrix products that a step has if it uses no
sparsity: encode, decode, and three in the backward pass.

At full size the data is synthetic: 3,072 known directions, 30 of them active in an input on
average, some often and most seldom. SAEs start at those directions and are trained until 30 latents
fire on an input. Where the size or the L0 varies, training would take too long: there the SAEs are
placed at the directions and not trained. "Fresh" SAEs are as initialised: half of their latents
fire. "bfloat16" means `--matmul-dtype bfloat16`; it is left out on machines without instructions
for it, where a product takes up to seventy times as long. "batchtopk" is `train.py --recipe paper`
without dead latents; SAELens's SAEs have none either. The pair is a Matryoshka and a vanilla SAE,
trained side by side on a cache of such data.

Writes a JSON file with every median, its quartiles, and where it was measured.
"""

import dataclasses
import itertools
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import cache_activations
import train
import train_toy
from matryoshka import tiny_model
from matryoshka.array_files import cache_arrays
from matryoshka.cache_config import load_source
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import cache_rows, finish
from matryoshka.command_line import main_guard, parse, pick_device, require_positive, setting, table
from matryoshka.environment import environment, multiplies_bfloat16
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_json
from matryoshka.kernels import MatmulDtype
from matryoshka.process import threads
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from matryoshka.training_config import RECIPES
from sae import SAE, seeded_generator
from studies import bench_cases
from studies.bench_cases import (
    Case,
    Synthetic,
    load_original,
    original_step,
    require_saelens,
    saelens_step,
)

Times = dict[str, dict[str, float]]
Prefixes = Literal["sampled", "expected"]
# The settings of `train.py --recipe paper` that say what kind of SAE it trains.
BATCHTOPK = {name: RECIPES["paper"][name] for name in ("widths", "auxiliary")}
Part = Literal["all", "toy", "toy-whole", "step", "growth", "data", "pair", "pair-bfloat16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    part: Part = setting("all", "what to measure")
    repeats: int = setting(7, "how often each variant is timed")
    original: str = setting(
        "", "a clone of github.com/noanabeshima/matryoshka-saes whose step --part step times, too"
    )
    saelens: bool = setting(
        False, "--part step times SAELens's step, too; needs pip install sae-lens==6.54.12"
    )
    pair_steps: int = setting(30_000, "training steps of --part pair and pair-bfloat16")
    out: str = setting("runs/bench", "folder for the JSON file")
    device: str = setting(
        "auto", "torch device of the full-size step; auto: the GPU if there is one"
    )


def alternate(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    calls: int = 1,
) -> Times:
    """The median and the quartiles of each variant's milliseconds a call.

    The variants take turns, each of which is `calls` calls.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, call in variants.items():
            _wait_for(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _wait_for(device)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: _quartiles(values) for name, values in times.items()}


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------- the toy

TOY_STEPS = 100  # steps that are timed together
# Samples drawn in one call: about as many as in training. For more, allocation would take longest.
TOY_SAMPLES = 200_000


def bench_toy(repeats: int) -> Times:
    """Times the tree's samples, and steps of one SAE, of a pair and of stacks of pairs, on the CPU.

    A time is that of one step of the whole stack, on one thread, as in `train_toy.py`.
    """
    tree = train_toy.load_tree("tree.json")
    generator = seeded_generator(0)
    cpu = torch.device("cpu")
    with threads(1):
        variants = {
            "a step of the pair": toy_steps([10, 1]),
            "of vanilla": toy_steps([1]),
            "of matryoshka": toy_steps([10]),
            "of matryoshka, expected prefixes": toy_steps([10], "expected"),
            "of 10 pairs": toy_steps([10, 1] * 10),
            "of 100 pairs": toy_steps([10, 1] * 100),
        }
        times = alternate(variants, repeats, cpu)
    for quartiles in times.values():
        for name in quartiles:
            quartiles[name] /= TOY_STEPS
    samples = alternate({"": lambda: tree.sample(TOY_SAMPLES, generator)}, 5 * repeats, cpu)[""]
    return times | {"a million samples of the tree": {q: 5 * ms for q, ms in samples.items()}}


def toy_steps(n_prefixes: Sequence[int], prefixes: Prefixes = "sampled") -> Callable[[], None]:
    """A function that takes TOY_STEPS steps of a stack of SAEs of the toy's size."""
    n_saes = len(n_prefixes)
    configs = [
        TrainerConfig(n_steps=40_000, target_l0=1.2338, prefixes=prefixes, n_prefixes=n)
        for n in n_prefixes
    ]
    trainer = Trainer([SAE(20, 20, seed) for seed in range(n_saes)], configs, range(n_saes))
    x = torch.randn(10, n_saes, 200, 20, generator=seeded_generator(1))

    def steps() -> None:
        for t in range(TOY_STEPS):
            trainer.step(x[t % len(x)])

    return steps


def bench_toy_whole() -> Times:
    """Times the whole of `train_toy.py` once for one seed, and once for ten.

    The command takes about 3 s more, for Python to start and import torch.
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


PAIR_BATCHES = 100  # batches in the cache that the pair is trained on, in many passes


def steps_at_once(device: torch.device) -> int:
    """How many steps are timed together; on a GPU several, as training does not wait for each."""
    return 20 if device.type == "cuda" else 1


def bench_step(
    repeats: int, device: torch.device, original: Any = None, saelens: bool = False
) -> Times:
    """Times a step at full size: by kind of SAE and number of prefixes, and its parts.

    The result has the L0 of the trained vanilla and Matryoshka SAEs.
    """
    vanilla, matryoshka = Case.trained(device, 1), Case.trained(device, 10)
    batchtopk = Case.trained(device, 5, "batchtopk", **BATCHTOPK)
    fresh_batchtopk = Case.fresh(device, "batchtopk", bench_cases.L0)
    fresh = Case.fresh(device)
    variants: dict[str, Callable[[], object]] = {
        "five dense products": matryoshka.five_products(),
        "vanilla": vanilla.step(1),
        "matryoshka, 10 prefixes": matryoshka.step(10),
        "2 prefixes": matryoshka.step(2),
        "100 prefixes": matryoshka.step(100),
        "expected prefixes": matryoshka.step(10, prefixes="expected"),
        "vanilla, fresh": fresh.step(1),
        "matryoshka, 10 prefixes, fresh": fresh.step(10),
        "batchtopk, 5 widths": batchtopk.step(5, **BATCHTOPK),
        "batchtopk, 5 widths, fresh": fresh_batchtopk.step(5, **BATCHTOPK),
    }
    if multiplies_bfloat16(device):
        variants |= {
            "bfloat16: five dense products": matryoshka.five_products("bfloat16"),
            "bfloat16: vanilla": vanilla.step(1, matmul_dtype="bfloat16"),
            "bfloat16: matryoshka, 10 prefixes": matryoshka.step(10, matmul_dtype="bfloat16"),
            "bfloat16: batchtopk, 5 widths": batchtopk.step(
                5, **BATCHTOPK, matmul_dtype="bfloat16"
            ),
            "bfloat16: vanilla, fresh": fresh.step(1, matmul_dtype="bfloat16"),
            "bfloat16: matryoshka, 10 prefixes, fresh": fresh.step(10, matmul_dtype="bfloat16"),
        }
    variants |= matryoshka.parts(10)
    if original is not None:
        for name, case, n_prefixes in (
            ("vanilla", vanilla, 1),
            ("matryoshka, 10 prefixes", matryoshka, 10),
            ("matryoshka, 10 prefixes, fresh", fresh, 10),
        ):
            variants[f"the original: {name}"] = original_step(original, case, n_prefixes)
    if saelens:
        for name, case in (("", batchtopk), (", fresh", fresh_batchtopk)):
            variants[f"SAELens: batchtopk, 5 widths{name}"] = saelens_step(case)
        if multiplies_bfloat16(device):
            name = "SAELens, autocast: batchtopk, 5 widths"
            variants[name] = saelens_step(batchtopk, autocast=True)
    times = alternate(variants, repeats, device, steps_at_once(device))
    times["vanilla"]["l0"] = vanilla.l0()
    times["matryoshka, 10 prefixes"]["l0"] = matryoshka.l0()
    return times


def bench_growth(repeats: int, device: torch.device) -> Times:
    """Times Matryoshka steps and dense products by size at L0 30, and steps by L0 at full size."""
    times: Times = {}
    has_bfloat16 = multiplies_bfloat16(device)
    for n_latents in (3072, 6144, 12288, 24576, 49152):
        case = Case.placed(device, n_latents)
        sized = {
            f"{n_latents} latents": case.step(10),
            f"{n_latents} latents, five products": case.five_products(),
        }
        if has_bfloat16:
            sized[f"{n_latents} latents, bfloat16"] = case.step(10, matmul_dtype="bfloat16")
        times |= alternate(sized, max(2, repeats - 2), device, steps_at_once(device))
    variants: dict[str, Callable[[], object]] = {}
    for l0 in (10, 30, 100, 300):
        case = Case.placed(device, l0=l0)
        variants[f"L0 {l0}"] = case.step(10)
        if has_bfloat16:
            variants[f"L0 {l0}, bfloat16"] = case.step(10, matmul_dtype="bfloat16")
    return times | alternate(variants, repeats, device, steps_at_once(device))


def bench_pair(n_steps: int, device: torch.device, dtype: MatmulDtype) -> Times:
    """Times the whole of `train.py` once, for both SAEs at full size.

    The result has the share of the time spent waiting for data, and the final L0 and FVU.
    """
    data = Synthetic(bench_cases.N_LATENTS, bench_cases.L0)
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_arrays(Path(folder) / "cache", (data.draw() for _ in range(PAIR_BATCHES)))
        config = train.Config(
            cache=str(cache.folder),
            n_latents=bench_cases.N_LATENTS,
            batch_size=bench_cases.BATCH,
            target_l0s=(float(bench_cases.L0),),
            n_steps=n_steps,
            matmul_dtype=dtype,
            device=str(device),
            out=str(Path(folder) / "run"),
        )
        start = time.perf_counter()
        results = train.run(config)
        seconds = time.perf_counter() - start
    ends = {
        f"{run['sae']}_{x}": run[x] for run in results["runs"] for x in ("final_l0", "training_fvu")
    }
    waited = results["waited_for_data"] / max(results["seconds"], 1e-9)
    return {f"{n_steps} steps, {dtype}": {"median": 1e3 * seconds, "waited_share": waited} | ends}


# ------------------------------------------------------------------------------------- the data


def bench_data(repeats: int, device: torch.device) -> Times:
    """Times caching and the bare forward pass, and a batch of 1,024 that is read from disk.

    The language model has the stand-in's shape, random weights and random rows.
    """
    shapes = tiny_model.expected_shapes(256, 4, 1024, 10_000, 256)
    generator = seeded_generator(0)
    state = {name: 0.02 * torch.randn(s, generator=generator) for name, s in shapes.items()}
    rows = torch.randint(0, 9_000, (1024, 128), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.save(state, out / "model.pt")
        lines = (json.dumps({"tok_ids": row}) + "\n" for row in rows.tolist())
        (out / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        config = cache_activations.Config(
            model=str(out / "model.pt"),
            dataset=folder,
            rows_per_shard=256,
            out=str(out / "cache"),
            device=str(device),
        )
        source, made = load_source(config, device), Path(config.out)

        def forward() -> None:
            with torch.inference_mode():
                for block in torch.split(rows.to(device), config.batch_size):
                    source.model.residual(block, config.layer)

        def cache() -> None:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            cache_rows(made, config, source, 0, len(rows))

        times = alternate({"bare forward": forward, "caching": cache}, max(3, repeats // 2), device)
        finish(made, len(rows))
        reader = ActivationCache(made)
        batches = reader.batches(1024, 0, max_resident=0)
        return times | alternate({"a batch, streamed": lambda: next(batches)}, 200, device)


def peak_memory(device: torch.device) -> str:
    """The peak memory of this process, with its unit."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def show(times: Times) -> str:
    """A table of medians in milliseconds, quartiles, and ratios to the first row's median."""
    first = next(iter(times.values()))["median"]
    rows = []
    for name, t in times.items():
        spread = f"{t['q1']:.2f} to {t['q3']:.2f}" if "q1" in t else "once"
        rows.append([name, f"{t['median']:.2f}", spread, f"{t['median'] / first:.2f}"])
    return table(["", "ms", "quartiles", "ratio"], rows)


def run(config: Config) -> dict[str, Any]:
    """Measures what `config.part` says, and writes it to a JSON file in `config.out`."""
    require_positive(config, "repeats", "pair_steps")
    device = pick_device(config.device)
    for flag in ("original", "saelens"):
        if getattr(config, flag) and config.part not in ("all", "step"):
            raise UserError(f"--{flag} needs --part step or all, not --part {config.part}")
    original = load_original(config.original) if config.original else None
    if config.saelens:
        require_saelens()
    out = Path(config.out)
    make_folder(out)
    parts: dict[str, Callable[[], Times]] = {
        "toy": lambda: bench_toy(config.repeats),
        "toy-whole": bench_toy_whole,
        "step": lambda: bench_step(config.repeats, device, original, config.saelens),
        "growth": lambda: bench_growth(config.repeats, device),
        "data": lambda: bench_data(config.repeats, device),
    }
    asked = list(parts) if config.part == "all" else [config.part]
    # These are not in "all":
    parts["pair"] = lambda: bench_pair(config.pair_steps, device, "float32")
    parts["pair-bfloat16"] = lambda: bench_pair(config.pair_steps, device, "bfloat16")
    results: dict[str, Any] = {name: parts[name]() for name in asked}
    results["environment"] = environment(device)
    results["peak_memory"] = peak_memory(device)
    write_json(out / f"{config.part}.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        for name in itertools.takewhile(lambda name: name != "environment", results):
            print(f"\n{name}\n{show(results[name])}")
        print(f"\n{results['environment']['device']}; peak memory {results['peak_memory']}")


if __name__ == "__main__":
    main()
