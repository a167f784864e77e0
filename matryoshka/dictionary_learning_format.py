"""dictionary_learning's folders: config.json and ae.pt, a state dict (as of its commit 60ec6bf).

    relu                AutoEncoderNew
    topk                AutoEncoderTopK
    batchtopk           BatchTopKSAE, whose threshold is one number
    jumprelu            JumpReluAutoEncoder
    relu or batchtopk,  MatryoshkaBatchTopKSAE, the one public format in which prefixes survive:
      with widths         its `active_groups` first groups of latents are a prefix

Decoder rows get norm 1, as its trainers and SAEBench have them: activations are a_j ||d_j|| there.
AutoEncoder is read as well. All but AutoEncoderNew and JumpReluAutoEncoder take the decoder's bias
off the input first.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.files import write_atomically, write_json
from matryoshka.foreign_files import read_object, read_pickle, whole
from matryoshka.plain_weights import (
    Weights,
    centred,
    has_prefixes,
    require_unit_rows,
    sae_of,
    uncentred,
    unit_rows,
    weights_from,
    weights_of,
)
from sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
OURS = "matryoshka_sae"  # the key of config.json under which this project's own settings are
ONE_THRESHOLD = 1e-5  # a_j ||d_j|| at which latents begin to fire: one number, within this share

LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
TENSORS = {  # of each class, by the fields of `Weights`
    "AutoEncoder": LINEAR | {"b_dec": "bias"},
    "AutoEncoderNew": LINEAR | {"b_dec": "decoder.bias"},
    "AutoEncoderTopK": LINEAR | {"b_dec": "b_dec"},
    "BatchTopKSAE": LINEAR | {"b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": PLAIN | {"threshold": "threshold"},
    "JumpReluAutoEncoder": PLAIN | {"threshold": "threshold"},
}
NOT_CENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
OF_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
ACTIVATIONS = {"AutoEncoderTopK": "topk", "JumpReluAutoEncoder": "jumprelu"} | dict.fromkeys(
    OF_BATCH, "batchtopk"
)


def is_one(folder: Path) -> bool:
    """Whether a folder looks like one of dictionary_learning's, whole or in part."""
    return (folder / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------ write


def write(sae: SAE, folder: Path, widths: Sequence[int] | None = None) -> list[str]:
    """Writes both files; returns what the format cannot express, a line each.

    widths: prefixes to keep, which rise and end at n_latents; by default those that the SAE was
    trained at. Raises `UserError` where the SAE has no form there.
    """
    if sae.activation == "batchtopk" and sae.threshold is None:
        raise UserError("a batchtopk SAE without a threshold is not trained yet: train it first")
    widths = require_widths(sae, widths)
    n_zero = int((weights_of(sae).norms == 0).sum())
    weights = unit_rows(weights_of(sae))
    name, threshold = class_of(sae, weights, widths)
    notes = ["activations are a_j ||d_j|| there, in the units of the data"]
    notes += [f"latents with decoder rows of zeros ({n_zero}) never fire there"] * (n_zero > 0)
    notes += _prefix_notes(sae, name)
    if name not in NOT_CENTRED:
        weights = centred(weights)
    tensors = _tensors(weights.float32(), name)
    tensors.pop("threshold", None)
    if name != "AutoEncoderNew":
        tensors["threshold"] = threshold
    k = max(1, round(sae.k or sae.about.get("l0") or 1))
    if name in ("AutoEncoderTopK", *OF_BATCH):
        tensors["k"] = torch.tensor(k, dtype=torch.int)
        if k != sae.k:
            notes.append(f"k must be a whole number there: it is {k}, and decides nothing")
    groups = [end - start for start, end in pairwise([0, *(widths or [])])]
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor(groups)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(folder / WEIGHTS, lambda part: part.write_bytes(buffer.getvalue()))
    write_json(folder / CONFIG, config_of(sae, name, k, groups))
    return notes


def require_widths(sae: SAE, widths: Sequence[int] | None) -> list[int]:
    """The prefixes to keep, [] for none. Raises `UserError` where they are not prefixes."""
    widths = list(widths or _groups_of(sae.about))
    if not widths:
        return []
    if widths != sorted(set(widths)) or widths[0] < 1 or widths[-1] != sae.n_latents:
        raise UserError(
            f"widths must rise from 1 or more and end at {sae.n_latents}, the number of latents, "
            f"got {' '.join(map(str, widths))}"
        )
    return widths


def _groups_of(about: Mapping[str, Any]) -> list[int]:
    """The widths that an SAE was trained at but for 0, its bias alone."""
    return [width for width in about.get("widths") or [] if width > 0]


def class_of(sae: SAE, weights: Weights, widths: Sequence[int]) -> tuple[str, Tensor]:
    """The class for an SAE whose `weights` have unit rows, and its threshold: [] or [n_latents]."""
    none = torch.tensor(0.0 if sae.activation == "relu" else -1.0)
    if sae.activation == "topk":
        return "AutoEncoderTopK", none
    if sae.activation == "relu":
        return ("MatryoshkaBatchTopKSAE" if widths else "AutoEncoderNew"), none
    assert weights.threshold is not None
    of_each = weights.threshold[weights_of(sae).norms > 0]
    one = of_each.mean() if len(of_each) else weights.threshold.mean()
    is_one_number = bool(((of_each - one).abs() <= ONE_THRESHOLD * one).all())
    if sae.activation == "jumprelu" or not is_one_number:
        return "JumpReluAutoEncoder", weights.threshold.float()
    return ("MatryoshkaBatchTopKSAE" if widths else "BatchTopKSAE"), one.float()


def _prefix_notes(sae: SAE, name: str) -> list[str]:
    """What is said of prefixes that the class cannot keep."""
    if name == "MatryoshkaBatchTopKSAE" or not has_prefixes(sae):
        return []
    return [f"{name} cannot decode a prefix: those trained at are in config.json only"]


def _tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Float32 tensors by the names that a class has for them."""
    named = {}
    for field, theirs in TENSORS[name].items():
        if field in tensors:
            value = tensors[field]
            named[theirs.removesuffix(".T")] = (
                value.T.contiguous() if theirs.endswith(".T") else value
            )
    return named


def config_of(sae: SAE, name: str, k: int, groups: Sequence[int]) -> dict[str, Any]:
    """config.json: what its reader and SAEBench look for, and all that this project knows."""
    about = sae.about
    trainer: dict[str, Any] = {
        "dict_class": name,
        "trainer_class": None,  # it was trained by none of its trainers
        "activation_dim": sae.d_model,
        "dict_size": sae.n_latents,
        "lm_name": about.get("model"),
        "layer": about.get("layer"),
        "lr": about.get("lr"),
        "steps": about.get("n_steps"),
        "seed": about.get("seed"),
    }
    if name in ("AutoEncoderTopK", *OF_BATCH):
        trainer["k"] = k
    if groups:
        trainer["group_sizes"] = list(groups)
    buffer = {"d_submodule": sae.d_model, "ctx_len": about.get("context")}
    ours = {
        "activation": sae.activation,
        "k": sae.k,
        "mean_norm": float(sae.mean_norm),
        "about": about,
    }
    return {"trainer": trainer, "buffer": buffer, OURS: ours}


# ------------------------------------------------------------------------------------------- read


def read(folder: Path) -> SAE:
    """The SAE in a folder of dictionary_learning. Raises `UserError` where it holds none that can
    be read."""
    config, tensors = read_object(folder / CONFIG), read_pickle(folder / WEIGHTS)
    try:
        trainer = config.get("trainer")
        if not isinstance(trainer, dict):
            raise UserError(f"{CONFIG} has no settings of a trainer")
        return _read(trainer, config, tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read(trainer: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, Tensor]) -> SAE:
    name = trainer.get("dict_class")
    if name not in TENSORS:
        raise UserError(f"dict_class {name!r} cannot be read here, only {', '.join(TENSORS)}")
    sizes = whole(trainer, "dict_size"), whole(trainer, "activation_dim")
    weights = weights_from(tensors, TENSORS[name], *sizes)
    if name not in NOT_CENTRED:
        weights = uncentred(weights)
    about: dict[str, Any] = {"from": {"format": "dictionary_learning", **config}}
    k, mean_norm = None, None
    if name in ("AutoEncoderTopK", *OF_BATCH):
        k = _k(trainer, tensors)
    if name == "AutoEncoderTopK":
        require_unit_rows(weights, name)
    if name == "MatryoshkaBatchTopKSAE":
        about["widths"] = _widths(tensors, sizes[0])
    activation, ours = ACTIVATIONS.get(name, "relu"), config.get(OURS)
    if isinstance(ours, dict):
        activation, k, mean_norm, about = _our_own(ours, name, about.get("widths"))
    return sae_of(weights, activation, about, k, mean_norm)


def _our_own(ours: dict[str, Any], name: str, widths: list[int] | None) -> tuple[Any, ...]:
    """activation, k, mean_norm and about of an SAE of this project that has come back."""
    activation, about, mean_norm = ours.get("activation"), ours.get("about"), ours.get("mean_norm")
    classes = {
        "relu": ("AutoEncoderNew", "MatryoshkaBatchTopKSAE"),
        "topk": ("AutoEncoderTopK",),
        "batchtopk": (*OF_BATCH, "JumpReluAutoEncoder"),
        "jumprelu": ("JumpReluAutoEncoder",),
    }
    if name not in classes.get(str(activation), ()) or not isinstance(about, dict):
        raise UserError(f"its settings under {OURS} contradict its dict_class, {name}")
    if not isinstance(mean_norm, float) or not mean_norm > 0:
        raise UserError(f"mean_norm under {OURS} must be a number above 0, got {mean_norm!r}")
    if widths and widths != _groups_of(about):
        about = about | {"widths": widths}
    return activation, ours.get("k"), mean_norm, about


def _k(trainer: dict[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Active latents a sample, where config.json and ae.pt agree."""
    k = whole(trainer, "k")
    if "k" in tensors and (tensors["k"].dim() != 0 or int(tensors["k"]) != k):
        raise UserError(f"k is {k} in {CONFIG} and {tensors['k'].tolist()} in {WEIGHTS}")
    return k


def _widths(tensors: Mapping[str, Tensor], n_latents: int) -> list[int]:
    """The ends of its groups of latents."""
    groups = tensors.get("group_sizes")
    if groups is None or groups.dim() != 1 or int(groups.sum()) != n_latents or (groups < 1).any():
        raise UserError(
            f"group_sizes in {WEIGHTS} must be sizes of groups that add up to {n_latents}"
        )
    return list(accumulate(int(size) for size in groups))
