"""Runs SAEBench's meta_structure: how much of an SAE's decoder does a smaller SAE explain?

    pip install -e '.[peers]' tabulate collectibles && pip install --no-deps sae-bench==0.6.0
    python -m studies.meta_structure --saes runs/standin/sampled_seed0/*.safetensors \\
        --out results/standin/meta_structure.json

A meta-SAE is trained on the rows d_j of W_dec, scaled to norm 1. It is a BatchTopK SAE with a
quarter of the SAE's latents, 4 of which fire on a row on average. With m the mean of the rows, its
score is the variance explained,

    1 - sum_j ||d_j - meta(d_j)||^2 / sum_j ||d_j - m||^2

which is high if many latents are combinations of a few directions that they share (Bussmann et al.
2025, appendix D.1). SAEBench's own code trains and scores. It is installed without its
dependencies, because it requires NumPy below 2 and datasets below 4, while this evaluation also
works with later ones. Its autocast to bfloat16 is off by default, because it is slower on a CPU.
"""

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka import convert
from matryoshka.command_line import main_guard, parse, require_not_negative, setting, table
from matryoshka.environment import environment
from matryoshka.errors import UserError
from sae import SAE
from studies.score_files import load_saes, score_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAEs, and how meta-SAEs are trained. Except autocast, defaults are SAEBench's."""

    saes: tuple[str, ...] = setting(help="SAEs: files of this project, or folders of other tools")
    train_steps: int = setting(1500, "training steps of a meta-SAE, each on 1,024 random rows")
    seed: int = setting(42, "seed of the meta-SAE's initialization and of the random rows")
    autocast: bool = setting(False, "multiply matrices in bfloat16, as SAEBench does by default")
    out: str = setting("runs/meta_structure.json", "file to write")


def run(config: Config) -> dict[str, Any]:
    """Writes `config.out` anew; returns what it holds. Raises `UserError`."""
    require_not_negative(config, "train_steps", "seed")
    require_sae_bench()
    saes = load_saes(config.saes)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("saes", "out")}
    versions = {name: importlib.metadata.version(name) for name in ("sae-lens", "sae-bench")}
    made = {"config": settings, "environment": environment(torch.device("cpu")) | versions}

    def score_one(sae: SAE) -> dict[str, float]:
        return score(sae, config)

    return score_files(saes, score_one, {"source": "sae_bench", **made}, Path(config.out))


def require_sae_bench() -> None:
    """Raises `UserError` where SAEBench's evaluation cannot be imported."""
    try:
        import sae_bench.evals.meta_structure.main  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"this needs SAEBench: {error}; `python -m studies.meta_structure --help` says how it "
            "is installed"
        ) from None


def score(sae: SAE, config: Config) -> dict[str, float]:
    """Trains a meta-SAE on the SAE's decoder rows; returns its {"variance_explained", "mse"}."""
    from sae_bench.evals.meta_structure import eval_config, main

    settings = eval_config.MetaStructureEvalConfig(
        random_seed=config.seed, train_steps=config.train_steps, autocast=config.autocast
    )
    theirs = in_saelens(sae)
    torch.manual_seed(config.seed)  # SAEBench draws from the global generator
    output = main.run_eval_single_sae("here", "sae", theirs, settings, "cpu")
    metrics = output.eval_result_metrics.meta_structure
    return {
        "variance_explained": metrics.decoder_fraction_variance_explained,
        "mse": metrics.final_reconstruction_mse,
    }


def in_saelens(sae: SAE) -> Any:
    """The same SAE as an object of SAELens, with decoder rows of norm 1, as SAEBench requires."""
    import sae_lens

    with tempfile.TemporaryDirectory() as folder:
        convert.export(sae, "saelens", Path(folder) / "sae", convert.noise(sae))
        theirs = sae_lens.SAE.load_from_disk(Path(folder) / "sae")
    theirs.fold_W_dec_norm()
    return theirs


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        results = run(parse(Config, __doc__, argv))
        rows = [
            [f"{run['run']}/{run['sae']}", f"{run['variance_explained']:.1%}"]
            for run in results["runs"]
        ]
        print(table(["SAE", "variance of its decoder explained"], rows))


if __name__ == "__main__":
    main()
