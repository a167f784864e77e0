"""What `studies.bench` times: SAEs of full size, batches for them, and functions that take steps.

Tests set the sizes below to smaller ones.
"""

import dataclasses
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka import metrics
from matryoshka.errors import UserError
from matryoshka.kernels import MatmulDtype, Workspace, write_gradient
from matryoshka.kernels.encode import encode
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from matryoshka.training_config import RECIPES
from sae import SAE, seeded_generator
from studies import saelens_standin

D_MODEL, N_LATENTS, BATCH, L0 = 768, 3072, 1024, 30
TRAINING_STEPS = 200
UNMOVED = TrainerConfig(n_steps=10**6, target_l0=L0, lr=1e-12)  # steps change next to nothing


class Synthetic:
    """Inputs made of `n_latents` known directions, scaled to a mean norm of sqrt(D_MODEL)."""

    def __init__(self, n_latents: int, l0: float):
        self.generator, self.l0 = seeded_generator(0), l0
        dictionary = torch.randn(n_latents, D_MODEL, generator=self.generator)
        self.dictionary = torch.nn.functional.normalize(dictionary, dim=1)
        # Frequencies fall as a power of the latent's index; they sum to l0, and none is above 1/2.
        self.frequency = (torch.arange(n_latents) + 10.0) ** -0.8
        for _ in range(50):
            self.frequency = (self.frequency * (l0 / self.frequency.sum())).clamp(max=0.5)
        self.scale = 1.0
        self.scale = math.sqrt(D_MODEL) / float(self.draw().norm(dim=1).mean())

    def draw(self) -> Tensor:
        """Draws a batch x [BATCH, D_MODEL]."""
        shape = (BATCH, len(self.dictionary))
        active = torch.rand(shape, generator=self.generator) < self.frequency
        strength = active * (0.5 + torch.rand(shape, generator=self.generator))
        noise = 0.02 * torch.randn(BATCH, D_MODEL, generator=self.generator)
        return self.scale * (strength @ self.dictionary + noise)

    @torch.no_grad()
    def placed_sae(self, x: Tensor, activation: str = "relu") -> SAE:
        """An SAE on the true directions whose latents fire on x as often as these are active."""
        k = None if activation == "relu" else self.l0
        sae = SAE(D_MODEL, len(self.dictionary), activation=activation, k=k)
        # Counts are rounded up or down at random: most latents of a large SAE fire less than once
        # in a batch.
        chance = torch.rand(len(self.dictionary), generator=self.generator)
        kept = (self.frequency * BATCH + chance).long()
        ranked = (x @ self.dictionary.T).sort(dim=0, descending=True).values
        sae.b_enc.copy_(-ranked.gather(0, kept[None])[0])
        sae.W_enc.copy_(self.dictionary.T)
        sae.W_dec.copy_(self.dictionary)
        sae.mean_norm.fill_(math.sqrt(D_MODEL))
        return sae


class Case(NamedTuple):
    """An SAE, and a batch to take steps on: x [BATCH, D_MODEL]."""

    sae: SAE
    x: Tensor

    @classmethod
    def fresh(
        cls, device: torch.device, activation: str = "relu", k: float | None = None
    ) -> "Case":
        """A new SAE of full size, on Gaussian inputs."""
        x = torch.randn(BATCH, D_MODEL, generator=seeded_generator(0))
        return cls(SAE(D_MODEL, N_LATENTS, activation=activation, k=k).to(device), x.to(device))

    @classmethod
    def placed(cls, device: torch.device, n_latents: int = N_LATENTS, l0: float = L0) -> "Case":
        """An SAE placed at the directions that the inputs are made of, not trained."""
        data = Synthetic(n_latents, l0)
        x = data.draw()
        return cls(data.placed_sae(x).to(device), x.to(device))

    @classmethod
    def trained(
        cls, device: torch.device, n_prefixes: int, activation: str = "relu", **settings: Any
    ) -> "Case":
        """An SAE trained from those directions. settings: those of `TrainerConfig`."""
        data = Synthetic(N_LATENTS, L0)
        config = TrainerConfig(
            n_steps=TRAINING_STEPS,
            target_l0=L0,
            n_prefixes=n_prefixes,
            lr=1e-3,
            l0_control="steady",
            sparsity_weight=3.0,
            sparsity_warmup=0.1,
            **settings,
        )
        trainer = Trainer([data.placed_sae(data.draw(), activation).to(device)], config, [0])
        for _ in tqdm(range(TRAINING_STEPS), f"train, {n_prefixes} prefixes", leave=False):
            trainer.step(data.draw().to(device))
        return cls(trainer.saes[0], data.draw().to(device))

    @torch.no_grad()
    def l0(self) -> float:
        """The mean number of active latents in an input."""
        return float(metrics.l0(self.sae.encode(self.x)))

    def trainer(self, n_prefixes: int, **settings: Any) -> Trainer:
        """A trainer whose steps change next to nothing. settings: those of `TrainerConfig`."""
        settings |= {"target_l0": self.sae.k or UNMOVED.target_l0, "n_prefixes": n_prefixes}
        config = dataclasses.replace(UNMOVED, **settings)
        return Trainer([self.sae], config, [0])

    def step(self, n_prefixes: int, **settings: Any) -> Callable[[], object]:
        """A function that takes one step."""
        trainer = self.trainer(n_prefixes, **settings)
        return lambda: trainer.step(self.x)

    def five_products(self, dtype_name: MatmulDtype = "float32") -> Callable[[], object]:
        """A function that multiplies the five matrix products of a dense step, and no more."""
        dtype = getattr(torch, dtype_name)
        W_enc, W_dec = (W.detach().to(dtype) for W in (self.sae.W_enc, self.sae.W_dec))
        x = self.x.to(dtype)
        acts = torch.rand(BATCH, self.sae.n_latents, device=x.device, dtype=dtype)
        g_x, g_acts = torch.randn_like(x), torch.rand_like(acts)

        def call() -> None:
            x @ W_enc
            acts @ W_dec
            g_x @ W_dec.T
            acts.T @ g_x
            g_acts.T @ x

        return call

    def parts(self, n_prefixes: int) -> dict[str, Callable[[], object]]:
        """Functions that each do one part of a step. The second contains the first."""
        trainer = self.trainer(n_prefixes)
        trainer.step(self.x)
        x, params, grads = self.x[None], trainer._params, trainer._grads
        prefixes, one = trainer._prefixes.of(1), params.one(0)
        objective = trainer._objective(x, prefixes)
        workspace, scale = Workspace(), trainer._input_scale
        parts: dict[str, Callable[[], object]] = {
            "encode": lambda: encode(one, x[0], objective, "float32", workspace),
            "encode, decode and backward": lambda: write_gradient(
                grads, params, objective, workspace=workspace
            ),
            "clip": trainer._clip,
            "Adam": lambda: trainer._adam(UNMOVED.lr),
            "scale the input": lambda: scale.scaled_by(scale.update(x, 0.01), x),
            "order the latents": lambda: trainer._objective(x, prefixes),
        }
        return {f"of these: {name}": torch.inference_mode()(part) for name, part in parts.items()}


def load_original(folder: str) -> Any:
    """Imports sae.py of a clone of the original code. Raises `UserError` if it is not that."""
    path = Path(folder) / "sae.py"
    if not path.is_file():
        raise UserError(f"--original {folder}: there is no sae.py; a clone of the original has one")
    spec = importlib.util.spec_from_file_location("original_sae", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        original_sae(module, 4, 2)
    except Exception as error:  # another project's code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"--original {folder}: not the original's sae.py ({why})") from None
    return module


def original_sae(original: Any, n_latents: int, n_prefixes: int) -> Any:
    """An SAE of the original code, with a learning rate that changes next to nothing."""
    with warnings.catch_warnings():
        # The original asks for CUDA's GradScaler on every machine.
        warnings.filterwarnings("ignore", message=".*GradScaler")
        return original.MatryoshkaSAE(
            D_MODEL, n_latents, n_prefixes, L0, UNMOVED.n_steps, lr=UNMOVED.lr
        )


def original_step(original: Any, case: Case, n_prefixes: int) -> Callable[[], object]:
    """A function that takes one step of the original code, with the weights of `case`."""
    theirs = original_sae(original, case.sae.n_latents, n_prefixes).to(case.x.device)
    copy_weights(case.sae, theirs)
    with torch.no_grad():
        theirs.normalizer.running_avg.fill_(float(case.x.norm(dim=1).mean()))
    return lambda: theirs.step(case.x)


@torch.no_grad()
def copy_weights(sae: SAE, theirs: Any) -> None:
    """Copies our weights to another tool's SAE, which has the same names and shapes."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(theirs, name).copy_(getattr(sae, name))


def require_saelens() -> None:
    """Raises `UserError` where SAELens is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        raise UserError("--saelens: SAELens is not installed: pip install sae-lens==6.54.12")


def saelens_step(case: Case, autocast: bool = False) -> Callable[[], object]:
    """A function that takes one step of SAELens's MatryoshkaBatchTopK trainer.

    It has the weights of `case`, a batchtopk SAE, and the widths of `train.py --recipe paper`.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae, device = case.sae, str(case.x.device)
    of_paper = dataclasses.replace(UNMOVED, widths=RECIPES["paper"]["widths"])
    config = saelens_standin.Config(
        n_latents=sae.n_latents,
        k=sae.k or L0,
        widths=tuple(of_paper.widths_of(sae.n_latents)),
        normalize="none",
    )
    theirs = saelens_standin.untrained(config, "matryoshka_batchtopk", D_MODEL, device=device)
    copy_weights(sae, theirs)
    steps = SAETrainerConfig(
        total_training_samples=UNMOVED.n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=UNMOVED.lr,
        lr_end=UNMOVED.lr,
        device=device,
        autocast=autocast,
    )
    trainer = SAETrainer(steps, theirs, itertools.repeat(case.x))
    return lambda: trainer.step(case.x)
