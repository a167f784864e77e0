"""How fast, against what: times are medians of repeats, and what matters are ratios in one run.

Machines are noisy: each row's variants take turns, so that a slow moment hits all of them. Writes
a JSON file with every median, its spread, and where it was measured.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import script
import train_toy
from sae import SAE, Trainer, TrainerConfig, seeded_generator
from script import setting


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the figures go."""

    part: str = setting("all", "what to measure", choices=["all", "toy", "toy-whole"])
    repeats: int = setting(7, "how often each variant is timed; the median counts")
    out: str = setting("results/bench", "folder for the JSON file")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


def alternate(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
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
    return {
        name: dict(
            zip(("q1", "median", "q3"), np.quantile(t, [0.25, 0.5, 0.75]).tolist(), strict=True)
        )
        for name, t in times.items()
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------- the toy

TOY_STEPS = 100  # timed at once
TOY_SAMPLES = 200_000  # at once: what training draws; a call for more is bound by its allocation


def bench_toy(repeats: int) -> dict[str, dict[str, float]]:
    """The tree, and a step of both SAEs alone and of both for several seeds at once, on the CPU.

    Step times are for one step of the whole stack; a stack is stepped on one thread, as
    `train_toy.py` does it.
    """
    tree = train_toy.load_tree("tree.json")
    generator = seeded_generator(0)
    cpu = torch.device("cpu")
    times = alternate(
        {"tree, 200,000 samples": lambda: tree.sample(TOY_SAMPLES, generator)}, repeats, cpu
    )
    with script.threads(1):
        variants = {
            "step, vanilla": toy_steps([1]),
            "step, matryoshka": toy_steps([10]),
            "step, the pair": toy_steps([10, 1]),
            "step, 10 pairs": toy_steps([10, 1] * 10),
            "step, 100 pairs": toy_steps([10, 1] * 100),
        }
        measured = alternate(variants, repeats, cpu)
    for name, quartiles in measured.items():
        times[name] = {q: ms / TOY_STEPS for q, ms in quartiles.items()}
    return times


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


def toy_whole(folder: Path) -> dict[str, dict[str, float]]:
    """`train_toy.py` from start to figures, once each: one seed, and ten."""
    times = {}
    for seeds in (1, 10):
        start = time.perf_counter()
        train_toy.run(train_toy.Config(seeds=seeds, out=str(folder / f"toy_{seeds}")))
        ms = 1e3 * (time.perf_counter() - start)
        times[f"train_toy.py, {seeds} seed{'s' * (seeds > 1)}"] = {"median": ms}
    return times


def show(times: dict[str, dict[str, float]]) -> str:
    """Milliseconds, with the spread and the ratio to the table's first row."""
    first = next(iter(times.values()))["median"]
    return script.table(
        ["", "ms", "quartiles", "ratio"],
        [
            [
                name,
                f"{t['median']:.3f}",
                f"{t['q1']:.3f} to {t['q3']:.3f}" if "q1" in t else "once",
                f"{t['median'] / first:.2f}",
            ]
            for name, t in times.items()
        ],
    )


def run(config: Config) -> dict[str, Any]:
    """Measures what `config.part` says, and writes it to a JSON file in `config.out`."""
    script.require_positive(config, "repeats")
    device = script.pick_device(config.device)
    out = Path(config.out)
    script.make_folder(out)
    results: dict[str, Any] = {"environment": script.environment(device)}
    if config.part in ("all", "toy"):
        results["toy"] = bench_toy(config.repeats)
    if config.part in ("all", "toy-whole"):
        results["toy_whole"] = toy_whole(Path("runs/bench"))
    script.write_json(out / f"{config.part}.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        results = run(script.parse(Config, __doc__, argv))
        for name, times in results.items():
            if name != "environment":
                print(f"\n{name}\n{show(times)}")


if __name__ == "__main__":
    main()
