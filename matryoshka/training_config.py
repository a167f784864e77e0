"""The settings of training from a cache, and the recipes that change their defaults."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from matryoshka.command_line import (
    inherited,
    require_not_negative,
    require_positive,
    require_recipe,
    setting,
)
from matryoshka.errors import UserError
from matryoshka.kinds import KINDS, check_names
from matryoshka.trainer_config import L0Control, TrainerConfig

ActivationName = Literal["relu", "topk", "batchtopk", "jumprelu"]

# The defaults that each recipe changes; flags on the command line override them. "paper" has those
# for language models in Bussmann et al. 2025, section 4, where the nested groups are 1/32, 1/16,
# 1/8, 1/4 and the rest. "unhedged" is the same, trained in the two parts of unhedged.py.
RECIPES: dict[str, dict[str, Any]] = {
    "write-up": {},
    "paper": {
        "activation": "batchtopk",
        "widths": (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0),
        "auxiliary": "all",
        "lr": 3e-4,
        "batch_size": 2048,
    },
}
RECIPES["unhedged"] = RECIPES["paper"] | {"unhedged": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(TrainerConfig):
    """How SAEs are trained from a cache: the trainer's settings, the cache, and the SAEs."""

    recipe: Literal["write-up", "paper", "unhedged"] = setting(
        "write-up",
        "which defaults: the write-up's (shown here); the paper's for language models, which are "
        "batchtopk, five fixed widths, the auxiliary loss, learning rate 3e-4 and batches of 2048; "
        "or unhedged, the paper's with --unhedged 0.5",
    )
    cache: str = setting("cache/train", "folder that cache_activations.py wrote")
    tokens: int = setting(
        0, "train on only this many activations, the cache's first ones; 0: on all"
    )
    validation_cache: str | None = setting(
        None, "another cache; FVU and L0 on a sample of it are added to metrics.jsonl"
    )
    saes: tuple[str, ...] = setting(
        tuple(KINDS), "which SAEs, each by the name of its kind", alias="sae"
    )
    n_latents: int = setting(3072, "latents of each SAE")
    activation: ActivationName = setting(
        "relu",
        "which latents fire; relu: all above 0, with a sparsity loss; topk: the --target-l0 "
        "largest of a sample; batchtopk: --target-l0 on average over a batch; jumprelu: all above "
        "learned thresholds, with a sparsity loss",
    )
    n_steps: int = inherited(TrainerConfig, "n_steps", default=30_000)
    # --target-l0 sets target_l0s; members.py then sets the target_l0 of each SAE.
    target_l0: float = inherited(TrainerConfig, "target_l0", default=30.0, is_flag=False)
    target_l0s: tuple[float, ...] = setting(
        (),
        "active latents in a sample (default: 30); it is k for topk and batchtopk; for relu and "
        "jumprelu the sparsity weight is adapted to reach it; for several values, an SAE of every "
        "kind is trained for each",
        flag="target_l0",
    )
    members: str | None = setting(
        None,
        "instead of --saes and --target-l0: a TOML or JSON file with a table [[sae]] for each SAE, "
        "which may have its kind, its name and any setting of an SAE",
    )
    lr: float = inherited(TrainerConfig, "lr", default=1e-3)
    l0_control: L0Control = inherited(TrainerConfig, "l0_control", default="steady")
    sparsity_weight: float = inherited(TrainerConfig, "sparsity_weight", default=1.2)
    batch_size: int = setting(
        1024, "activations in a step; 30,000 steps of 1024 are one pass over 30M"
    )
    refit: bool = setting(
        False, "also write the SAEs with refitted decoders, to OUT/refit; see refit.py"
    )
    seed: int = setting(0, "seed of the initialisation, the prefixes and the order of batches")
    out: str = setting("runs/saes", "folder for the SAEs, metrics and checkpoint")
    resume: bool = setting(False, "continue from the checkpoint in --out, if there is one")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    checkpoint_seconds: float = setting(0.0, "and at least this many seconds between them")
    device: str = setting("auto", "torch device; auto: the GPU if there is one")

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.out)

    @property
    def targets(self) -> tuple[float, ...]:
        """The target L0s; at least one."""
        return self.target_l0s or (self.target_l0,)

    def as_json(self) -> dict[str, Any]:
        """The settings as a JSON object; target_l0 is the first of the targets."""
        targets = {"target_l0": self.targets[0], "target_l0s": self.targets}
        return dict(json.loads(json.dumps(dataclasses.asdict(self) | targets)))


def check_training(config: TrainingConfig) -> None:
    """Raises `UserError` if a setting is impossible for any cache and SAEs."""
    require_positive(config, "n_latents", "batch_size", "checkpoint_every")
    require_not_negative(config, "seed", "tokens", "checkpoint_seconds")
    require_recipe(config, RECIPES)
    check_names(config.saes)
    if config.batch_size == 1:
        raise UserError("--batch-size is 1: one activation has no variance to explain")
