"""The TinyStories comparison: a Matryoshka and a vanilla SAE at the same L0, from one cache.

    python cache_activations.py --tokens 30_000_000 --out cache/train
    python train_tinystories.py --cache cache/train --n-latents 3072 --target-l0 30 --lr 0.001

This is train.py with the settings of the write-up ("How Matryoshka Sparse AutoEncoders recover
feature hierarchies"). `evaluate.py --run FOLDER` scores the SAEs on tokens that they were not
trained on.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported: no traceback; `main_guard` ends this
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
from collections.abc import Sequence

from matryoshka.command_line import inherited, main_guard, parse
from matryoshka.training_config import RECIPES, TrainingConfig
from train import report, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Every setting of the TinyStories comparison. The defaults are the write-up's."""

    n_latents: int = inherited(TrainingConfig, "n_latents", default=3072)
    n_prefixes: int = inherited(TrainingConfig, "n_prefixes", default=10)
    target_l0: float = inherited(TrainingConfig, "target_l0", default=30.0)
    lr: float = inherited(TrainingConfig, "lr", default=1e-3)
    n_steps: int = inherited(TrainingConfig, "n_steps", default=30_000)
    batch_size: int = inherited(TrainingConfig, "batch_size", default=1024)
    out: str = inherited(TrainingConfig, "out", default="runs/tinystories")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        config = parse(Config, __doc__ or "", argv, RECIPES)
        report(run(config), config.out)


if __name__ == "__main__":
    main()
