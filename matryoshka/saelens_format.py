"""Writes and reads SAELens's folders, cfg.json and sae_weights.safetensors, as SAELens 6.54 does.

An SAE's activation function becomes an architecture of SAELens:

    relu                 standard, with the same activations
    jumprelu, batchtopk  jumprelu, with the same activations; of a BatchTopK SAE, its threshold
                         is written
    topk                 topk, with decoder rows of norm 1; its activations are a_j ||d_j||

These are read, too, and those that SAELens has during training (batchtopk, matryoshka_batchtopk).
SAELens has no prefixes, so they are written to the metadata, with all else that this project knows
about an SAE.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from matryoshka.errors import UserError
from matryoshka.files import write_json
from matryoshka.foreign_files import read_object, read_safetensors, whole
from matryoshka.plain_weights import (
    Weights,
    has_prefixes,
    require_unit_rows,
    sae_of,
    uncentred,
    unit_rows,
    weights_from,
    weights_of,
)
from sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # SAELens drops the metadata of an SAE that does not name SAELens's version
OURS = "matryoshka_sae"  # the key of the metadata that holds what only this project reads
ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}
IN_TRAINING = ("batchtopk", "matryoshka_batchtopk")


def recognises(folder: Path) -> bool:
    """Whether a folder is one of SAELens's, perhaps with files missing."""
    return (folder / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------ write


def write(sae: SAE, folder: Path) -> list[str]:
    """Writes both files; returns notes, a line for each thing that is different in SAELens.

    Raises `UserError` if SAELens has no architecture for the SAE.
    """
    weights, notes = weights_of(sae), prefix_notes(sae)
    if sae.activation == "batchtopk" and sae.threshold is None:
        raise UserError("a batchtopk SAE without a threshold is not trained yet: train it first")
    if sae.activation == "topk":
        n_zero = int((weights.norms == 0).sum())
        weights = unit_rows(weights)
        notes.append("activations are a_j ||d_j|| there, in the units of the data")
        notes += [f"latents with decoder rows of zeros ({n_zero}) never fire there"] * (n_zero > 0)
    if sae.activation == "batchtopk":
        notes.append("there it is a JumpReLU SAE: k is in the metadata only")
    config = {
        "architecture": ARCHITECTURES.get(sae.activation, "topk"),
        "d_in": sae.d_model,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata_of(sae),
    }
    if sae.activation == "topk":
        config |= {"k": int(sae.k or 0), "rescale_acts_by_decoder_norm": False}
    tensors = weights.float32()
    if config["architecture"] != "jumprelu":
        tensors.pop("threshold", None)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    return notes


def prefix_notes(sae: SAE) -> list[str]:
    """The note about prefixes, if the SAE was trained at more than one."""
    if not has_prefixes(sae):
        return []
    return ["SAELens cannot decode a prefix: the prefixes trained at are in the metadata only"]


def metadata_of(sae: SAE) -> dict[str, Any]:
    """The metadata that SAELens shows, with its names, and all that this project knows."""
    about = sae.about
    named = {
        "model_name": about.get("model"),
        "hook_name": hook_name(about),
        "hook_layer": about.get("layer"),
        "dataset_path": about.get("dataset"),
        "context_size": about.get("context"),
        "prepend_bos": {"always": True, "never": False}.get(about.get("begin", "")),
        "l0": about.get("l0"),
        "training_architecture": about.get("kind") or about.get("name"),
        "training_architecture_details": {
            name: about[name] for name in ("widths", "n_prefixes", "prefixes") if about.get(name)
        },
    }
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,  # it was not trained by SAELens
        **{name: value for name, value in named.items() if value not in (None, {})},
        OURS: {
            "activation": sae.activation,
            "k": sae.k,
            "mean_norm": float(sae.mean_norm),
            "about": about,
        },
    }


def hook_name(about: Mapping[str, Any]) -> str | None:
    """TransformerLens's name of the site of the activations; None if the layer is not known."""
    layer = about.get("layer")
    return None if layer is None else f"blocks.{layer}.hook_{about.get('site') or 'resid_pre'}"


# ------------------------------------------------------------------------------------------- read


def read(folder: Path) -> SAE:
    """Reads the SAE in a folder of SAELens. Raises `UserError` if it cannot be read."""
    config, tensors = read_object(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    try:
        return _read(config, tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read(config: dict[str, Any], tensors: dict[str, Any]) -> SAE:
    """The SAE of these settings and tensors. Raises `UserError`."""
    architecture = _architecture(config)
    _require_plain(config, tensors)
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture in IN_TRAINING:
        names["threshold"] = "topk_threshold"
    elif architecture == "jumprelu":
        names["threshold"] = "threshold"
    weights = weights_from(tensors, names, whole(config, "d_sae"), whole(config, "d_in"))
    if config.get("apply_b_dec_to_input", True):
        weights = uncentred(weights)
    metadata = config.get("metadata")
    ours = metadata.get(OURS) if isinstance(metadata, dict) else None
    if isinstance(ours, dict):
        return _our_own(weights, architecture, ours)
    about = {"from": {"format": "saelens", "architecture": architecture, "metadata": metadata}}
    about |= _widths(config, metadata)
    if architecture in ("topk", *IN_TRAINING):
        weights = _by_activation_and_norm(weights, config, architecture)
    activation = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}.get(architecture)
    return sae_of(weights, activation or "batchtopk", about, config.get("k"))


def _our_own(weights: Weights, architecture: str, ours: dict[str, Any]) -> SAE:
    """An SAE that this project wrote. `ours`: the metadata under OURS. Raises `UserError`."""
    activation, about, mean_norm = ours.get("activation"), ours.get("about"), ours.get("mean_norm")
    if ARCHITECTURES.get(str(activation), "topk") != architecture or not isinstance(about, dict):
        raise UserError(f"its metadata under {OURS} contradicts its architecture, {architecture}")
    if not isinstance(mean_norm, float) or not mean_norm > 0:
        raise UserError(f"mean_norm under {OURS} must be a number above 0, got {mean_norm!r}")
    return sae_of(weights, str(activation), about, ours.get("k"), mean_norm)


def _architecture(config: dict[str, Any]) -> str:
    """The name of the architecture; raises `UserError` for one that cannot be read here.

    Folders from before SAELens 6.0 also name an activation function, which decides for "standard".
    """
    architecture = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture == "standard" and function == "topk":
        architecture = "topk"
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    elif function != "relu" and architecture != "topk":
        raise UserError(f"activation function {function!r} is not known here")
    known = ("standard", "topk", "jumprelu", *IN_TRAINING)
    if architecture not in known:
        raise UserError(
            f"architecture {architecture!r} cannot be read here, only {', '.join(known)}"
        )
    if architecture in ("topk", *IN_TRAINING) and not isinstance(config.get("k"), int | float):
        raise UserError(f"k must be a number, got {config.get('k')!r}")
    return architecture


def _require_plain(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raises `UserError` for an SAE with processing of inputs that its weights do not include."""
    if config.get("normalize_activations") not in (None, "none", False):
        raise UserError(
            f"normalize_activations is {config['normalize_activations']!r}: the scale of its "
            "inputs is not in the folder; fold it in with SAELens first"
        )
    if config.get("reshape_activations") not in (None, "none"):
        raise UserError(f"reshape_activations {config['reshape_activations']!r} is not read here")
    factor = tensors.get("finetuning_scaling_factor", tensors.get("scaling_factor"))
    if factor is not None and not (factor == 1).all():
        raise UserError("it has a finetuning_scaling_factor, which is not read here")


def _widths(config: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """{"widths": the prefixes of a Matryoshka SAE}, or {} if the folder does not say them."""
    details = metadata.get("training_architecture_details") if isinstance(metadata, dict) else None
    for place in (config, details):
        widths = place.get("matryoshka_widths") if isinstance(place, dict) else None
        if isinstance(widths, list) and all(isinstance(width, int) for width in widths):
            return {"widths": widths}
    return {}


def _by_activation_and_norm(weights: Weights, config: dict[str, Any], architecture: str) -> Weights:
    """Weights for which activations times row norms are what SAELens compares in its TopK."""
    by_default = architecture in IN_TRAINING
    if config.get("rescale_acts_by_decoder_norm", by_default):
        scaled = unit_rows(Weights(weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec))
        return Weights(scaled.W_enc, scaled.b_enc, scaled.W_dec, scaled.b_dec, weights.threshold)
    if architecture == "topk":
        require_unit_rows(weights, architecture)
    return weights
