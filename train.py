"""Trains SAEs from one cache of activations: any number of them, of any kind, in one pass.

    python train.py --cache cache/train --n-latents 4096 --target-l0 10 20 40 80 --n-steps 20_000
    python train.py --model gpt2 --layer 6 --begin always --dataset my_stories   # without a cache
    python evaluate.py --run runs/saes --cache cache/validation

All SAEs see the same batches, and each ends with the weights it would have if trained alone.
`--recipe paper` has the paper's settings for language models. With --model, nothing is cached: the
language model runs during training. Metrics go to metrics.jsonl during training. Checkpoints resume
exactly: a run that was killed and resumed ends with the same weights as one that was not. Ctrl-C
and SIGTERM write a checkpoint before they end the run. A folder holds one run, and one process at a
time may write to it.
"""

if __name__ == "__main__":  # no traceback after Ctrl-C while torch is imported; see `main_guard`
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.cache_config import load_source
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device
from matryoshka.environment import environment, multiplies_bfloat16
from matryoshka.errors import CannotWrite, UserError
from matryoshka.files import make_folder, one_writer, write_json
from matryoshka.live_activations import LiveActivations
from matryoshka.live_config import LiveConfig
from matryoshka.member_training import MemberTraining
from matryoshka.members import members_of, settings_of
from matryoshka.refit import refit_decoder
from matryoshka.run_folder import (
    claim,
    clear_leftovers,
    cut_metrics,
    lacking,
    last_records,
    sha256_of,
)
from matryoshka.saved_runs import CHECKPOINT, METRICS, RESULTS, checksums_used
from matryoshka.training import GO_ON, Activations, Training, checkpoint, train
from matryoshka.training_config import RECIPES, TrainingConfig, check_training
from matryoshka.training_report import closing, is_broken, problems, summary
from sae import SAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LiveConfig):
    """Every setting of train.py: those of TrainingConfig, and those of --model."""


def run(
    config: TrainingConfig, on_checkpoint: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Trains the SAEs; writes them, metrics.jsonl and results.json to `config.out`.

    `on_checkpoint` is called after each checkpoint; the first one is written before the first step.
    At these moments the only open file of the run is the empty .lock, so a folder that has to be
    committed, as a Modal Volume has, can be committed then.

    Returns what results.json holds; `problems` lists what is wrong with it. If the run was finished
    before, only those SAEs and refits are made that are missing. Raises `UserError` before training
    if the input is wrong or the cache is damaged, and during training if it diverges. Raises
    `KeyboardInterrupt` after Ctrl-C or SIGTERM; the next call continues from the step reached.
    """
    check_training(config)
    device = pick_device(config.device)
    cache = open_activations(config, device)
    if cache.steps_per_pass(config.batch_size) == 0:
        raise UserError(
            f"{cache.folder} holds {cache.n_tokens} activations: too few for --batch-size "
            f"{config.batch_size}"
        )
    with refusing_too_large(config):
        training = Training(config, cache, device)
    make_folder(training.out)
    with one_writer(training.out):
        results = claim(training.out, training.settings)
        has_checkpoint = (training.out / CHECKPOINT).exists()
        if has_checkpoint:
            training.load()
        if results:
            missing = lacking(training.out, results, config.refit)
            if not missing:
                return results  # it was finished before
            if not has_checkpoint:
                raise UserError(
                    f"{training.out} holds a finished run without its checkpoint, and not all of "
                    f"its SAEs ({', '.join(missing)}): choose another --out"
                )
        if not training.is_trained or config.refit:
            cache.verify(hold_on=None if training.is_trained else device)
        if config.validation_cache is not None and not training.is_trained:
            ActivationCache(config.validation_cache).verify()
        if not has_checkpoint:
            require_variance(cache)
            checkpoint(training, on_checkpoint)  # no other file of the run is written before it
        if config.matmul_dtype == "bfloat16" and not multiplies_bfloat16(device):
            slow = "this machine has no instructions for bfloat16: --matmul-dtype float32 is faster"
            print(f"warning: {slow}", file=sys.stderr)
        clear_leftovers(training.out, training.names)
        cut_metrics(training.out / METRICS, training.metrics_bytes)
        with refusing_too_large(config):
            train(training, on_checkpoint)
        return complete(training, results)


def open_activations(config: TrainingConfig, device: torch.device) -> Activations:
    """Opens what the SAEs are trained on: a cache, or a language model on `device`.

    Raises `UserError` where it cannot be read, or has too few activations.
    """
    if isinstance(config, LiveConfig):
        config.check_live()
    if not isinstance(config, LiveConfig) or config.model is None:
        return ActivationCache(config.cache, config.tokens or None)
    # Counting the text takes long: a folder that holds another run is refused before it.
    claim(config.folder, settings_of(config, members_of(config)))
    config.as_cache.check()
    live = LiveActivations(load_source(config.as_cache, device), config.as_cache, config.buffer)
    if live.n_tokens < config.tokens:
        raise UserError(f"{live.folder} holds {live.n_tokens} activations, not {config.tokens}")
    return live


@contextlib.contextmanager
def refusing_too_large(config: TrainingConfig) -> Iterator[None]:
    """A context in which running out of memory raises a `UserError` that names the settings."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0]
        words = ("allocate", "out of memory", "Storage size", "overflow")
        if not isinstance(error, MemoryError) and not any(word in reason for word in words):
            raise
        raise UserError(
            f"--n-latents {config.n_latents} with --batch-size {config.batch_size} takes more "
            f"memory than there is ({reason})"
        ) from None


def require_variance(cache: Activations) -> None:
    """Raises `UserError` where all activations are the same, so that there is nothing to learn."""
    first: Tensor | None = None
    for batch in cache.sequential(4096):
        first = batch.acts[:1] if first is None else first
        if (batch.acts != first).any():
            return
    raise UserError(f"{cache.folder}: its activations are all the same: nothing to explain")


def complete(training: Training, results: dict[str, Any]) -> dict[str, Any]:
    """Writes the SAEs and results.json of a trained run, and returns what results.json holds.

    `results` is what results.json held before, {} if there was none. With it, only the missing
    files are written. Raises `UserError`.
    """
    config, out = training.config, training.out
    wanted = lacking(out, results, config.refit) if results else None
    results = results or results_of(training)
    try:
        for result, member in zip(results["runs"], training.remaining, strict=True):
            (sae,) = member.trainer.saes
            sae.about = about(training, member, result)
            name = f"{result['sae']}.safetensors"
            if wanted is None or name in wanted:
                result["file_sha256"] = save(sae, out / name)
            if config.refit and (wanted is None or f"refit/{name}" in wanted):
                make_folder(out / "refit")
                acts = (batch.acts for batch in training.cache.sequential(4096, training.device))
                fitted = refit_decoder(sae, acts)
                result["refit_file_sha256"] = save(fitted, out / "refit" / name)
        results["config"]["refit"] |= config.refit
        write_json(out / RESULTS, results)
    except CannotWrite as error:
        raise UserError(f"{error}; {GO_ON}") from error
    except UserError:
        raise
    except ValueError as error:  # from refit_decoder
        raise UserError(
            f"no refit is possible ({error}): --resume --no-refit does without"
        ) from None
    return results


def save(sae: SAE, path: Path) -> str:
    """Writes an SAE's file; returns its SHA-256. Raises `CannotWrite`."""
    sae.save(path)
    return sha256_of(path)


# The entries of a cache's recipe that another tool needs to compute the same activations.
RECIPE_KEYS = ("site", "model_revision", "context", "begin", "keep_begin")


def about(training: Training, member: MemberTraining, result: dict[str, Any]) -> dict[str, Any]:
    """What an SAE's file says about how it was trained and on what. It contains no path."""
    config, recipe = member.config, training.cache.recipe
    names = ["n_prefixes", "prefixes", "target_l0", "lr", "n_steps", *of_activation(config)]
    names += ["auxiliary_weight", "dead_after"] * (config.auxiliary != "none")
    names += ["resample_every", "dead_after"] * (config.resample_every > 0)
    names += ["unhedged"] * (config.unhedged > 0)
    return {
        "name": result["sae"],
        "kind": member.member.kind,
        "l0": result["final_l0"],
        "dead_share": result["dead_share"],
        "seed": config.seed,
        **{name: getattr(config, name) for name in names},
        "widths": config.widths_of(config.n_latents),
        "width_weights": config.width_weights,
        "batch_size": config.batch_size,
        "n_tokens": training.cache.n_tokens,
        **{name: without_path(recipe.get(name)) for name in ("model", "dataset")},
        **{name: recipe.get(name) for name in ("weights_hash", "layer", "split")},
        **{name: recipe[name] for name in RECIPE_KEYS if name in recipe},
        "torch": torch.__version__,
    }


def of_activation(config: TrainingConfig) -> list[str]:
    """The settings that only some activation functions use."""
    if config.activation == "relu":
        return ["sparsity", "sparsity_weight"]
    return ["auxiliary", *["bandwidth", "sparsity_weight"] * (config.activation == "jumprelu")]


def without_path(name: str | None) -> str | None:
    """The last part of a path; a name on the hub, OWNER/NAME, is returned as it is."""
    if name is None or (name.count("/") == 1 and name[0] not in "./~"):
        return name
    return Path(name).name


def results_of(training: Training) -> dict[str, Any]:
    """What results.json holds when a run is finished."""
    config, cache = training.config, training.cache
    last = last_records(training.out / METRICS, training.names)
    return {
        "config": training.settings,
        "environment": environment(training.device),
        "cache": {
            "make": cache.recipe,
            "n_tokens": cache.n_tokens,
            "acts_sha256": checksums_used(cache),
        },
        "seconds": round(training.seconds, 2),
        "waited_for_data": round(training.waited, 2),
        "passes": round(config.n_steps * config.batch_size / cache.n_tokens, 3),
        "dropped": {member.name: member.dropped for member in training.members if member.dropped},
        "runs": [result_of(member, last[member.name]) for member in training.remaining],
    }


def result_of(member: MemberTraining, last: dict[str, Any]) -> dict[str, Any]:
    """One SAE's entry in results.json. `last` is its last record in metrics.jsonl."""
    config = member.config
    return {
        "sae": member.name,
        "kind": member.member.kind,
        "activation": config.activation,
        "n_latents": config.n_latents,
        "target_l0": config.target_l0,
        "seed": config.seed,
        "final_l0": float(member.final_l0_sum) / member.n_final,
        "training_loss": last["loss"],
        "training_fvu": last["fvu"],
        "dead_share": last["dead_share"],
        **{name: value for name, value in last.items() if name.startswith("validation_")},
    }


def report(results: dict[str, Any], out: str) -> None:
    """Prints a run's results as a table, and warnings about what is wrong with them.

    Raises `UserError` if an SAE is broken.
    """
    print(summary(results))
    print(f"\n{closing(results)}; SAEs and metrics are in {out}")
    print(f"Next: python evaluate.py --run {out}")
    for line in problems(results):
        print(f"warning: {line}", file=sys.stderr)
    if any(map(is_broken, results["runs"])):
        raise UserError(f"an SAE in {out} is of no use; see the warnings above")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__ or "", argv, RECIPES)
        report(run(config), config.out)


if __name__ == "__main__":
    main()
