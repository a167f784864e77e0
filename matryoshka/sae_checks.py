"""Checks tensors that did not come from training here before an SAE is made of them."""

from collections.abc import Mapping

from torch import Tensor

from sae import SAE

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "mean_norm")  # some SAEs have a threshold, too


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor of an SAE is missing, or has a wrong shape or dtype.

    Tensors with other names are not checked.
    """
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing among {', '.join(sorted(tensors))}")
    if tensors["W_enc"].dim() != 2:
        raise ValueError(f"W_enc must be [d_model, n_latents], got {list(tensors['W_enc'].shape)}")
    d_model, n_latents = tensors["W_enc"].shape
    shapes: list[list[int]] = [[d_model, n_latents], [n_latents], [n_latents, d_model], [d_model]]
    named = zip((*TENSORS, "threshold"), [*shapes, [], [n_latents]], strict=True)
    for name, shape in [(name, shape) for name, shape in named if name in tensors]:
        if list(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensors[name].shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} must hold floats, got {tensors[name].dtype}")


def check_values(sae: SAE) -> None:
    """Raises ValueError if a value is not finite, or has the wrong sign."""
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if sae.threshold is not None and (sae.threshold < 0).any():
        raise ValueError("threshold must not be negative")
    if not sae.mean_norm > 0:
        raise ValueError(f"mean_norm must be above 0, got {float(sae.mean_norm)}")
