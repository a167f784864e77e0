"""SAEs as a stack: which can be trained together, and each as one row of a tensor and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.kernels import Params
from matryoshka.trainer_config import TrainerConfig
from sae import ACTIVATIONS, SAE, Gate

MIN_THRESHOLD = 1e-6  # for jumprelu, whose thresholds are trained as logarithms


def flattened(sae: SAE) -> Tensor:
    """An SAE's parameters as one row [n_params], which `Params.of` reads. Half precision becomes
    float32."""
    parts: list[Tensor] = [sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec]
    if sae.activation == "jumprelu" and sae.threshold is not None:
        parts.append(sae.threshold.clamp_min(MIN_THRESHOLD).log())
    flat = torch.cat([part.detach().flatten() for part in parts])
    return flat if flat.dtype == torch.float64 else flat.float()


def in_order(params: Params, order: Tensor) -> dict[str, Tensor]:
    """One SAE's parameters as `SAE.from_tensors` takes them. Latent `order[j]` comes in place j."""
    tensors = {
        "W_enc": params.W_enc[order].T,
        "b_enc": params.b_enc[0, order],
        "W_dec": params.W_dec[order],
        "b_dec": params.b_dec[0],
    }
    if params.log_threshold.numel():
        tensors["threshold"] = params.log_threshold[0, order].exp()
    return tensors


def check_stack(
    saes: Sequence[SAE], configs: Sequence[TrainerConfig], seeds: Sequence[int]
) -> None:
    """Raises ValueError unless these SAEs can be stepped together."""
    if not len(saes) == len(configs) == len(seeds) > 0:
        raise ValueError(
            f"{len(saes)} SAEs, {len(configs)} configs and {len(seeds)} seeds: the numbers must be "
            "equal, and at least 1"
        )
    first = saes[0]
    for sae in saes:
        for name in ("d_model", "n_latents", "activation"):
            if getattr(sae, name) != getattr(first, name):
                raise ValueError(f"SAEs that are stepped together must have the same {name}")
        if sae.W_enc.device != first.W_enc.device:
            raise ValueError("SAEs that are stepped together must be on the same device")
    if any(config.gradient != "autograd" for config in configs):
        check_slopes(first.activation)
    for sae, config in zip(saes, configs, strict=True):
        check_member(sae, config)


def check_member(sae: SAE, config: TrainerConfig) -> None:
    """Raises ValueError where a setting is impossible for an SAE."""
    if sae.k is not None and sae.k != config.target_l0:
        raise ValueError(
            f"an SAE of k = {sae.k:g} must have that as target_l0, not {config.target_l0:g}"
        )
    if sae.activation == "relu" and config.auxiliary != "none":
        raise UserError(
            "--auxiliary does nothing for relu: the pre-activations of a silent latent are not "
            "positive, so it has nothing to explain the error with; use --resample-every"
        )
    config.check(sae.n_latents)
    config.require_eights("d_model", sae.d_model)


@torch.inference_mode(False)
def check_slopes(activation: str) -> None:
    """Raises ValueError where the kernels' gradients would be wrong for an activation function:
    where its slope is not 1 for an activation that is not 0, and 0 for one that is."""
    preacts = torch.linspace(-4, 4, 257, dtype=torch.float64, requires_grad=True)
    gate = Gate(torch.ones(1), 100, 0.5 * torch.ones(1) if activation == "jumprelu" else None)
    with torch.enable_grad():
        acts = ACTIVATIONS[activation](preacts[None] * 1.0, gate)[0]
        (slopes,) = torch.autograd.grad(acts.sum(), preacts)
    if not torch.equal(slopes, (acts != 0).to(slopes.dtype)):
        raise ValueError(f'the slope of {activation} is not 0 or 1: train with gradient="autograd"')
