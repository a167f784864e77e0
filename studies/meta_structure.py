"""How much of an SAE's decoder a smaller SAE explains: SAEBench's meta_structure, by its own code.

    pip install -e '.[peers]' tabulate collectibles && pip install --no-deps sae-bench==0.6.0
    python -m studies.meta_structure --saes runs/standin/sampled_seed0/*.safetensors \\
        --out results/standin/meta_structure.json

A meta-SAE, a BatchTopK SAE with a quarter of the latents of which 4 fire on a row, is trained on
the rows d_j of W_dec, all of norm 1. With m the mean of the rows, what is reported is

    1 - sum_j ||d_j - meta(d_j)||^2 / sum_j ||d_j - m||^2

Latents that are combinations of a few directions that others share make it high (Bussmann et al.
2025, appendix D.1). Training and score are SAEBench's. It is installed without its dependencies,
for it asks for NumPy below 2 and datasets below 4; what this evaluation imports works with later
ones. Its autocast to bfloat16 is off by default here, for a CPU takes longer with it.
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
from matryoshka.files import make_folder, write_json
from matryoshka.saved_runs import load_sae
from sae import SAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAEs, and how their meta-SAEs are trained; defaults are SAEBench's but for autocast."""

    saes: tuple[str, ...] = setting(help="SAEs: files of this project, or folders of other tools")
    train_steps: int = setting(1500, "steps of a meta-SAE, of 1,024 rows drawn at random")
    seed: int = setting(42, "of the meta-SAE's start and of the rows drawn")
    autocast: bool = setting(False, "products in bfloat16, as SAEBench has them")
    out: str = setting("runs/meta_structure.json", "file to write")


def run(config: Config) -> dict[str, Any]:
    """Writes `config.out`, which is not read; returns what it holds. Raises `UserError`."""
    require_not_negative(config, "train_steps", "seed")
    require_sae_bench()
    saes = {path: load_sae(Path(path), torch.device("cpu"))[0] for path in config.saes}
    make_folder(Path(config.out).parent)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("saes", "out")}
    versions = {name: importlib.metadata.version(name) for name in ("sae-lens", "sae-bench")}
    made = {"config": settings, "environment": environment(torch.device("cpu")) | versions}
    results: dict[str, Any] = {"sources": [{"source": "sae_bench", **made}], "runs": []}
    for path, sae in saes.items():
        name = Path(path).resolve()
        about = {"source": "sae_bench", "run": name.parent.name, "sae": name.stem}
        results["runs"].append(about | score(sae, config))
        write_json(Path(config.out), results)
    return results


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
    """{"variance_explained", "mse"} of a meta-SAE's reconstruction of the SAE's decoder rows."""
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
    """SAELens's SAE of it, with decoder rows of norm 1 as SAEBench demands."""
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
