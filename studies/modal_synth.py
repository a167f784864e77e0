"""Runs SynthSAEBench at its published size on Modal: this project's SAEs and SAELens's.

    modal run -m studies.modal_synth                      # 16k, three seeds
    modal run -m studies.modal_synth --size mini          # a smoke run, some minutes

A container on an H100 draws the samples to a Volume (studies/synth_data.py). Then containers train
and score at the same time: one for each seed of ours (studies/synth.py), and one for SAELens's
(studies/synth_peers.py). What a container wrote is kept: the same command later continues from the
last checkpoint. Do not run two of these commands at once: they would write the same files.

**This has not been run.** By calculation (`estimate` below has the assumptions), `16k` takes about
9 hours of an H100 in total, 3.5 hours from start to end, and 32 GB on the Volume. It costs 9 times
Modal's price for an hour of an H100; the Volume costs until `modal volume delete matryoshka-synth`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal

from matryoshka.errors import UserError
from matryoshka.modal_calls import commit, hands_back_refusals, reason_of, reload
from matryoshka.modal_plan import STEP_FLOOR

# The versions that studies/synth_peers.py was run with.
REQUIREMENTS = (
    *("sae-lens==6.54.12", "torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1"),
    *("safetensors==0.8.0", "tqdm==4.70.1"),
)
MODULES = ("matryoshka", "sae", "studies", "train")
ROOT = "/volume"  # where the Volume is in a container

image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install(*REQUIREMENTS)
    .env({"TQDM_MININTERVAL": "5"})
    .add_local_python_source(*MODULES, ignore=["**/__pycache__"])
)
app = modal.App("matryoshka-synth")
volume = modal.Volume.from_name("matryoshka-synth", create_if_missing=True)
on_a_gpu: dict[str, Any] = {
    "image": image,
    "volumes": {ROOT: volume},
    "gpu": "H100",
    "cpu": 4.0,
    "memory": 48 * 1024,
    "timeout": 24 * 3600,
    "retries": modal.Retries(max_retries=3, initial_delay=15.0, max_delay=60.0),
    "single_use_containers": True,
}


def folder(size: str) -> Path:
    """The folder on the Volume for everything of that size."""
    return Path(ROOT) / size


@app.function(**on_a_gpu)
@hands_back_refusals
def sample(size: Any) -> dict[str, Any]:
    """Draws the samples if they are missing; returns what `synth_data.run` does."""
    from studies import synth_data

    reload(volume)
    try:
        return synth_data.run(synth_data.Config(size=size, out=str(folder(size) / "data")))
    finally:
        commit(volume)


@app.function(**on_a_gpu)
@hands_back_refusals
def train_ours(size: Any, seed: int) -> dict[str, Any]:
    """Trains and scores this project's SAEs of one seed; returns what `synth.run` does."""
    from studies import synth

    reload(volume)
    at = folder(size)
    config = synth.Config(
        size=size,
        data=str(at / "data"),
        seeds=(seed,),
        runs=str(at / "ours"),
        out=str(at / f"ours_seed{seed}.json"),
    )
    try:
        return synth.run(config, on_checkpoint=lambda: commit(volume))
    finally:
        commit(volume)


@app.function(**on_a_gpu)
@hands_back_refusals
def train_peers(size: Any, seeds: int) -> dict[str, Any]:
    """Trains and scores SAELens's SAEs; returns what `synth_peers.run` does."""
    from studies import synth_peers

    reload(volume)
    at = folder(size)
    config = synth_peers.Config(
        size=size,
        data=str(at / "data"),
        seeds=tuple(range(seeds)),
        runs=str(at / "saelens"),
        out=str(at / "saelens.json"),
    )
    try:
        return synth_peers.run(config, on_done=lambda: commit(volume))
    finally:
        commit(volume)


# ------------------------------------------------------------------------ here, on your machine


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the sources and the runs of several results. Raises `UserError` if one is a failure."""
    for part in parts:
        if reason := reason_of(part):
            raise UserError(f"{reason}. What is finished is kept; the same command continues")
    return {name: [item for part in parts for item in part[name]] for name in ("sources", "runs")}


def study(size: str, seeds: int, out: Path, call: Callable[..., Any]) -> list[Path]:
    """Draws samples, then trains everything at once; writes the two files that the table reads.

    call: starts a function with arguments, and returns a function that waits for its result.
    """
    if reason := reason_of(call(sample, size)()):
        raise UserError(reason)
    ours = [call(train_ours, size, seed) for seed in range(seeds)]
    peers = call(train_peers, size, seeds)
    written = []
    for name, waits in ((size, ours), (f"{size}_saelens", [peers])):
        path = out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(merged([wait() for wait in waits]), indent=1) + "\n", encoding="utf-8"
        )
        written.append(path)
    return written


def begin(function: Any, *args: Any) -> Callable[[], Any]:
    """Starts `function` in a container of its own; returns a function that waits for its result."""
    handle = function.spawn(*args)
    return lambda: handle.get()


@app.local_entrypoint()
def main(size: str = "16k", seeds: int = 3, out: str = "results/synth") -> None:
    """`modal run`: waits for the whole study, and writes its results on this machine."""
    try:
        for path in study(size, seeds, Path(out), begin):
            print(f"written: {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------------- what it takes


def estimate(
    n_steps: int, n_latents: int, d_model: int, batch_size: int, n_samples: int, seeds: int
) -> dict[str, float]:
    """Hours of an H100 for each part, and bytes on the Volume, from assumed rates.

    Each of our six SAEs a seed is assumed to take, for a step, twice the time of its five dense
    products at 0.4 of the GPU's 67 TFLOP/s in float32, but at least modal_plan.STEP_FLOOR.
    SAELens's documentation says that training on 200M samples takes 15 to 20 minutes, sampling
    included; 17.5 minutes are assumed for sampling them and again for training on them. Of each of
    two kinds, SAELens trains three learning rates and then the other seeds. Copying and scoring
    are assumed to take 10 minutes in each container.
    """
    step = max(STEP_FLOOR, 2 * 5 * 2 * batch_size * d_model * n_latents / (0.4 * 67e12))
    per_sample = 17.5 / 60 / 200e6  # hours
    return {
        "sampling": n_samples * per_sample + 1 / 6,
        "ours": seeds * (6 * n_steps * step / 3600 + 1 / 6),
        "saelens": 2 * (3 + seeds - 1) * n_steps * batch_size * per_sample + 1 / 6,
        "bytes": n_samples * (2 * d_model + 12),
    }
