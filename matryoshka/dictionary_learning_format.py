"""dictionary_learning's folders: config.json and ae.pt, a state dict (as of its commit 60ec6bf).

    relu                AutoEncoderNew
    topk                AutoEncoderTopK
    batchtopk           BatchTopKSAE, whose threshold is one number
    jumprelu            JumpReluAutoEncoder
    relu or batchtopk,  MatryoshkaBatchTopKSAE, the only public format that keeps prefixes:
      with widths         its first `active_groups` groups of latents are a prefix

Decoder rows are written with norm 1, which its trainers and SAEBench expect, so that activations
there are a_j ||d_j||. AutoEncoder can be read, too. All classes but AutoEncoderNew and
JumpReluAutoEncoder subtract the decoder's bias from the input first.
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
OURS = "matryoshka_sae"  # the key in config.json of this project's own settings
ONE_THRESHOLD = 1e-5  # relative differences of thresholds up to which they count as one number

LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
TENSORS = {  # class -> field of `Weights` -> name of the tensor; .T: transposed
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


def recognises(folder: Path) -> bool:
    """Whether a folder looks like one of dictionary_learning's, even if it is incomplete."""
    return (folder / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------ write


def write(sae: SAE, folder: Path, widths: Sequence[int] | None = None) -> list[str]:
    """Writes both files; returns notes on what the format cannot express, one line each.

    widths: prefix lengths to keep, which rise and end at n_latents; None: those that the SAE was
    trained at. Raises `UserError` if the format has no class for the SAE.
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
            notes.append(f"k must be a whole number there: {k} was written, and has no effect")
    groups = [end - start for start, end in pairwise([0, *(widths or [])])]
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor(groups)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(folder / WEIGHTS, lambda part: part.write_bytes(buffer.getvalue()))
    write_json(folder / CONFIG, config_of(sae, name, k, groups))
    return notes


def require_widths(sae: SAE, widths: Sequence[int] | None) -> list[int]:
    """The prefix lengths to keep, [] for none. Raises `UserError` if they are not prefixes."""
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
    """The widths that an SAE was trained at, without 0, at which only its bias is trained."""
    return [width for width in about.get("widths") or [] if width > 0]


def class_of(sae: SAE, weights: Weights, widths: Sequence[int]) -> tuple[str, Tensor]:
    """The class for an SAE, and its threshold: [] or [n_latents]. weights: its, with unit rows."""
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
    """The note that the class cannot keep prefixes, if it cannot and the SAE has any."""
    if name == "MatryoshkaBatchTopKSAE" or not has_prefixes(sae):
        return []
    return [f"{name} cannot decode a prefix: those trained at are in config.json only"]


def _tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Float32 tensors under the names that the class `name` gives them."""
    named = {}
    for field, theirs in TENSORS[name].items():
        if field in tensors:
            value = tensors[field]
            named[theirs.removesuffix(".T")] = (
                value.T.contiguous() if theirs.endswith(".T") else value
            )
    return named


def config_of(sae: SAE, name: str, k: int, groups: Sequence[int]) -> dict[str, Any]:
    """config.json: the entries that its reader and SAEBench use, and those of this project."""
    about = sae.about
    trainer: dict[str, Any] = {
        "dict_class": name,
        "trainer_class": None,  # the SAE was not trained by dictionary_learning
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
    """The SAE in a folder of dictionary_learning. Raises `UserError` if it cannot be read."""
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
    """activation, k, mean_norm and about of an SAE that this project wrote in this format."""
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
    """Active latents a sample. Raises `UserError` unless config.json and ae.pt agree."""
    k = whole(trainer, "k")
    if "k" in tensors and (tensors["k"].dim() != 0 or tensors["k"].item() != k):
        raise UserError(f"k is {k} in {CONFIG} and {tensors['k'].tolist()} in {WEIGHTS}")
    return k


def _widths(tensors: Mapping[str, Tensor], n_latents: int) -> list[int]:
    """The prefix lengths at which the groups of latents end. Raises `UserError`."""
    groups = tensors.get("group_sizes", torch.empty(0))
    sizes = groups.tolist() if groups.dim() == 1 else []
    if sum(sizes) != n_latents or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UserError(
            f"group_sizes in {WEIGHTS} must be sizes of groups that add up to {n_latents}"
        )
    return list(accumulate(sizes))
