"""Training from a cache: where it stands, its records, its checkpoints, and its loop."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_reader import ActivationCache
from matryoshka.checkpoint import no_checkpoint, read_checkpoint, write_checkpoint
from matryoshka.command_line import inherited, require_not_negative, require_positive, setting
from matryoshka.errors import CannotWrite, UserError
from matryoshka.kinds import KINDS, check_names, config_of
from matryoshka.metrics import fvu
from matryoshka.process import deferring_signals
from matryoshka.run_folder import read_metrics, require_same
from matryoshka.saved_runs import CHECKPOINT, METRICS
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import L0Control, TrainerConfig
from matryoshka.training_report import DEAD_AFTER, bar_text
from sae import SAE

N_RECORDS = 300  # lines of metrics.jsonl an SAE, at most
GO_ON = "the same command with --resume goes on from the last checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(TrainerConfig):
    """How SAEs are trained from a cache: the trainer's settings, and where activations are."""

    cache: str = setting("cache/train", "folder that cache_activations.py wrote")
    tokens: int = setting(0, "train on the cache's first so many activations; 0: on all")
    saes: tuple[str, ...] = setting(
        tuple(KINDS), "which SAEs, each by the name of its kind", alias="sae"
    )
    n_latents: int = setting(3072, "latents of an SAE")
    n_steps: int = inherited(TrainerConfig, "n_steps", default=30_000)
    target_l0: float = inherited(TrainerConfig, "target_l0", default=30.0)
    lr: float = inherited(TrainerConfig, "lr", default=1e-3)
    l0_control: L0Control = inherited(TrainerConfig, "l0_control", default="steady")
    sparsity_weight: float = inherited(TrainerConfig, "sparsity_weight", default=1.2)
    batch_size: int = setting(1024, "activations a step; 1024 x 30,000 is one pass over 30M")
    refit: bool = setting(
        False, "write the SAEs with their decoders refitted, too, to OUT/refit; see refit.py"
    )
    seed: int = setting(0, "seed of the initialisation, the prefixes and the order of batches")
    out: str = setting("runs/saes", "folder for the SAEs, metrics and checkpoint")
    resume: bool = setting(False, "go on from the checkpoint in --out, if there is one")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    checkpoint_seconds: float = setting(0.0, "and seconds between them, at least")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))


def check_training(config: TrainingConfig) -> None:
    """Raises `UserError` where a setting is impossible, whatever the cache."""
    require_positive(config, "n_latents", "batch_size", "checkpoint_every")
    require_not_negative(config, "seed", "tokens", "checkpoint_seconds")
    check_names(config.saes)
    if config.batch_size == 1:
        raise UserError("--batch-size is 1: one activation has no variance to explain")
    config.check(config.n_latents, config.batch_size)


def make_trainer(config: TrainingConfig, d_model: int, device: torch.device) -> Trainer:
    """The SAEs of `config`, from one initialisation, ready for their first step.

    Raises `UserError` where bfloat16 is not possible with d_model.
    """
    config.require_eights("the activations' number of dimensions", d_model)
    saes = [SAE(d_model, config.n_latents, config.seed).to(device) for _ in config.saes]
    configs = [config_of(name, config) for name in config.saes]
    return Trainer(saes, configs, [config.seed] * len(saes))


class Training:
    """Where the training of a folder's SAEs stands, and what of that is on disk."""

    SUMS = ("silent", "l0_sum", "final_l0_sum")  # tensors that a checkpoint keeps

    def __init__(self, config: TrainingConfig, cache: ActivationCache, device: torch.device):
        self.config, self.out, self.names = config, config.folder, config.saes
        self.cache, self.device = cache, device
        self.trainer = make_trainer(config, cache.d_model, device)
        # activations since each latent last fired: [n_saes, n_latents]
        self.silent = torch.zeros(len(self.names), config.n_latents, device=device)
        # sums of L0 since the last record, and over the last 5% of the steps: [n_saes]
        self.l0_sum = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.final_l0_sum = torch.zeros_like(self.l0_sum)
        self.seconds = self.waited = 0.0  # training, and waiting for data meanwhile
        self.metrics_bytes = 0  # length of metrics.jsonl at the checkpoint
        self.saved_at = time.perf_counter()  # when the last checkpoint was written
        self.last_good: list[str] = []  # the last records that were written

    @property
    def is_trained(self) -> bool:
        return self.trainer.n_steps_done == self.config.n_steps

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether steps and seconds since the last one ask for a checkpoint."""
        seconds = time.perf_counter() - self.saved_at
        is_in_turn = self.trainer.n_steps_done % self.config.checkpoint_every == 0
        return is_in_turn and seconds >= self.config.checkpoint_seconds

    @property
    def n_final(self) -> int:
        """Steps that the final L0 is averaged over: the last 5%."""
        return max(1, self.config.n_steps // 20)

    @property
    def record_every(self) -> int:
        """Steps between records."""
        return max(1, self.config.n_steps // N_RECORDS)

    def step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of all SAEs on x [batch, d_model]; returns the trainer's metrics.

        Raises `UserError` where x is not finite.
        """
        try:
            metrics = self.trainer.step(x)
        except ValueError as error:
            raise UserError(f"{self.cache.folder}: {error}") from None
        self.silent.add_(len(x)).mul_(metrics["mean_square"] == 0)
        self.l0_sum += metrics["l0"]
        if self.trainer.n_steps_done > self.config.n_steps - self.n_final:
            self.final_l0_sum += metrics["l0"]
        return metrics

    @torch.no_grad()
    def record(self, x: Tensor, metrics: dict[str, Tensor]) -> list[dict[str, Any]]:
        """A line of metrics.jsonl an SAE: loss and FVU on the batch x, mean L0 since the last."""
        n_averaged = (self.trainer.n_steps_done - 1) % self.record_every + 1
        l0 = (self.l0_sum / n_averaged).tolist()
        self.l0_sum.zero_()
        losses, dead = self.trainer.loss(x).tolist(), self.dead_shares()
        weights = metrics["sparsity_weight"].tolist()
        return [
            {
                "step": self.trainer.n_steps_done,
                "sae": name,
                "loss": losses[i],
                "fvu": float(fvu(x, sae(x))),
                "l0": l0[i],
                "dead_share": dead[i],
                "sparsity_weight": weights[i],
            }
            for i, (name, sae) in enumerate(zip(self.names, self.trainer.saes, strict=True))
        ]

    def dead_shares(self) -> list[float | None]:
        """An SAE's share of latents that fired on none of the last DEAD_AFTER activations.

        None while there were not so many: then it is not known.
        """
        if self.trainer.n_steps_done * self.config.batch_size < DEAD_AFTER:
            return [None] * len(self.names)
        shares: list[float | None] = (self.silent >= DEAD_AFTER).double().mean(dim=1).tolist()
        return shares

    def save(self) -> None:
        """The checkpoint, whole or not at all; with it, how long metrics.jsonl is by now.

        Raises `UserError` where it cannot be written.
        """
        metrics = self.out / METRICS
        tensors = {f"trainer.{name}": t for name, t in self.trainer.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in self.SUMS}
        about = {
            "config": self.config.as_json(),
            "cache_hash": self.cache.content_hash,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "seconds": self.seconds,
            "waited": self.waited,
        }
        try:
            write_checkpoint(self.out / CHECKPOINT, tensors, about)
            self.saved_at = time.perf_counter()
        except CannotWrite as error:
            raise UserError(f"{error}; {GO_ON}") from error

    def load(self) -> None:
        """Goes on from the checkpoint. Raises `UserError` where it is damaged or of another run."""
        path, prefix = self.out / CHECKPOINT, "trainer."
        about, tensors = read_checkpoint(path)
        require_same(self.config.as_json(), about["config"], path)
        if about["cache_hash"] != self.cache.content_hash:
            raise UserError(
                f"{path} is of a run on other activations than those of --cache "
                f"{self.config.cache}: ask for those, or choose another --out"
            )
        self.metrics_bytes = about["metrics_bytes"]
        self.seconds, self.waited = about["seconds"], about["waited"]
        records = read_metrics(self.out / METRICS, self.names, self.metrics_bytes)
        self.last_good = [json.dumps(record) for record in records[-len(self.names) :]]
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            self.trainer.load_state_dict(state)
            for name in self.SUMS:
                getattr(self, name).copy_(tensors[name])
            if not 0 <= self.trainer.n_steps_done <= self.config.n_steps:
                raise ValueError(f"it is of step {self.trainer.n_steps_done}")
        except (KeyError, ValueError, RuntimeError) as error:
            raise no_checkpoint(path, error) from None


def train(training: Training, on_checkpoint: Callable[[], object] | None = None) -> None:
    """Steps to the end, with a record now and then, and a checkpoint.

    Ctrl-C, SIGTERM and an error in reading the cache write a checkpoint first: `training` is
    between two steps then. After an error in a step it may be half done, so the last checkpoint
    stays. Raises `KeyboardInterrupt` after a signal, `UserError` where training diverges.
    """
    config, trainer = training.config, training.trainer
    save = functools.partial(checkpoint, training, on_checkpoint)
    batches = training.cache.batches(
        config.batch_size, config.seed, trainer.n_steps_done, training.device
    )
    with (
        deferring_signals() as stop,
        tqdm(
            total=config.n_steps,
            initial=trainer.n_steps_done,
            bar_format="{percentage:3.0f}% {elapsed}<{remaining}{postfix}",
        ) as bar,
    ):
        while not training.is_trained:
            started = time.perf_counter()
            try:
                x = next(batches)
            except Exception:
                save()
                raise
            got = time.perf_counter()
            metrics = training.step(x)
            training.waited += got - started
            training.seconds += time.perf_counter() - started
            bar.update()
            step = trainer.n_steps_done
            if step % training.record_every == 0 or training.is_trained:
                bar.set_postfix_str(bar_text(write_records(training, x, metrics)), refresh=False)
            if training.is_checkpoint_due or training.is_trained or stop:
                save()
            if stop:
                raise KeyboardInterrupt(f"step {step} is saved in {config.out}; {GO_ON}")


def checkpoint(training: Training, on_checkpoint: Callable[[], object] | None) -> None:
    """Writes one and says so to `on_checkpoint`. Raises `UserError` where it cannot be written."""
    training.save()
    if on_checkpoint is not None:
        on_checkpoint()


def write_records(
    training: Training, x: Tensor, metrics: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Adds the records of this step to metrics.jsonl, and returns them: one an SAE.

    x [batch, d_model] and `metrics` are the step's. Raises `UserError` where training diverged, or
    the file cannot be written.
    """
    path, records = training.out / METRICS, training.record(x, metrics)
    stop_if_diverged(records, training.last_good, x)
    training.last_good = [json.dumps(record) for record in records]
    try:
        with path.open("a") as file:
            file.writelines(line + "\n" for line in training.last_good)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); {GO_ON}") from None
    return records


def stop_if_diverged(
    records: Sequence[dict[str, Any]], last_good: Sequence[str], x: Tensor
) -> None:
    """Raises `UserError` with the last good records where an SAE's FVU is no longer a number.

    x: [batch, d_model], the activations that it was measured on; where they are at fault, it says
    so.
    """
    bad = [record for record in records if not math.isfinite(record["fvu"])]
    if not bad:
        return
    step, last = bad[0]["step"], f"last good: {'; '.join(last_good) or 'none'}"
    if not x.isfinite().all():
        raise UserError(f"step {step}: the cache holds activations that are not finite; {last}")
    if (x == x[0]).all():
        raise UserError(
            f"step {step}: the batch's activations are all the same, so that there is nothing to "
            f"explain; {last}. Try a larger --batch-size"
        )
    raise UserError(
        f"step {step}: the {bad[0]['sae']} SAE has an FVU of {bad[0]['fvu']}; {last}. "
        "Try a lower --lr"
    )
