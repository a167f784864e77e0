"""How an SAE is trained: every setting, the check of them, and what is computed from them."""

import dataclasses
import itertools
import math
from typing import Literal

import torch

from matryoshka.command_line import require_not_negative, require_positive, setting
from matryoshka.errors import UserError
from matryoshka.kernels import Gradient, MatmulDtype
from matryoshka.kernels.dispatch import MAX_LATENTS_OF_ALL_PAIRS
from sae import Sparsity

L0Control = Literal["original", "steady"]
PREFIX_SETTINGS = ("n_prefixes", "widths", "width_weights")  # SAEs of a stack may differ in these


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How an SAE is trained. The defaults are those of the original code for the toy."""

    n_steps: int = setting(help="training steps")
    target_l0: float = setting(
        help="active latents a sample; the sparsity weight is adapted to reach it"
    )
    n_prefixes: int = setting(10, "prefixes a step; 1 makes a vanilla SAE")
    prefixes: Literal["sampled", "expected"] = setting(
        "sampled",
        "sampled: each step draws its prefixes at random; expected: each step takes the exact mean "
        "of the loss over all that could be drawn",
    )
    widths: tuple[float, ...] = setting(
        (),
        "fixed prefix lengths, instead of random ones: numbers of latents, or shares of them if "
        "all are at most 1; the last must be all latents; a first of 0 is the bias alone",
    )
    width_weights: tuple[float, ...] = setting(
        (), "weights of the --widths in the loss, divided by their sum; default: all equal"
    )
    sparsity: Sparsity = setting(
        "l1",
        "relu only: the cost of an activation a_j, with c = a_j ||d_j||; l1: c; log: "
        "log((c + 0.1) / 0.1)",
    )
    sparsity_weight: float = setting(
        0.2, "weight of the sparsity loss after its warm-up; it is then adapted to --target-l0"
    )
    sparsity_warmup: float = setting(
        0.2, "share of the steps over which the sparsity weight rises from 0 to --sparsity-weight"
    )
    l0_control: L0Control = setting(
        "original", "how the sparsity weight is adapted: see SparsityController"
    )
    lr: float = setting(
        3e-2, "learning rate of Adam; the thresholds of jumprelu learn ten times as fast"
    )
    lr_warmup_steps: int = setting(
        100, "steps over which the learning rate rises from 0, at most 1/20 of all steps"
    )
    lr_decay: float = setting(
        0.2, "share of the steps, at the end, over which the learning rate falls"
    )
    lr_end: float = setting(0.1, "the last learning rate, as a share of --lr")
    betas: tuple[float, float] = setting((0.5, 0.9375), "decays of Adam's two running means")
    max_grad_norm: float = setting(1.0, "norm that each SAE's gradient is clipped to")
    norm_decay: float = setting(0.99, "decay of the running mean of the inputs' norm")
    order_decay: float = setting(0.95, "decay of the running mean square that orders latents")
    restart_every: int = setting(
        0, "steps between chances to restart the last latent; 0: never, as in the paper"
    )
    restart_window: tuple[float, float] = setting(
        (0.2, 0.8),
        "shares of the steps between which --restart-every and --resample-every apply",
    )
    unhedged: float = setting(
        0.0,
        "share of the steps, at the beginning, in which the encoder is tied to the decoder and the "
        "SAE learns from the full reconstruction; after them the encoder learns from the prefixes, "
        "and the decoder still from the full reconstruction; 0: both learn from the prefixes in "
        "all steps, as in the paper",
    )
    auxiliary: Literal["none", "all", "level"] = setting(
        "none",
        "auxiliary loss, by which dead latents learn to explain the SAE's error; all: the error of "
        "the whole SAE; level: the error of each prefix, by the latents that the prefix adds",
    )
    auxiliary_weight: float = setting(1 / 32, "weight of the auxiliary loss")
    dead_after: int = setting(
        250_000,
        "activations without firing after which --auxiliary and --resample-every count a latent as "
        "dead",
    )
    resample_every: int = setting(
        0,
        "steps between restarts of all dead latents along the errors of samples that are "
        "reconstructed badly, within --restart-window; 0: never",
    )
    bandwidth: float = setting(
        1e-3,
        "jumprelu only: a threshold learns from pre-activations within half of this, for inputs "
        "scaled to a mean square norm of 1",
    )
    gradient: Gradient = setting(
        "auto",
        "auto: the fastest kernel for the device; dense: the kernel for GPUs, on a CPU as well; "
        "autograd: PyTorch's gradient, slow, for any activation function",
    )
    matmul_dtype: MatmulDtype = setting(
        "float32",
        "dtype of the operands of training's matrix products; the parameters are float32. bfloat16 "
        "needs more than 256 latents, and a batch and dimensions in multiples of 8",
    )

    def check(self, n_latents: int, batch_size: int | None = None) -> None:
        """Raises `UserError` where a setting is impossible for SAEs of `n_latents`."""
        self._check_ranges()
        if self.restart_every and self.unhedged:
            raise UserError(
                "--restart-every moves the last latent if it is worth little, but with --unhedged "
                "the last latent has a feature: use one of them"
            )
        self.check_widths(n_latents)
        if self.auxiliary == "level" and self.prefixes == "expected":
            raise UserError(
                "--auxiliary level has one loss for each prefix, and --prefixes expected has all "
                "prefixes: use one of them"
            )
        for name in ("target_l0",) if self.widths else ("n_prefixes", "target_l0"):
            value = getattr(self, name)
            if value > n_latents:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value} is more than there are latents: {n_latents}")
        if self.matmul_dtype == "bfloat16" and n_latents <= MAX_LATENTS_OF_ALL_PAIRS:
            raise UserError(
                f"--n-latents {n_latents}: --matmul-dtype bfloat16 needs more than "
                f"{MAX_LATENTS_OF_ALL_PAIRS} latents"
            )
        if batch_size is not None:
            self.require_eights("--batch-size", batch_size)

    def _check_ranges(self) -> None:
        """Raises `UserError` where a setting is out of its own range."""
        require_positive(self, "n_steps", "n_prefixes", "target_l0", "lr", "sparsity_weight")
        require_positive(self, "max_grad_norm")
        for name in ("target_l0", "lr", "sparsity_weight", "max_grad_norm"):
            if getattr(self, name) > torch.finfo(torch.float32).max:
                raise UserError(f"--{name.replace('_', '-')} is more than float32 can hold")
        require_not_negative(self, "restart_every", "lr_warmup_steps", "lr_end")
        for name in ("sparsity_warmup", "lr_decay", "norm_decay", "order_decay", "unhedged"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be a share, between 0 and 1, got {share}")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"--betas must be at least 0 and below 1, got {beta}")
        begin, end = self.restart_window
        if not 0 <= begin <= end <= 1:
            raise UserError(f"--restart-window must be two rising shares, got {begin} {end}")
        require_positive(self, "bandwidth", "dead_after", "auxiliary_weight")
        require_not_negative(self, "resample_every")

    def check_widths(self, n_latents: int) -> None:
        """Raises `UserError` where --widths or --width-weights are impossible."""
        widths, weights = self.widths_of(n_latents), self.width_weights
        shown = " ".join(f"{width:g}" for width in self.widths)
        if weights and len(weights) != len(widths):
            raise UserError(f"{len(weights)} --width-weights for {len(widths)} --widths")
        if any(not 0 <= weight < math.inf for weight in weights) or (weights and not sum(weights)):
            raise UserError("--width-weights must be 0 or more, and not all 0")
        if not widths:
            return
        if self.restart_every:
            raise UserError(
                "--restart-every needs latents that are ordered by their mean squares, and with "
                "--widths they are not: use one of them"
            )
        if weights and not weights[-1]:
            raise UserError(
                "the last of --width-weights must be above 0: else nothing trains the last latents"
            )
        if self.prefixes == "expected":
            raise UserError(
                "--widths are fixed, and --prefixes expected is a mean over random prefixes: use "
                "one of them"
            )
        if any(a >= b for a, b in itertools.pairwise(widths)) or widths[0] < 0:
            raise UserError(f"--widths must rise, got {shown} for {n_latents} latents")
        if widths[-1] != n_latents:
            raise UserError(f"--widths must end at --n-latents {n_latents}, got {shown}")

    def widths_of(self, n_latents: int) -> list[int]:
        """`widths` as numbers of latents. Raises `UserError` where one is not a whole number."""
        if any(not math.isfinite(width) for width in self.widths):
            raise UserError(f"--widths must be finite, got {self.widths}")
        if self.widths and max(self.widths) <= 1:
            # These are shares, and 1 is all latents. A share above 0 is at least one latent.
            return [max(round(width * n_latents), int(width > 0)) for width in self.widths]
        if any(width != int(width) for width in self.widths):
            raise UserError(f"--widths must be whole numbers, or shares up to 1, got {self.widths}")
        return [int(width) for width in self.widths]

    def require_eights(self, what: str, size: int) -> None:
        """Raises `UserError` where products are in bfloat16 and `size` is not a multiple of 8.
        `what` names it in the message."""
        if self.matmul_dtype == "bfloat16" and size % 8:
            raise UserError(f"--matmul-dtype bfloat16: {what} is {size}, not a multiple of 8")

    @property
    def tracks_silence(self) -> bool:
        """Whether the trainer has to know how long each latent has not fired."""
        return self.auxiliary != "none" or self.resample_every > 0

    @property
    def n_warmup_steps(self) -> int:
        """The number of steps over which the sparsity weight rises."""
        return max(1, int(self.sparsity_warmup * self.n_steps))

    def weight_in_warmup(self, step: int) -> float:
        """The sparsity weight of step `step`, which counts from 0, if it is in the warm-up."""
        return self.sparsity_weight * min(1.0, (step + 1) / self.n_warmup_steps)

    def is_tied_at(self, step: int) -> bool:
        """Whether step `step` is in the first part of an unhedged training; see unhedged.py."""
        return step < self.unhedged * self.n_steps

    def restarts_at(self, step: int) -> bool:
        """Whether the last latent may be restarted after step `step`; see restart.py."""
        return self._is_due(step, self.restart_every)

    def resamples_at(self, step: int) -> bool:
        """Whether dead latents are resampled after step `step`; see dead_latents.py."""
        return self._is_due(step, self.resample_every)

    def _is_due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every` within the restart window; 0 means never."""
        begin, end = (share * self.n_steps for share in self.restart_window)
        return every > 0 and begin <= step <= end and step % every == 0

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, which counts from 0: a warm-up, a constant part and a
        linear decay. After step n_steps it stays at its last value."""
        step = min(step, self.n_steps)
        warmup = min(self.lr_warmup_steps, self.n_steps // 20)
        decay_steps = self.lr_decay * self.n_steps
        into_decay = max(0.0, step - (self.n_steps - decay_steps)) / max(decay_steps, 1e-9)
        falling = 1 - (1 - self.lr_end) * into_decay
        return self.lr * min(1.0, step / max(warmup, 1)) * falling


def shared_settings(configs: list[TrainerConfig]) -> TrainerConfig:
    """The settings that SAEs of a stack share. Raises ValueError where they differ in any that is
    not in PREFIX_SETTINGS."""
    first = configs[0]
    for config in configs:
        for field in dataclasses.fields(TrainerConfig):
            one, other = getattr(first, field.name), getattr(config, field.name)
            if field.name not in PREFIX_SETTINGS and one != other:
                raise ValueError(
                    "SAEs that are stepped together may differ only in "
                    f"{', '.join(PREFIX_SETTINGS)}, not in {field.name}: {one} and {other}"
                )
    return first
