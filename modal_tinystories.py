"""A comparison of SAEs on Modal: cache once to a Volume, train each on a GPU, evaluate, download.

    modal run modal_tinystories.py --plan                                     # what it would take
    modal run modal_tinystories.py --tokens 5000000 --n-steps 3000            # smoke run
    modal run modal_tinystories.py --n-latents 3072 --target-l0 30 --lr 0.001 # the write-up's

What runs where:

    here        `main` waits for `compare`, then downloads the run's folder and prints the table
    a CPU       `compare` checks the flags, fetches model and rows, starts the GPUs, draws figures
    GPUs        `cache_part`: cache_activations.py on a range of rows, --cache-workers at once
    GPUs        `train_one`: train.py, then evaluate.py, a container for each SAE and seed

Each of these can be killed and called again: it continues where it stopped. If another call works
on the same thing already, it waits for that call (matryoshka/leases.py). Your machine needs only
`modal`; torch is imported in containers, which have the versions in REQUIREMENTS. The flags of
`Launch` are read here; all others are passed on to train_tinystories.py and cache_activations.py
(matryoshka/comparison.py).

Without Modal, the same work is done here, one job after another, with a folder as the Volume:

    python modal_tinystories.py --volume runs/volume --tokens 100000 --n-steps 200
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

import modal

from matryoshka import leases
from matryoshka.errors import UserError
from matryoshka.leases import Joined
from matryoshka.modal_calls import commit, each, hands_back_refusals, here, reason_of, reload
from matryoshka.modal_launch import (
    Launch,
    download,
    launch_of,
    launch_parser,
    one_line_errors,
    words_after,
)
from matryoshka.modal_plan import plan_text

# The versions that the tests ran with. torch's wheel contains CUDA; docs/modal.md says which driver
# it needs.
REQUIREMENTS = (
    *("torch==2.13.0", "numpy==2.4.6", "einops==0.8.2", "scipy==1.17.1", "safetensors==0.8.0"),
    *("datasets==5.2.0", "huggingface_hub==2.4.0", "transformers==5.24.0"),
    *("matplotlib==3.11.2", "tqdm==4.70.1"),
)
MODULES = ("cache_activations", "evaluate", "matryoshka", "sae", "train", "train_tinystories")
ROOT = "/volume"  # where the Volume is in a container

image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install(*REQUIREMENTS)
    # Each update of a progress bar is a line of the log, so there are few. What is downloaded from
    # the hub is kept on the Volume.
    .env({"TQDM_MININTERVAL": "5", "HF_HOME": f"{ROOT}/hub"})
    .add_local_python_source(*MODULES, ignore=["**/__pycache__"])
)
# These are imported in containers, and on this machine if torch is installed.
with image.imports():  # type: ignore[no-untyped-call]
    import evaluate
    import train
    import train_tinystories
    from matryoshka import comparison as parts
    from matryoshka.command_line import main_guard, pick_device
    from matryoshka.files import make_folder, one_writer, write_json
    from matryoshka.volume_caches import (
        CacheJob,
        copied_near,
        finish_caches,
        located,
        make_cache_jobs,
    )


# ----------------------------------------------------------------------- what Modal needs to know


def typed() -> Launch:
    """The settings on the command line, if `modal run modal_tinystories.py` imports this file.

    `modal run` starts the App before it calls the entrypoint. Because the settings are read at
    import, a wrong one is refused before anything starts, --help and --plan need no account, and
    --gpu, --volume and --secret are known where the functions are declared. In a container this
    returns the defaults: Modal took the function's GPU and Volume from its declaration here.
    """
    words = words_after(__name__) if modal.is_local() else None
    if words is None:
        return Launch()
    with one_line_errors():
        launch = launch_of(words)
        launch.check_for_modal()
        check_flags(launch, "modal run modal_tinystories.py")
    return launch


def check_flags(launch: Launch, prog: str) -> None:
    """Checks the flags that are not `Launch`'s; for --help and --plan, prints the text and exits.

    Without torch on this machine, `compare` checks the flags in its container instead. Raises
    `UserError`.
    """
    wants_help = bool({"-h", "--help"} & set(launch.words))
    if wants_help:
        print(launch_parser().format_help())
    if "make_cache_jobs" not in globals():  # the imports above have failed
        if wants_help or launch.plan:
            print("For the other flags and the plan, install torch here: pip install -e .")
            sys.exit(0)
        return
    comparison = parts.parse(launch.words, train_tinystories.Config, prog)
    if launch.plan:
        print(plan_text(comparison, launch.gpu, launch.cache_workers))
        sys.exit(0)


LAUNCH = typed()
app = modal.App("matryoshka-tinystories")
volume = modal.Volume.from_name(LAUNCH.volume, create_if_missing=True)
of_every_function: dict[str, Any] = {
    "image": image,
    "volumes": {ROOT: volume},
    # Restarts after preemptions do not count. Modal allows at most a minute between two tries.
    "retries": modal.Retries(max_retries=5, initial_delay=15.0, max_delay=60.0),
    # Without --secret, an empty one: a container does not know the flags, and the number of secrets
    # that it declares must be the same as here.
    "secrets": [
        modal.Secret.from_name(LAUNCH.secret) if LAUNCH.secret else modal.Secret.from_dict({})
    ],
    "single_use_containers": True,  # a container that has done its work is not kept and billed
}
on_a_gpu: dict[str, Any] = {"gpu": LAUNCH.gpu, "cpu": 4.0, "memory": 16 * 1024}


def book() -> Any:
    """The Modal Dict that records which call works on which thing; see matryoshka/leases.py."""
    return modal.Dict.from_name("matryoshka-tinystories-calls", create_if_missing=True)


def at_work(thing: str) -> Joined | None:
    """Reserves `thing` for this call, or returns the other call that is working on it."""
    if modal.is_local():  # the lock of the folder excludes others
        return None
    own = str(modal.current_function_call_id())
    holder = leases.holder(book(), thing, own, leases.is_running)
    return Joined(holder) if holder != own else None


# ----------------------------------------------------------------------- in containers of their own


@app.function(**of_every_function, **on_a_gpu, timeout=4 * 3600)
@hands_back_refusals
def cache_part(job: "CacheJob", thing: str) -> int | Joined:
    """Caches a range of rows and returns how many shards it made. Finished shards are kept."""
    if other := at_work(thing):
        return other
    reload(volume)
    print(job, flush=True)
    try:
        return job.do(pick_device("auto"))
    finally:
        commit(volume)


@app.function(**of_every_function, **on_a_gpu, timeout=6 * 3600)
@hands_back_refusals
def train_one(job: "parts.TrainJob", thing: str) -> dict[str, Any] | Joined:
    """Trains SAEs, from the last checkpoint if there is one, and evaluates them.

    Returns {"out", "saes", "seed", "training", "evaluation"}; the last two are what `train.run` and
    `evaluate.run` return.
    """
    if other := at_work(thing):
        return other
    reload(volume)
    print(job, flush=True)
    config = dataclasses.replace(job.config, cache=str(copied_near(Path(job.config.cache))))
    trained = train.run(config, on_checkpoint=lambda: commit(volume))
    evaluated = evaluate.run(evaluate.Config(run=config.out, **job.evaluation))
    commit(volume)
    about = {"out": config.out, "saes": list(config.saes), "seed": config.seed}
    return {**about, "training": trained, "evaluation": evaluated}


@app.function(**of_every_function, cpu=2.0, memory=8 * 1024, timeout=24 * 3600, nonpreemptible=True)
@hands_back_refusals
def compare(launch: Launch, root: str) -> dict[str, Any] | Joined:
    """Makes both caches and trains and evaluates all SAEs.

    Returns what runs/NAME/results.json holds, with its "table", the "folder" NAME, and the "words"
    of the command line added. It has a container of its own so that, under --detach, it continues
    when the machine that started it is disconnected.
    """
    began = time.monotonic()
    comparison = parts.parse(launch.words, train_tinystories.Config)
    run = Path(root) / "runs" / comparison.name
    if other := at_work(f"{launch.volume}:{run}"):
        return other
    reload(volume)
    parts.require_same_shape(run, comparison.shape)
    cache, validation = both_caches(comparison, launch, Path(root))
    evaluation = parts.how_to_evaluate(comparison, validation, Path(root))
    parts.claim(run, comparison.shape)
    commit(volume)
    jobs = parts.train_jobs(comparison, run, cache, evaluation)
    done = each(train_one, jobs, book, launch.volume)
    reload(volume)
    parts.draw(run, comparison, done)
    results = {
        "config": comparison.shape,
        "caches": [str(cache), str(validation)],
        "seconds": round(time.monotonic() - began, 1),
        "runs": done,
    }
    write_json(run / "results.json", results)
    commit(volume)
    shown = {"table": parts.report(comparison, results), "folder": comparison.name}
    return results | shown | {"words": launch.words}


def both_caches(comparison: Any, launch: Launch, root: Path) -> tuple[Path, Path]:
    """The folders of the train and the validation cache; makes each that is missing."""
    wanted = ((comparison.cache, launch.cache_workers), (comparison.validation, 1))
    found = [located(config, root) for config, _ in wanted]
    is_there = [is_finished for _, is_finished in found]
    print(plan_text(comparison, launch.gpu, launch.cache_workers, is_there), flush=True)
    jobs: list[CacheJob] = []
    for (config, n_parts), is_finished in zip(wanted, is_there, strict=True):
        if not is_finished:
            jobs += make_cache_jobs(config, root, n_parts)
    commit(volume)
    each(cache_part, jobs, book, launch.volume)
    reload(volume)
    finish_caches(jobs)
    commit(volume)
    return found[0][0], found[1][0]


# ---------------------------------------------------------------------------- here, on your machine


@app.local_entrypoint()
def main(*arglist: str) -> None:
    """`modal run`: waits for the comparison, downloads its folder, prints its table."""
    with one_line_errors():
        launch = launch_of(arglist)
        print(
            "Ctrl-C, or a lost connection, ends the comparison: what is finished is kept. With "
            "modal run --detach it continues alone; the same command later waits for it and "
            "downloads its results."
        )
        try:
            work = leases.Work(book(), compare, None, launch, ROOT)
            outcome = work.result(lambda joined: is_of(joined, launch))
        except modal.exception.ConnectionError:
            raise  # Modal's message says how to reach a detached App again
        except Exception as error:
            outcome = error
        results = checked(outcome, launch)
        out = Path(launch.out) / results["folder"]
        download(volume, PurePosixPath("runs") / results["folder"], out)
        print(
            f"{results['table']}\n{results['seconds']:.0f} s; the run's folder is here: {out}\n"
            f"Caches stay on the Volume, and cost, until: modal volume delete {launch.volume}"
        )


def is_of(outcome: Any, launch: Launch) -> bool:
    """Whether `outcome` holds the results of a comparison with exactly this launch's flags."""
    return isinstance(outcome, dict) and tuple(outcome["words"]) == launch.words


def checked(outcome: Any, launch: Launch) -> dict[str, Any]:
    """The results of `compare`. If it failed, raises a `UserError` with the reason and advice."""
    reason = reason_of(outcome)
    if reason is None:
        return dict(outcome)
    advice = ""
    if f"{ROOT}/" in reason:
        advice = f" ({ROOT} is the Volume; to delete: modal volume rm -r {launch.volume} PATH)"
    if "Hugging Face hub" in reason or "HF_HUB_OFFLINE" in reason:
        advice += (
            " (what is private or gated needs --secret; a folder's files, put on the Volume by "
            f"`modal volume put {launch.volume} FOLDER data`, are {ROOT}/data)"
        )
    raise UserError(reason + advice)


def run(launch: Launch) -> dict[str, Any]:
    """The whole comparison without Modal: every function runs here, on the folder `launch.volume`.

    Returns its results. Raises `UserError` if the input is wrong or a part failed. If nothing was
    made in a new folder, it is removed again.
    """
    folder = Path(launch.volume)
    parts.parse(launch.words, train_tinystories.Config)  # refused before the folder is made
    is_new = not folder.exists()
    make_folder(folder, "--volume")
    try:
        with one_writer(folder, "--volume"):
            results = checked(here(compare, launch, launch.volume), launch)
    finally:
        if is_new and [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)
    source, out = folder / "runs" / results["folder"], Path(launch.out) / results["folder"]
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    return results


if __name__ == "__main__":
    with main_guard():
        launch = launch_of(sys.argv[1:], volume="runs/volume")
        check_flags(launch, "modal_tinystories.py")
        print(run(launch)["table"])
