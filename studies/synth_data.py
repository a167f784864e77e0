"""Draws samples of a synthetic model whose features are known (SynthSAEBench) into a cache.

    pip install sae-lens==6.54.12
    python -m studies.synth_data --size mini --out cache/synth/mini

The model is SAELens's `SyntheticModel` (Chanin and Garriga-Alonso 2026, arXiv 2602.14687). It has
more features than dimensions. They form trees, in which children exclude each other and scale with
their parents; they fire with Zipfian probabilities and are correlated. On a CPU its sampler takes
longer than a training does, so samples are drawn once:

    OUT/train, OUT/held_out   caches of activations, as cache_activations.py writes them
    OUT/truth.safetensors     the features' directions, and which of them fire on held-out samples

Only this module and studies/synth_peers.py need SAELens. The size `16k` is the published
benchmark's configuration; `mini` is an eighth of it, and takes minutes on two cores.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from matryoshka.array_files import cache_arrays
from matryoshka.cache_reader import ActivationCache
from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_atomically

SizeName = Literal["mini", "16k"]
MODEL_SEED = 42  # the benchmark's seed of the directions, the trees and the magnitudes
SEED_TRAIN, SEED_HELD_OUT = 0, 1  # seeds of the samples
AT_ONCE = 1024  # samples drawn at once
TRUTH = "truth.safetensors"


class Size(NamedTuple):
    """A synthetic model, and how SAEs are trained on it."""

    n_features: int
    d_model: int
    n_trees: int
    n_latents: int
    widths: tuple[int, ...]  # of Matryoshka SAEs
    n_samples: int  # to train on, in several passes if the steps need more
    n_held_out: int
    n_steps: int
    batch_size: int
    lrs: tuple[float, ...]  # learning rates that a peer may choose from


SIZES: dict[str, Size] = {
    "mini": Size(
        n_features=2048,
        d_model=256,
        n_trees=16,
        n_latents=512,
        widths=(16, 64, 160, 320, 512),
        n_samples=512 * 1024,
        n_held_out=65_536,
        n_steps=1024,
        batch_size=1024,
        lrs=(3e-3, 1e-3, 1e-2),
    ),
    "16k": Size(
        n_features=16_384,
        d_model=768,
        n_trees=128,
        n_latents=4096,
        widths=(128, 512, 2048, 4096),
        n_samples=20_000 * 1024,
        n_held_out=500_000,
        n_steps=200_000,
        batch_size=1024,
        lrs=(3e-4, 1e-3, 1e-4),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, how many of its samples, and where they go."""

    size: SizeName = setting("mini", "the synthetic model: a key of SIZES")
    samples: int = setting(0, "samples to train on; 0: the number of the size")
    held_out: int = setting(0, "samples to score on; 0: the number of the size")
    out: str = setting("cache/synth/mini", "folder for the caches and the truth")
    device: str = setting("auto", "auto, cpu, cuda, ...")


class Truth(NamedTuple):
    """The true features, and which of them fire on each held-out sample."""

    directions: Tensor  # [n_features, d_model], of norm 1
    features: Tensor  # int32 [n_firings]: the features that fire, sample after sample
    starts: Tensor  # int64 [n_samples + 1]: where each sample's features begin in `features`
    about: dict[str, Any]  # the model's settings, SAELens's version and the seeds

    @property
    def l0(self) -> float:
        """The mean number of features that fire on a sample."""
        return len(self.features) / (len(self.starts) - 1)

    def fired(self, start: int, stop: int) -> Tensor:
        """Which features fire on samples `start` to `stop` - 1: bool [n, n_features]."""
        counts = self.starts[start : stop + 1].diff()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        features = self.features[self.starts[start] : self.starts[start + len(counts)]]
        fired = torch.zeros(len(counts), len(self.directions), dtype=torch.bool)
        fired[rows, features.long()] = True
        return fired


def run(config: Config) -> dict[str, Any]:
    """Draws the samples unless the folder has them; returns their numbers and the true L0.

    Raises `UserError`, also if the folder has samples of other settings.
    """
    size, folder = SIZES[config.size], Path(config.out)
    n_train, n_held_out = config.samples or size.n_samples, config.held_out or size.n_held_out
    asked = {"size": config.size, "n_samples": n_train, "n_held_out": n_held_out}
    if (folder / TRUTH).exists():
        truth = read_truth(folder)
        found = {key: truth.about[key] for key in asked}
        if found != asked:
            raise UserError(f"{folder} holds samples of {found}, not {asked}: give another --out")
    else:
        make_folder(folder)
        model = synthetic_model(size, pick_device(config.device))
        cache_arrays(folder / "train", samples(model, n_train, SEED_TRAIN), n_tokens=n_train)
        fired: list[Tensor] = []
        held_out = samples(model, n_held_out, SEED_HELD_OUT, fired)
        cache_arrays(folder / "held_out", held_out, n_tokens=n_held_out)
        truth = truth_of(model, fired, asked)
        write_truth(folder, truth)
    return {
        "out": config.out,
        "train": ActivationCache(folder / "train").n_tokens,
        "held_out": ActivationCache(folder / "held_out").n_tokens,
        "n_features": len(truth.directions),
        "true_l0": truth.l0,
    }


def synthetic_model(size: Size, device: torch.device) -> Any:
    """SAELens's model of that size; all other settings are the published benchmark's."""
    try:
        from sae_lens import synthetic
    except ImportError:
        raise UserError("the samples are SAELens's: pip install sae-lens==6.54.12") from None
    config = synthetic.SyntheticModelConfig(
        num_features=size.n_features,
        hidden_dim=size.d_model,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=size.n_trees,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=MODEL_SEED,
    )
    return synthetic.SyntheticModel(config, device=str(device))


def samples(model: Any, n: int, seed: int, fired: list[Tensor] | None = None) -> Iterator[Tensor]:
    """Yields the first `n` samples of `model` with `seed`, in parts x [AT_ONCE, d_model].

    For each part, int64 [n_firings, 2], pairs of a sample and a feature that fires on it, are
    appended to `fired`. SAELens's sampler draws from torch's global generator; nothing else here
    uses it.
    """
    torch.manual_seed(seed)
    for start in range(0, n, AT_ONCE):
        x, acts = model.sample_with_features(min(AT_ONCE, n - start))
        if fired is not None:
            fired.append((acts > 0).nonzero().cpu() + torch.tensor([start, 0]))
        yield x


def truth_of(model: Any, fired: Sequence[Tensor], asked: dict[str, Any]) -> Truth:
    """The truth about held-out samples, from the pairs that `samples` appended to `fired`."""
    sample, feature = torch.cat(list(fired)).unbind(1)
    counts = torch.bincount(sample, minlength=asked["n_held_out"])
    about = asked | {
        "model": model.cfg.to_dict(),
        "sae_lens": importlib.metadata.version("sae-lens"),
        "seeds": {"train": SEED_TRAIN, "held_out": SEED_HELD_OUT},
    }
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Truth(model.feature_dict.feature_vectors.detach().cpu(), feature.int(), starts, about)


def write_truth(folder: Path, truth: Truth) -> None:
    """Writes the truth's file, whole or not at all."""
    tensors = {name: getattr(truth, name).contiguous() for name in Truth._fields[:3]}
    metadata = {"truth": json.dumps(truth.about)}
    write_atomically(
        folder / TRUTH, lambda part: safetensors.torch.save_file(tensors, part, metadata)
    )


def read_truth(folder: Path) -> Truth:
    """Reads the truth about the samples in a folder. Raises `UserError` if it cannot be read."""
    try:
        with safetensors.safe_open(folder / TRUTH, framework="pt") as file:
            directions, features, starts = (file.get_tensor(name) for name in Truth._fields[:3])
            return Truth(directions, features, starts, json.loads(file.metadata()["truth"]))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / TRUTH} is not there, or damaged ({error}): python -m studies.synth_data "
            "makes it"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        result = run(parse(Config, __doc__, argv))
        print(table(["samples of a synthetic model", ""], [[k, str(v)] for k, v in result.items()]))


if __name__ == "__main__":
    main()
