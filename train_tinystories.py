"""The TinyStories comparison: a Matryoshka and a vanilla SAE at the same L0, from one cache.

    python cache_activations.py --tokens 30_000_000 --out cache/train
    python train_tinystories.py --cache cache/train --n-latents 3072 --target-l0 30 --lr 0.001

Both SAEs see the same batches. Metrics go to metrics.jsonl as training goes; checkpoints resume
exactly, so that a run that was killed and resumed ends with the weights of one that was not.
`evaluate.py --run FOLDER` scores the SAEs on tokens that they were not trained on.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    """A stack of the SAEs of `config`, from one initialisation, ready for its first step."""
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
        dead = (self.silent >= DEAD_AFTER).double().mean(dim=1).tolist()
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

    def save(self) -> None:
        """The checkpoint, whole or not at all; with it, how long metrics.jsonl is by now."""
        tensors = {f"trainer.{name}": t for name, t in self.trainer.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in self.SUMS}
        tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
        metadata = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "cache_hash": self.cache_hash,
            "tensors_hash": tensors_hash(tensors),
            "metrics_bytes": str((self.out / METRICS).stat().st_size),
            "seconds": str(self.seconds),
            "waited": str(self.waited),
        }
        script.write_atomically(
            self.out / CHECKPOINT,
            lambda part: safetensors.torch.save_file(tensors, part, metadata),
        )

    def load(self) -> None:
        """Goes on from the checkpoint. Raises `UserError` where it is damaged or of another run."""
        path = self.out / CHECKPOINT
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["tensors_hash"] != tensors_hash(tensors):
                raise ValueError("its checksum is not the recorded one")
            # A setting that is younger than the checkpoint had its default's effect.
            saved = dataclasses.asdict(Config()) | json.loads(metadata["config"])
            of_cache = metadata["cache_hash"]
            self.metrics_bytes = int(metadata["metrics_bytes"])
            self.seconds, self.waited = float(metadata["seconds"]), float(metadata["waited"])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no checkpoint ({error}): delete it to start over") from None
        for name, asked in dataclasses.asdict(self.config).items():
            if name not in RESUMABLE and saved.get(name) != asked:
                raise UserError(
                    f"{path} is of a run with --{name.replace('_', '-')} {saved.get(name)}, "
                    f"not {asked}: ask for that, or choose another --out"
                )
        if of_cache != self.cache_hash:
            raise UserError(
                f"{path} is of a run on other activations than those of --cache "
                f"{self.config.cache}: ask for those, or choose another --out"
            )
        metrics = self.out / METRICS
        if not metrics.exists() or metrics.stat().st_size < self.metrics_bytes:
            raise UserError(
                f"{metrics} is missing, or shorter than it was at the checkpoint: delete {path} to "
                "start over"
            )
        prefix = "trainer."
        self.trainer.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        for name in self.SUMS:
            getattr(self, name).copy_(tensors[name])


def run(config: Config, on_checkpoint: Callable[[], object] | None = None) -> dict[str, Any]:
    """Trains the SAEs; writes them, metrics.jsonl and results.json to `config.out`.

    `on_checkpoint` is called after each checkpoint, when no file of the run is open: where the
    folder needs a word to be safe, as a Modal Volume does, that is the time for it.
    Returns what results.json holds. Raises `UserError` where the input is wrong or the cache is
    damaged, before anything is trained, and where training diverges.
    """
    check(config)
    device = script.pick_device(config.device)
    out = Path(config.out)
    cache = ActivationCache(config.cache, config.tokens or None)
    if not config.resume and ((out / CHECKPOINT).exists() or (out / RESULTS).exists()):
        raise UserError(
            f"{out} holds a run: add --resume to go on with it, or choose another --out"
        )
    if cache.steps_per_pass(config.batch_size) == 0:
        raise UserError(
            f"{config.cache} holds {cache.n_tokens} activations: too few for --batch-size "
            f"{config.batch_size}"
        )
    script.make_folder(out)
    state = Run(config, cache, device)
    if (out / CHECKPOINT).exists():
        state.load()
    if state.trainer.n_steps_done == config.n_steps and (out / RESULTS).exists():
        return json.loads((out / RESULTS).read_text())  # it was finished before
    cache.verify()

    try:
        clear_leftovers(config)
        train(state, cache, device, on_checkpoint)
        for name, sae in zip(state.names, state.trainer.sae.unstack(), strict=True):
            script.write_atomically(out / f"{name}.safetensors", sae.to("cpu").save)
            if config.refit:
                script.make_folder(out / "refit")
                acts = (batch.acts for batch in cache.sequential(4096, device))
                fitted = refit.refit_decoder(sae.to(device), acts).to("cpu")
                script.write_atomically(out / "refit" / f"{name}.safetensors", fitted.save)
        results = results_of(state, cache, device)
        script.write_json(out / RESULTS, results)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"--out {out} cannot be written ({error}); the same command with --resume goes on from "
            "the last checkpoint"
        ) from error
    return results


def clear_leftovers(config: Config) -> None:
    """Removes what a killed run left half written, which can be as large as a checkpoint."""
    for name in (CHECKPOINT, RESULTS, *(f"{name}.safetensors" for name in names_of(config))):
        for part in Path(config.out).glob(f".{name}.*"):
            part.unlink()


def results_of(state: Run, cache: ActivationCache, device: torch.device) -> dict[str, Any]:
    """What results.json holds of a finished run."""
    config = state.config
    last = [json.loads(line) for line in (state.out / METRICS).read_text().splitlines()]
    return {
        "config": dataclasses.asdict(config),
        "environment": script.environment(device),
        "cache": {"make": cache.make, "n_tokens": cache.n_tokens},
        "seconds": round(state.seconds, 2),
        "waited_for_data": round(state.waited, 2),
        "passes": round(config.n_steps * config.batch_size / cache.n_tokens, 3),
        "runs": [
            {
                "sae": name,
                "seed": config.seed,
                "final_l0": float(state.final_l0_sum[i]) / state.n_final,
                "training_fvu": [m["fvu"] for m in last if m["sae"] == name][-1],
                "dead_share": [m["dead_share"] for m in last if m["sae"] == name][-1],
            }
            for i, name in enumerate(state.names)
        ],
    }


def train(
    state: Run,
    cache: ActivationCache,
    device: torch.device,
    on_checkpoint: Callable[[], object] | None = None,
) -> None:
    """Steps to the end, with a record now and then, and a checkpoint."""
    config, trainer = state.config, state.trainer
    batches = cache.batches(config.batch_size, config.seed, trainer.n_steps_done, device)
    every = max(1, config.n_steps // N_RECORDS)
    path = state.out / METRICS
    with path.open("a") as file:
        file.truncate(state.metrics_bytes)  # drops what came after the checkpoint
    last_good = path.read_text().splitlines()[-len(state.names) :]
    with tqdm(total=config.n_steps, initial=trainer.n_steps_done, unit=" steps") as bar:
        while (step := trainer.n_steps_done + 1) <= config.n_steps:
            started = time.perf_counter()
            x = next(batches)
            got = time.perf_counter()
            metrics = state.step(x)
            state.waited += got - started
            state.seconds += time.perf_counter() - started
            bar.update()
            if step % every == 0 or step == config.n_steps:
                records = state.record(x, metrics, (step - 1) % every + 1)
                stop_if_diverged(records, last_good)
                last_good = [json.dumps(record) for record in records]
                with path.open("a") as file:
                    file.writelines(line + "\n" for line in last_good)
                bar.set_postfix_str(shown(records), refresh=False)
            if step % config.checkpoint_every == 0 or step == config.n_steps:
                state.save()
                if on_checkpoint is not None:
                    on_checkpoint()


def stop_if_diverged(records: Sequence[dict], last_good: Sequence[str]) -> None:
    """Raises `UserError` with the last good records where an SAE's FVU is no longer a number."""
    for record in records:
        if not np.isfinite(record["fvu"]):
            raise UserError(
                f"step {record['step']}: the {record['sae']} SAE has an FVU of {record['fvu']}; "
                f"last good: {'; '.join(last_good) or 'none'}. Try a lower --lr"
            )


def shown(records: Sequence[dict]) -> str:
    return "; ".join(
        f"{r['sae']} FVU {r['fvu']:.3f} L0 {r['l0']:.1f} dead {r['dead_share']:.1%} "
        f"weight {r['sparsity_weight']:.2g}"
        for r in records
    )


def summary(results: dict[str, Any]) -> str:
    """What training ended with; held-out figures are `evaluate.py`'s."""
    return script.table(
        ["at the end of training", "batch FVU", "L0, last 5% of steps", "dead"],
        [
            [
                r["sae"],
                f"{r['training_fvu']:.4f}",
                f"{r['final_l0']:.2f}",
                f"{r['dead_share']:.1%}",
            ]
            for r in results["runs"]
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    with script.main_guard():
        config = script.parse(Config, __doc__, argv)
        results = run(config)
        print(summary(results))
        share = results["waited_for_data"] / max(results["seconds"], 1e-9)
        print(
            f"\n{results['seconds']:.0f} s, {share:.1%} of them waiting for data; SAEs and metrics "
            f"are in {config.out}. Next: python evaluate.py --run {config.out}"
        )


if __name__ == "__main__":
    main()
