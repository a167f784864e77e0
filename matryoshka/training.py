"""The training of a folder's SAEs, from a cache or beside a language model: its state, its loop,
its records in metrics.jsonl, and its checkpoints."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_reader import ActivationCache
from matryoshka.checkpoint import no_checkpoint, read_checkpoint, write_checkpoint
from matryoshka.errors import CannotWrite, UserError
from matryoshka.live_activations import LiveActivations
from matryoshka.member_training import MemberTraining
from matryoshka.members import members_of, settings_of
from matryoshka.process import deferring_signals
from matryoshka.run_folder import last_records, require_same
from matryoshka.saved_runs import CHECKPOINT, METRICS, require_same_model
from matryoshka.training_config import TrainingConfig
from matryoshka.training_report import bar_text

N_RECORDS = 300  # about how many lines of metrics.jsonl each SAE gets
N_VALIDATION = 4096  # how many activations of --validation-cache each record is measured on
GO_ON = "the same command with --resume goes on from the last checkpoint"
Activations = ActivationCache | LiveActivations


class Training:
    """The state of the training of a folder's SAEs, in memory and in the checkpoint."""

    def __init__(self, config: TrainingConfig, cache: Activations, device: torch.device):
        """Raises `UserError` where an SAE is impossible, or where --validation-cache does not
        match the cache."""
        self.config, self.out = config, config.folder
        self.cache, self.device = cache, device
        members = members_of(config)
        self.settings = settings_of(config, members)  # as JSON has them
        self.members = [MemberTraining(member, cache.d_model, device) for member in members]
        self.names = [member.name for member in self.members]
        self.validation = validation_sample(config, cache, device)
        self.n_steps_done = 0
        self.seconds = self.waited = 0.0  # spent training, and the part of it spent reading data
        self.metrics_bytes = 0  # length of metrics.jsonl at the checkpoint that was loaded
        self.saved_at = time.perf_counter()  # when the last checkpoint was written

    @property
    def is_trained(self) -> bool:
        return self.n_steps_done == self.config.n_steps

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether --checkpoint-every and --checkpoint-seconds ask for a checkpoint now."""
        seconds = time.perf_counter() - self.saved_at
        is_multiple = self.n_steps_done % self.config.checkpoint_every == 0
        return is_multiple and seconds >= self.config.checkpoint_seconds

    @property
    def remaining(self) -> list[MemberTraining]:
        """The SAEs that have not diverged."""
        return [member for member in self.members if not member.dropped]

    @property
    def record_every(self) -> int:
        """Steps between records."""
        return max(1, self.config.n_steps // N_RECORDS)

    def step(self, x: Tensor) -> None:
        """One step of all SAEs on x [batch, d_model]. Raises `UserError` where x is not finite."""
        try:
            for member in self.remaining:
                member.step(x)
        except ValueError as error:
            raise UserError(f"{self.cache.folder}: {error}") from None
        self.n_steps_done += 1

    def record(self, x: Tensor) -> list[dict[str, Any]]:
        """Each SAE's record of this step, whose batch was x [batch, d_model].

        An SAE that has diverged is dropped, and gets no record. Raises `UserError` where no SAE is
        left.
        """
        if not x.isfinite().all():
            raise UserError(
                f"step {self.n_steps_done}: the cache holds activations that are not finite"
            )
        records = []
        for member in self.remaining:
            record = member.record(x, self.record_every, self.validation)
            member.dropped = member.diverged(record, x)
            if not member.dropped:
                member.last_good = record
                records.append(record)
        if not records:
            raise UserError("; ".join(dict.fromkeys(member.dropped for member in self.members)))
        return records

    def save(self) -> None:
        """Writes the checkpoint, which also has the present length of metrics.jsonl.

        Raises `UserError` where it cannot be written; then the last checkpoint is still there.
        """
        metrics, tensors = self.out / METRICS, dict[str, Tensor]()
        for member in self.remaining:
            tensors |= member.state_dict()
        about = {
            "config": self.settings,
            "cache_hash": self.cache.content_hash,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "n_steps_done": self.n_steps_done,
            "dropped": {m.name: m.dropped for m in self.members if m.dropped},
            "seconds": self.seconds,
            "waited": self.waited,
        }
        try:
            write_checkpoint(self.out / CHECKPOINT, tensors, about)
            self.saved_at = time.perf_counter()
        except CannotWrite as error:
            raise UserError(f"{error}; {GO_ON}") from error

    def load(self) -> None:
        """Continues from the checkpoint. Raises `UserError` where it is damaged or of another
        run."""
        path = self.out / CHECKPOINT
        about, tensors = read_checkpoint(path)
        require_same(self.settings, about["config"], path)
        if about["cache_hash"] != self.cache.content_hash:
            asked = "--cache " if isinstance(self.cache, ActivationCache) else ""
            raise UserError(
                f"{path} is of a run on other activations than those of {asked}"
                f"{self.cache.folder}: ask for those, or choose another --out"
            )
        self.metrics_bytes, self.n_steps_done = about["metrics_bytes"], about["n_steps_done"]
        self.seconds, self.waited = about["seconds"], about["waited"]
        last = last_records(self.out / METRICS, self.names, self.metrics_bytes)
        try:
            for member in self.members:
                member.dropped = about["dropped"].get(member.name, "")
                member.last_good = last.get(member.name, {})
            for member in self.remaining:
                member.load_state_dict(tensors)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise no_checkpoint(path, error) from None


def validation_sample(
    config: TrainingConfig, cache: Activations, device: torch.device
) -> Tensor | None:
    """The first activations of --validation-cache, [n, d_model], or None without that setting.

    Raises `UserError` where they are of another model, layer, site or d_model than the cache's,
    not finite, or all the same.
    """
    if config.validation_cache is None:
        return None
    other = ActivationCache(config.validation_cache)
    require_same_model(other, cache.recipe)
    other.require(d_model=cache.d_model)
    sample = other.acts(0, N_VALIDATION).to(device).float()
    if not sample.isfinite().all():
        raise UserError(f"{other.folder} holds activations that are not finite")
    if len(sample) < 2 or (sample == sample[0]).all():
        raise UserError(
            f"--validation-cache {config.validation_cache}: its activations are all the same, so "
            "there is nothing to explain"
        )
    return sample


def train(training: Training, on_checkpoint: Callable[[], object] | None = None) -> None:
    """Takes the remaining steps, and writes records and checkpoints.

    After Ctrl-C, SIGTERM or an error in reading the cache, it writes a checkpoint, since `training`
    is then between two steps. After an error in a step it does not, since the step may be half
    done. Raises `KeyboardInterrupt` after a signal, `UserError` where all SAEs have diverged.
    """
    config = training.config
    save = functools.partial(checkpoint, training, on_checkpoint)
    batches = training.cache.batches(
        config.batch_size, config.seed, training.n_steps_done, training.device
    )
    with (
        contextlib.closing(batches),
        deferring_signals() as stop,
        tqdm(
            total=config.n_steps,
            initial=training.n_steps_done,
            bar_format="{percentage:3.0f}% {elapsed}<{remaining}{postfix}",
        ) as bar,
    ):
        while not training.is_trained:
            started = time.perf_counter()
            try:
                x = next(batches)  # [batch, d_model]
            except Exception:
                save()
                raise
            got = time.perf_counter()
            training.step(x)
            training.waited += got - started
            training.seconds += time.perf_counter() - started
            bar.update()
            step = training.n_steps_done
            if step % training.record_every == 0 or training.is_trained:
                bar.set_postfix_str(bar_text(write_records(training, x)), refresh=False)
            if training.is_checkpoint_due or training.is_trained or stop:
                save()
            if stop:
                raise KeyboardInterrupt(f"step {step} is saved in {config.out}; {GO_ON}")


def checkpoint(training: Training, on_checkpoint: Callable[[], object] | None) -> None:
    """Writes a checkpoint, then calls `on_checkpoint`. Raises `UserError` where it cannot be
    written."""
    training.save()
    if on_checkpoint is not None:
        on_checkpoint()


def write_records(training: Training, x: Tensor) -> list[dict[str, Any]]:
    """Adds each SAE's record of this step to metrics.jsonl, and returns the records.

    x [batch, d_model] is the step's batch. An SAE that has diverged is reported and dropped. Raises
    `UserError` where no SAE is left, or the file cannot be written.
    """
    path, remaining = training.out / METRICS, training.remaining
    records = training.record(x)
    for member in remaining:
        if member.dropped:
            tqdm.write(f"dropped: {member.dropped}", file=sys.stderr)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); {GO_ON}") from None
    return records
