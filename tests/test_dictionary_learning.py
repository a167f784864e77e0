"""Against dictionary_learning's own classes, where its package can be imported: same SAE, prefixes.

Installed for it: `pip install git+https://github.com/saprmarks/dictionary_learning`.
"""

import json

import pytest
import torch
from sae_zoo import N_LATENTS, any_sae, inputs

from matryoshka import convert
from matryoshka.conversion_check import compare

batch_top_k = pytest.importorskip("dictionary_learning.trainers.batch_top_k")
matryoshka_batch_top_k = pytest.importorskip("dictionary_learning.trainers.matryoshka_batch_top_k")
top_k = pytest.importorskip("dictionary_learning.trainers.top_k")
dictionary = pytest.importorskip("dictionary_learning.dictionary")

CLASSES = {
    "AutoEncoderNew": dictionary.AutoEncoderNew,
    "AutoEncoderTopK": top_k.AutoEncoderTopK,
    "BatchTopKSAE": batch_top_k.BatchTopKSAE,
    "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder,
}


def loaded(folder):
    """What its own class makes of a folder, in float64."""
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    return CLASSES[name].from_pretrained(str(folder / "ae.pt")).double()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_its_own_class_makes_the_same_sae_of_it(activation, tmp_path):
    for seed in range(10):
        sae = any_sae(activation, seed)
        x = inputs(sae, seed)
        convert.export(sae, "dictionary-learning", tmp_path / str(seed), x)
        theirs = loaded(tmp_path / str(seed))
        comparison = compare(sae, (theirs.encode, theirs.decode), x)
        assert comparison.is_same, str(comparison)


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_its_active_groups_are_prefixes(activation, tmp_path):
    sae = any_sae(activation, 0)
    x = inputs(sae, 0).double()
    convert.export(sae, "dictionary-learning", tmp_path / "out", x)
    theirs, double = loaded(tmp_path / "out"), sae.with_tensors().double()
    for n_groups, width in ((1, 4), (2, 10), (3, N_LATENTS)):
        theirs.active_groups = n_groups
        ours = double.decode(double.encode(x), width)
        error = (theirs(x) - ours).norm(dim=1).max() / ours.norm(dim=1).max()
        assert float(error.detach()) <= 1e-6


def test_what_its_own_classes_save_is_read_the_same(tmp_path):
    torch.manual_seed(0)  # its classes draw from the global generator
    made = {
        "AutoEncoder": dictionary.AutoEncoder(12, 20),
        "AutoEncoderNew": dictionary.AutoEncoderNew(12, 20),
        "AutoEncoderTopK": top_k.AutoEncoderTopK(12, 20, 4),
        "BatchTopKSAE": batch_top_k.BatchTopKSAE(12, 20, 4),
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(
            12, 20, 4, [4, 6, 10]
        ),
        "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder(12, 20),
    }
    x = torch.randn(100, 12, dtype=torch.float64)
    for name, theirs in made.items():
        with torch.no_grad():
            for parameter_name, parameter in theirs.named_parameters():
                if "b" in parameter_name.split(".")[-1]:  # biases
                    parameter.normal_()
            if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
                theirs.threshold.fill_(0.8)
        folder = tmp_path / name
        folder.mkdir()
        torch.save(theirs.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": 12, "dict_size": 20, "k": 4}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        ours = convert.load(folder).requires_grad_(False)
        theirs = theirs.double()
        comparison = compare(ours, (theirs.encode, theirs.decode), x)
        assert comparison.n_fired > 0
        assert comparison.is_same, f"{name}: {comparison}"
