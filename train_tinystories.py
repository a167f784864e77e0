"""The TinyStories comparison: a Matryoshka and a vanilla SAE at the same L0, from one cache.

    python cache_activations.py --tokens 30_000_000 --out cache/train
    python train_tinystories.py --cache cache/train --n-latents 3072 --target-l0 30 --lr 0.001

Both SAEs see the same batches. Metrics go to metrics.jsonl as training goes; checkpoints resume
exactly, so that a run that was killed and resumed ends with the weights of one that was not.
Ctrl-C and SIGTERM write one first. A folder holds one run, which is written by one process.
`evaluate.py --run FOLDER` scores the SAEs on tokens that they were not trained on.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback; `main_guard` ends this
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import gradients
import refit
import script
from cache_activations import ActivationCache
from sae import SAE, Trainer, TrainerConfig
from script import UserError, setting

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
N_RECORDS = 300  # lines of metrics.jsonl an SAE, at most
DEAD_AFTER = 2_000_000  # activations without firing after which training calls a latent dead
L0_MISSED = 0.1  # off its target by more than this share, an SAE's L0 is worth a line at the end
MANY_DEAD = 0.2  # and so is a share of dead latents above this
# What a run's folder may hold of another run, which the scripts would take for this one's.
FILES = (
    *(CHECKPOINT, RESULTS, METRICS, "evaluation.json"),
    *("matryoshka.safetensors", "vanilla.safetensors", "refit"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of the TinyStories comparison. The defaults are the write-up's."""

    cache: str = setting("cache/train", "folder that cache_activations.py wrote")
    tokens: int = setting(0, "train on the cache's first so many activations; 0: on all")
    sae: str = setting("both", "which SAEs", choices=["vanilla", "matryoshka", "both"])
    n_latents: int = setting(3072, "latents of an SAE")
    n_prefixes: int = setting(10, "prefixes a step of the Matryoshka SAE; vanilla has 1")
    target_l0: float = setting(30.0, "active latents a token that the sparsity weight aims at")
    lr: float = setting(1e-3, "learning rate, of Adam")
    n_steps: int = setting(30_000, "training steps")
    batch_size: int = setting(1024, "activations a step; 1024 x 30,000 is one pass over 30M")
    sparsity: str = setting("l1", "the sparsity loss", choices=["l1", "log"])
    sparsity_weight: float = setting(1.2, "where the adaptive sparsity weight starts")
    prefixes: str = setting(
        "sampled",
        "prefixes drawn each step, or the loss's exact mean over them",
        choices=["sampled", "expected"],
    )
    products: str = setting(
        "float32",
        "operands of training's matrix products; what is learnt is float32. bfloat16 takes more "
        "than 256 latents, and multiples of 8 for --batch-size and the activations' dimensions",
        choices=["float32", "bfloat16"],
    )
    dense: bool = setting(
        False,
        "dense arithmetic on a CPU, too, as on a GPU: slower, but shows what that would compute",
    )
    refit: bool = setting(
        False, "write the SAEs with their decoders refitted, too, to OUT/refit; see refit.py"
    )
    seed: int = setting(0, "seed of the initialisation, the prefixes and the order of batches")
    out: str = setting("runs/tinystories", "folder for the SAEs, metrics and checkpoint")
    resume: bool = setting(False, "go on from the checkpoint in --out, if there is one")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


GO_ON = "the same command with --resume goes on from the last checkpoint"

# What may differ between a run and the run that resumes it.
RESUMABLE = ("out", "resume", "device", "checkpoint_every", "cache", "refit")


def names_of(config: Config) -> tuple[str, ...]:
    """The SAEs that are trained, in the order of their stack."""
    return ("matryoshka", "vanilla") if config.sae == "both" else (config.sae,)


def check(config: Config) -> None:
    """Raises `UserError` where a setting is impossible, whatever the cache."""
    script.require_positive(
        config, "n_latents", "n_prefixes", "target_l0", "lr", "n_steps", "batch_size"
    )
    script.require_positive(config, "sparsity_weight", "checkpoint_every")
    script.require_not_negative(config, "seed", "tokens")
    if config.batch_size == 1:
        raise UserError("--batch-size is 1: one activation has no variance to explain")
    if config.products == "bfloat16" and config.batch_size % 8:
        raise UserError(
            f"--batch-size {config.batch_size}: --products bfloat16 takes multiples of 8"
        )
    if config.products == "bfloat16" and config.n_latents <= gradients.SMALL:
        raise UserError(
            f"--n-latents {config.n_latents}: --products bfloat16 takes more than {gradients.SMALL}"
        )
    if config.n_prefixes > config.n_latents:
        raise UserError(
            f"--n-prefixes {config.n_prefixes} is more than there are latents: "
            f"at most {config.n_latents}"
        )
    if config.target_l0 > config.n_latents:
        raise UserError(
            f"--target-l0 {config.target_l0} is more than there are latents: "
            f"at most {config.n_latents}"
        )


def make_trainer(config: Config, d_model: int, device: torch.device) -> Trainer:
    """A stack of the SAEs of `config`, from one initialisation, ready for its first step.

    Raises `UserError` where the products are not possible with d_model.
    """
    names = names_of(config)
    if config.products == "bfloat16" and d_model % 8:
        raise UserError(
            f"--products bfloat16: activations have {d_model} dimensions, not a multiple of 8"
        )
    return Trainer(
        SAE.stack([SAE(d_model, config.n_latents, config.seed) for _ in names]).to(device),
        TrainerConfig(
            n_steps=config.n_steps,
            target_l0=config.target_l0,
            lr=config.lr,
            prefixes=config.prefixes,  # type: ignore[arg-type]
            products=config.products,  # type: ignore[arg-type]
            dense=config.dense,
            sparsity=config.sparsity,  # type: ignore[arg-type]
            sparsity_weight=config.sparsity_weight,
            l0_control="steady",
        ),
        seeds=[config.seed] * len(names),
        n_prefixes=[config.n_prefixes if name == "matryoshka" else 1 for name in names],
    )


def cache_hash(cache: ActivationCache) -> str:
    """A hash of the activations trained on: the same wherever the cache's folder lies."""
    parts = [str(cache.n_tokens), *(shard.acts_sha256 for shard in cache.shards)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all values of `tensors`, which are on the CPU; safetensors has no checksum."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def naming_memory(config: Config) -> Iterator[None]:
    """Raises `UserError` where there is no memory for a run of this size."""
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


def require_same(config: Config, saved: Mapping[str, Any], path: Path) -> None:
    """Raises `UserError` naming the first setting in which the run of the file `path` differs."""
    saved = dataclasses.asdict(Config()) | dict(
        saved
    )  # one younger than the file had its default effect
    for name, asked in dataclasses.asdict(config).items():
        if name not in RESUMABLE and saved[name] != asked:
            raise UserError(
                f"{path} is of a run with --{name.replace('_', '-')} {saved[name]}, "
                f"not {asked}: ask for that, or choose another --out"
            )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's metadata and tensors. Raises `UserError` where it is damaged or none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["tensors_hash"] != tensors_hash(tensors):
            raise ValueError("its checksum is not the recorded one")
        return {
            "config": dict(json.loads(metadata["config"])),
            "cache_hash": metadata["cache_hash"],
            "metrics_bytes": int(metadata["metrics_bytes"]),
            "seconds": float(metadata["seconds"]),
            "waited": float(metadata["waited"]),
        }, tensors
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise no_checkpoint(path, error) from None


def no_checkpoint(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is no checkpoint of this run ({error}): to start over, delete {path.parent} or "
        "choose another --out"
    )


def read_metrics(path: Path, names: Sequence[str], n_bytes: int = -1) -> list[dict[str, Any]]:
    """The records in the first `n_bytes` of metrics.jsonl (-1: in all), `names` in turn.

    Raises `UserError` naming the file where it is shorter, or holds anything else.
    """
    if n_bytes == 0:
        return []
    try:
        with path.open("rb") as file:
            data = file.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError("it is shorter than it was at the checkpoint")
        records = [json.loads(line) for line in data.splitlines()]
        for i, record in enumerate(records):
            if record["sae"] != names[i % len(names)]:
                raise ValueError(f"line {i + 1} is of another SAE")
            float(record["fvu"])
        return records
    except FileNotFoundError:
        reason = "it is missing"
    except OSError as error:
        reason = str(error.strerror)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{path} is not the run's ({reason}): to start over, delete {path.parent} or choose "
        "another --out"
    )


class Run:
    """A training run and its folder: where it stands, and what of that is on disk."""

    SUMS = ("silent", "l0_sum", "final_l0_sum")

    def __init__(self, config: Config, cache: ActivationCache, device: torch.device):
        self.config, self.out, self.names = config, Path(config.out), names_of(config)
        self.cache_hash = cache_hash(cache)
        self.trainer = make_trainer(config, cache.d_model, device)
        # activations since each latent last fired: [n_saes, n_latents]
        self.silent = torch.zeros(len(self.names), config.n_latents, device=device)
        # sums of L0 since the last record, and over the last 5% of the steps: [n_saes]
        self.l0_sum = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.final_l0_sum = torch.zeros_like(self.l0_sum)
        self.seconds = self.waited = 0.0  # training, and waiting for data meanwhile
        self.metrics_bytes = 0  # length of metrics.jsonl at the checkpoint
        self.last_good: list[str] = []  # the last records that were written

    @property
    def is_trained(self) -> bool:
        return self.trainer.n_steps_done == self.config.n_steps

    def step(self, x: Tensor) -> dict[str, Tensor]:
        metrics = self.trainer.step(x)
        self.silent.add_(len(x)).mul_(metrics["mean_square"] == 0)
        self.l0_sum += metrics["l0"]
        if self.trainer.n_steps_done > self.config.n_steps - self.n_final:
            self.final_l0_sum += metrics["l0"]
        return metrics

    @property
    def n_final(self) -> int:
        """Steps that the final L0 is averaged over: the last 5%."""
        return max(1, self.config.n_steps // 20)

    @torch.no_grad()
    def record(self, x: Tensor, metrics: dict[str, Tensor], n_averaged: int) -> list[dict]:
        """A line of metrics.jsonl an SAE: FVU on the batch x, mean L0 over `n_averaged` steps."""
        sae = self.trainer.sae
        fvu = evaluate.fvu(x, sae(x)).tolist()
        l0 = (self.l0_sum / n_averaged).tolist()
        self.l0_sum.zero_()
        dead = self.dead_shares()
        weight = metrics["sparsity_weight"].tolist()
        return [
            {
                "step": self.trainer.n_steps_done,
                "sae": name,
                "fvu": fvu[i],
                "l0": l0[i],
                "dead_share": dead[i],
                "sparsity_weight": weight[i],
            }
            for i, name in enumerate(self.names)
        ]

    def dead_shares(self) -> list[float | None]:
        """An SAE's share of latents that fired on none of the last DEAD_AFTER activations.

        None while there were not so many: then it is not known.
        """
        if self.trainer.n_steps_done * self.config.batch_size < DEAD_AFTER:
            return [None] * len(self.names)
        return (self.silent >= DEAD_AFTER).double().mean(dim=1).tolist()

    def save(self) -> None:
        """The checkpoint, whole or not at all; with it, how long metrics.jsonl is by now."""
        path = self.out / METRICS
        tensors = {f"trainer.{name}": t for name, t in self.trainer.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in self.SUMS}
        tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
        metadata = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "cache_hash": self.cache_hash,
            "tensors_hash": tensors_hash(tensors),
            "metrics_bytes": str(path.stat().st_size if path.exists() else 0),
            "seconds": str(self.seconds),
            "waited": str(self.waited),
        }
        script.write_atomically(
            self.out / CHECKPOINT,
            lambda part: safetensors.torch.save_file(tensors, part, metadata),
        )

    def load(self) -> None:
        """Goes on from the checkpoint. Raises `UserError` where it is damaged or of another run."""
        path, prefix = self.out / CHECKPOINT, "trainer."
        metadata, tensors = read_checkpoint(path)
        require_same(self.config, metadata["config"], path)
        if metadata["cache_hash"] != self.cache_hash:
            raise UserError(
                f"{path} is of a run on other activations than those of --cache "
                f"{self.config.cache}: ask for those, or choose another --out"
            )
        self.metrics_bytes = metadata["metrics_bytes"]
        self.seconds, self.waited = metadata["seconds"], metadata["waited"]
        records = read_metrics(self.out / METRICS, self.names, self.metrics_bytes)
        self.last_good = [json.dumps(record) for record in records[-len(self.names) :]]
        try:
            self.trainer.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
            for name in self.SUMS:
                getattr(self, name).copy_(tensors[name])
            if not 0 <= self.trainer.n_steps_done <= self.config.n_steps:
                raise ValueError(f"it is of step {self.trainer.n_steps_done}")
        except (KeyError, ValueError, RuntimeError) as error:
            raise no_checkpoint(path, error) from None


def run(config: Config, on_checkpoint: Callable[[], object] | None = None) -> dict[str, Any]:
    """Trains the SAEs; writes them, metrics.jsonl and results.json to `config.out`.

    `on_checkpoint` is called after each checkpoint, of which the first is that of a run not yet
    begun. Then no file of the run is open but the empty .lock: where the folder needs a word to be
    safe, as a Modal Volume does, that is the time for it.

    Returns what results.json holds; `problems` says what is wrong with it. A finished run is only
    completed: SAEs that are missing, or not yet refitted, are made. Raises `UserError` where the
    input is wrong or the cache is damaged, before anything is trained, and where training diverges.
    Raises `KeyboardInterrupt` after Ctrl-C or SIGTERM; training then goes on from the step it was
    at.
    """
    check(config)
    device = script.pick_device(config.device)
    cache = ActivationCache(config.cache, config.tokens or None)
    if cache.steps_per_pass(config.batch_size) == 0:
        raise UserError(
            f"{config.cache} holds {cache.n_tokens} activations: too few for --batch-size "
            f"{config.batch_size}"
        )
    with naming_memory(config):
        state = Run(config, cache, device)
    script.make_folder(state.out)
    with script.one_writer(state.out):
        results = claim(config)
        has_checkpoint = (state.out / CHECKPOINT).exists()
        if has_checkpoint:
            state.load()
        if results and not lacking(config, results):
            return results  # it was finished before
        if results and not has_checkpoint:
            raise UserError(
                f"{state.out} holds a finished run without its checkpoint, and not all of its "
                f"SAEs ({', '.join(lacking(config, results))}): choose another --out"
            )
        if not state.is_trained or config.refit:
            cache.verify()
        if not has_checkpoint:
            require_variance(cache)
            checkpoint(state, on_checkpoint)  # whatever is here from now on has one beside it
        clear_leftovers(config)
        drop_later_records(state)
        with naming_memory(config):
            train(state, cache, device, on_checkpoint)
        return complete(state, cache, device, results)


def claim(config: Config) -> dict[str, Any]:
    """results.json of the run in --out where that is finished, else {}.

    Raises `UserError` where --out holds a run and nobody asked to resume it, or a finished run of
    other settings, or what is left of a run without a checkpoint.
    """
    out = Path(config.out)
    held = [name for name in FILES if (out / name).exists()]
    if not config.resume and (CHECKPOINT in held or RESULTS in held):
        raise UserError(
            f"{out} holds a run: add --resume to go on with it, or choose another --out"
        )
    if RESULTS in held:
        results = read_results(out / RESULTS)
        require_same(config, results["config"], out / RESULTS)
        return results
    if held and CHECKPOINT not in held:
        raise UserError(
            f"{out} holds {', '.join(held)}, of a run without a checkpoint: move that away, or "
            "choose another --out"
        )
    return {}


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run. Raises `UserError` naming it where it is damaged or another script's.

    What this script prints of it is there: {"config", "runs", "seconds", "waited_for_data"}.
    """
    try:
        results = json.loads(path.read_text())
        dict(results["config"]), summary(results), problems(results), closing(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is no results of this script ({type(error).__name__}: {error}): move it away "
            "and --resume, or choose another --out"
        ) from None
    return results


def lacking(config: Config, results: Mapping[str, Any]) -> list[str]:
    """Which of the SAEs' files are not in --out as `results` has them."""
    wanted = [("file_sha256", ""), ("refit_file_sha256", "refit/")][: 1 + config.refit]
    names = []
    for run in results["runs"]:
        for key, folder in wanted:
            name = f"{folder}{run['sae']}.safetensors"
            found = sha256_of(Path(config.out) / name)
            if not found or found != run.get(key, found):  # older results have no checksums
                names.append(name)
    return names


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal; "" where there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_variance(cache: ActivationCache) -> None:
    """Raises `UserError` where the activations are all the same: there is nothing to learn."""
    first = cache.acts(0, 1)
    for start in range(0, cache.n_tokens, 65_536):
        if (cache.acts(start, start + 65_536) != first).any():
            return
    raise UserError(f"{cache.folder}: its activations are all the same: nothing to explain")


def complete(
    state: Run, cache: ActivationCache, device: torch.device, results: dict[str, Any]
) -> dict[str, Any]:
    """Writes the SAEs of a trained run, and results.json; of `results`, only what is lacking."""
    config, out = state.config, state.out
    new = lacking(config, results) if results else None
    results = results or results_of(state, cache, device)
    try:
        for result, sae in zip(results["runs"], state.trainer.sae.unstack(), strict=True):
            name = f"{result['sae']}.safetensors"
            if new is None or name in new:
                script.write_atomically(out / name, sae.to("cpu").save)
                result["file_sha256"] = sha256_of(out / name)
            if config.refit and (new is None or f"refit/{name}" in new):
                script.make_folder(out / "refit")
                acts = (batch.acts for batch in cache.sequential(4096, device))
                fitted = refit.refit_decoder(sae.to(device), acts).to("cpu")
                script.write_atomically(out / "refit" / name, fitted.save)
                result["refit_file_sha256"] = sha256_of(out / "refit" / name)
        results["config"]["refit"] |= config.refit
        script.write_json(out / RESULTS, results)
    except script.CannotWrite as error:
        raise UserError(f"{error}; {GO_ON}") from error
    except ValueError as error:  # of the refit
        raise UserError(
            f"no refit is possible ({error}): --resume --no-refit does without"
        ) from None
    return results


def clear_leftovers(config: Config) -> None:
    """Removes what a killed run left half written, which can be as large as a checkpoint."""
    out = Path(config.out)
    for name in (CHECKPOINT, RESULTS, *(f"{name}.safetensors" for name in names_of(config))):
        for part in (*out.glob(f".{name}.*"), *out.glob(f"refit/.{name}.*")):
            if part.is_file():
                part.unlink()


def results_of(state: Run, cache: ActivationCache, device: torch.device) -> dict[str, Any]:
    """What results.json holds of a finished run."""
    config = state.config
    last = read_metrics(state.out / METRICS, state.names)[-len(state.names) :]
    return {
        "config": dataclasses.asdict(config),
        "environment": script.environment(device),
        "cache": {
            "make": cache.make,
            "n_tokens": cache.n_tokens,
            "acts_sha256": [shard.acts_sha256 for shard in shards_used(cache)],
        },
        "seconds": round(state.seconds, 2),
        "waited_for_data": round(state.waited, 2),
        "passes": round(config.n_steps * config.batch_size / cache.n_tokens, 3),
        "runs": [
            {
                "sae": name,
                "seed": config.seed,
                "final_l0": float(state.final_l0_sum[i]) / state.n_final,
                "training_fvu": last[i]["fvu"],
                "dead_share": last[i]["dead_share"],
            }
            for i, name in enumerate(state.names)
        ],
    }


def shards_used(cache: ActivationCache) -> list[Any]:
    """The shards that hold the cache's first `n_tokens` activations."""
    left, used = cache.n_tokens, []
    for shard in cache.shards:
        if left > 0:
            used.append(shard)
        left -= shard.n_tokens
    return used


def train(
    state: Run,
    cache: ActivationCache,
    device: torch.device,
    on_checkpoint: Callable[[], object] | None = None,
) -> None:
    """Steps to the end, with a record now and then, and a checkpoint.

    Ctrl-C, SIGTERM and an error in reading the cache write a checkpoint first: `state` is between
    two steps then. After an error in a step it may be half done, so the last checkpoint stays.
    """
    config, trainer = state.config, state.trainer
    save = functools.partial(checkpoint, state, on_checkpoint)
    batches = cache.batches(config.batch_size, config.seed, trainer.n_steps_done, device)
    with (
        script.deferring_signals() as stop,
        tqdm(
            total=config.n_steps,
            initial=trainer.n_steps_done,
            bar_format="{percentage:3.0f}% {elapsed}<{remaining}{postfix}",
        ) as bar,
    ):
        while not state.is_trained:
            started = time.perf_counter()
            try:
                x = next(batches)
            except Exception:
                save()
                raise
            got = time.perf_counter()
            metrics = state.step(x)
            state.waited += got - started
            state.seconds += time.perf_counter() - started
            bar.update()
            step = trainer.n_steps_done
            if step % every(config) == 0 or state.is_trained:
                bar.set_postfix_str(shown(write_records(state, x, metrics)), refresh=False)
            if step % config.checkpoint_every == 0 or state.is_trained or stop:
                save()
            if stop:
                raise KeyboardInterrupt(f"step {step} is saved in {config.out}; {GO_ON}")


def checkpoint(state: Run, on_checkpoint: Callable[[], object] | None) -> None:
    """Writes one and says so to `on_checkpoint`. Raises `UserError` where it cannot be written."""
    try:
        state.save()
    except script.CannotWrite as error:
        raise UserError(f"{error}; {GO_ON}") from error
    if on_checkpoint is not None:
        on_checkpoint()


def every(config: Config) -> int:
    """Steps between records."""
    return max(1, config.n_steps // N_RECORDS)


def drop_later_records(state: Run) -> None:
    """Makes metrics.jsonl as long as it was at the checkpoint."""
    path = state.out / METRICS
    try:
        with path.open("a") as file:
            file.truncate(state.metrics_bytes)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None


def write_records(state: Run, x: Tensor, metrics: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Adds the records of this step to metrics.jsonl, and returns them: one an SAE.

    x [batch, d_model] and `metrics` are the step's. Raises `UserError` where training diverged, or
    the file cannot be written.
    """
    path = state.out / METRICS
    n_averaged = (state.trainer.n_steps_done - 1) % every(state.config) + 1
    records = state.record(x, metrics, n_averaged)
    stop_if_diverged(records, state.last_good, x)
    state.last_good = [json.dumps(record) for record in records]
    try:
        with path.open("a") as file:
            file.writelines(line + "\n" for line in state.last_good)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); {GO_ON}") from None
    return records


def stop_if_diverged(records: Sequence[dict], last_good: Sequence[str], x: Tensor) -> None:
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


def shown(records: Sequence[dict]) -> str:
    """FVU and L0 of each SAE, for a bar of 80 columns; metrics.jsonl has the rest."""
    return ", ".join(f"{r['sae']} FVU {short(r['fvu'], 3)} L0 {short(r['l0'], 1)}" for r in records)


def short(value: float, digits: int) -> str:
    """With so many digits behind the point, but in few characters where it is large."""
    return (
        f"{value:.{digits}f}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"
    )


def share(value: float | None) -> str:
    """As a percentage; "-" where it is not known."""
    return "-" if value is None else f"{value:.1%}"


def problems(results: Mapping[str, Any]) -> list[str]:
    """What is wrong with a finished run, a line each, and what to try; see `is_broken`, too."""
    target, lines = results["config"]["target_l0"], []
    for r in results["runs"]:
        if is_broken(r):
            lines.append(
                f"the {r['sae']} SAE reconstructs worse than the activations' mean does (FVU "
                f"{r['training_fvu']:.3g}): try a lower --lr, or more --n-steps"
            )
        if abs(r["final_l0"] / target - 1) > L0_MISSED:
            way = "higher" if r["final_l0"] > target else "lower"
            lines.append(
                f"the {r['sae']} SAE missed its target: L0 {r['final_l0']:.3g} for {target:g}: try "
                f"more --n-steps, or a {way} --sparsity-weight"
            )
        if (r["dead_share"] or 0) > MANY_DEAD:
            lines.append(
                f"{r['dead_share']:.1%} of the {r['sae']} SAE's latents are dead: try fewer "
                "--n-latents, or a lower --lr or --sparsity-weight"
            )
    return lines


def is_broken(result: Mapping[str, Any]) -> bool:
    """Whether the SAE is useless: its FVU is over 1, that of the mean."""
    return not result["training_fvu"] <= 1


def summary(results: Mapping[str, Any]) -> str:
    """What training ended with; held-out figures are `evaluate.py`'s."""
    return script.table(
        ["at the end of training", "batch FVU", "L0, last 5% of steps", "dead"],
        [
            [
                r["sae"],
                f"{r['training_fvu']:.4f}",
                f"{r['final_l0']:.2f}",
                share(r["dead_share"]),
            ]
            for r in results["runs"]
        ],
    )


def closing(results: Mapping[str, Any]) -> str:
    """How long it took, and what dead means where that is known, or why it is not."""
    waited = results["waited_for_data"] / max(results["seconds"], 1e-9)
    known = all(r["dead_share"] is not None for r in results["runs"])
    return (
        f"Dead: fired on none of the last {DEAD_AFTER:,} activations"
        f"{'' if known else '; -: the run was shorter'}.\n"
        f"{results['seconds']:.0f} s, {waited:.1%} of them waiting for data"
    )


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        config = script.parse(Config, __doc__, argv)
        results = run(config)
        print(summary(results))
        print(f"\n{closing(results)}; SAEs and metrics are in {config.out}")
        print(f"Next: python evaluate.py --run {config.out}")
        wrong = problems(results)
        for line in wrong:
            print(f"warning: {line}", file=sys.stderr)
        if any(map(is_broken, results["runs"])):
            raise UserError(f"what {config.out} holds is of no use; see the warnings above")


if __name__ == "__main__":
    main()
