"""An SAE that goes to another tool's folder and comes back is the same; bad folders are refused."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from sae_zoo import D_MODEL, N_LATENTS, any_sae, inputs
from safetensors.torch import load_file, save_file

from matryoshka import convert, dictionary_learning_format, saelens_format
from matryoshka.conversion_check import codec, compare
from matryoshka.errors import UserError
from sae import SAE

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")
N_SAES = 40  # of each pair; 200 have passed
PAIRS = list(itertools.product(convert.TARGETS, ACTIVATIONS))


@pytest.mark.parametrize(("target", "activation"), PAIRS)
def test_saes_of_any_scale_come_back_the_same(target, activation, tmp_path):
    for seed in range(N_SAES):
        sae = any_sae(activation, seed)
        x = inputs(sae, seed, dtype=(torch.float32, torch.float16)[seed % 4 == 3])
        x = x if x.isfinite().all() else inputs(sae, seed)
        convert.export(sae, target, tmp_path / str(seed), x.double())
        back = convert.load(tmp_path / str(seed))
        comparison = compare(sae, codec(back), x)
        assert comparison.largest_error <= 1e-6
        assert comparison.n_different == 0
        assert (back.activation, back.k) == (sae.activation, sae.k)
        assert back.about == sae.about
        assert back.mean_norm == sae.mean_norm
        assert back.state_dict().keys() == sae.state_dict().keys()


@pytest.mark.parametrize(("target", "activation"), PAIRS)
def test_what_came_back_is_the_same_in_float32(target, activation, tmp_path):
    sae = any_sae(activation, 1)
    x = inputs(sae, 1)
    convert.export(sae, target, tmp_path / "out", x)
    back = convert.load(tmp_path / "out")
    assert back.W_enc.dtype == torch.float32
    torch.testing.assert_close(back(x), sae(x), rtol=1e-4, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("target", convert.TARGETS)
def test_an_sae_is_loaded_from_a_folder_as_from_a_file(target, tmp_path):
    sae = any_sae("batchtopk", 1)
    convert.export(sae, target, tmp_path / "out", inputs(sae, 1))
    loaded = SAE.load(tmp_path / "out")
    for name, tensor in convert.load(tmp_path / "out").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert SAE.load(str(tmp_path / "out"), device="meta").W_enc.is_meta
    with pytest.raises(UserError, match="holds no SAE"):
        SAE.load(tmp_path)


def test_what_a_target_cannot_express_is_said(tmp_path):
    sae = any_sae("topk", 1)
    notes = convert.export(sae, "saelens", tmp_path / "a", inputs(sae, 1))["notes"]
    assert any("prefix" in note for note in notes)
    assert any("||d_j||" in note for note in notes)
    assert "latents with decoder rows of zeros (1) never fire there" in notes
    sae.about = {}
    notes = convert.export(sae, "saelens", tmp_path / "b", inputs(sae, 1))["notes"]
    assert not any("prefix" in note for note in notes)


def test_saelens_is_told_what_the_run_knows(tmp_path):
    sae = any_sae("relu", 0)
    sae.about |= {"model": "gpt2", "layer": 7, "dataset": "owner/text", "l0": 21.5}
    sae.about |= {"site": "mlp_out", "context": 128, "begin": "always"}
    convert.export(sae, "saelens", tmp_path / "out", inputs(sae, 0))
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["sae_lens_version"].startswith("6.")
    assert metadata["hook_name"] == "blocks.7.hook_mlp_out"
    assert (metadata["context_size"], metadata["prepend_bos"]) == (128, True)
    assert (metadata["model_name"], metadata["dataset_path"]) == ("gpt2", "owner/text")
    assert metadata["l0"] == 21.5
    assert metadata["training_architecture_details"]["widths"] == [4, 10, N_LATENTS]


# -------------------------------------------------------------------------- dictionary_learning


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_prefixes_survive_as_groups(activation, tmp_path):
    sae = any_sae(activation, 0)
    x = inputs(sae, 0).double()
    convert.export(sae, "dictionary-learning", tmp_path / "out", x)
    w = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    assert w["group_sizes"].tolist() == [4, 6, 10]
    w = {name: tensor.double() for name, tensor in w.items()}
    torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.ones(N_LATENTS).double())
    acts = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    acts *= acts > w["threshold"]
    double = sae.with_tensors().double().requires_grad_(False)
    for width in (4, 10, N_LATENTS):
        theirs = acts[:, :width] @ w["W_dec"][:width] + w["b_dec"]
        ours = double.decode(double.encode(x), width)
        assert float((theirs - ours).norm(dim=1).max() / ours.norm(dim=1).max()) <= 1e-6


def test_without_widths_the_plainest_class_is_written(tmp_path):
    expected = {
        "relu": "AutoEncoderNew",
        "topk": "AutoEncoderTopK",
        "batchtopk": "BatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
    }
    for activation, name in expected.items():
        sae = any_sae(activation, 1)
        report = convert.export(sae, "dictionary-learning", tmp_path / activation, inputs(sae, 1))
        config = json.loads((tmp_path / activation / "config.json").read_text())
        assert config["trainer"]["dict_class"] == name
        assert any("cannot decode a prefix" in note for note in report["notes"])


def test_widths_can_be_chosen_for_sampled_prefixes(tmp_path):
    sae = any_sae("relu", 1)
    convert.export(sae, "dictionary-learning", tmp_path / "out", inputs(sae, 1), [1, 5, 20])
    assert convert.load(tmp_path / "out").about["widths"] == [1, 5, 20]


def test_a_width_of_0_is_the_bias_alone_and_no_group(tmp_path):
    sae = any_sae("batchtopk", 0)
    sae.about["widths"] = [0, 4, N_LATENTS]
    convert.export(sae, "dictionary-learning", tmp_path / "out", inputs(sae, 0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["trainer"]["group_sizes"] == [4, N_LATENTS - 4]
    assert convert.load(tmp_path / "out").about == sae.about


@pytest.mark.parametrize("widths", [[5, 4, 20], [0, 20], [4, 10], [4, 4, 20]])
def test_widths_must_rise_to_the_number_of_latents(widths, tmp_path):
    sae = any_sae("relu", 1)
    with pytest.raises(UserError, match="widths must rise"):
        convert.export(sae, "dictionary-learning", tmp_path / "out", inputs(sae, 1), widths)
    assert list(tmp_path.iterdir()) == []


def test_a_batchtopk_sae_with_thresholds_of_its_own_is_written_as_jumprelu(tmp_path):
    sae = any_sae("batchtopk", 1)
    sae.threshold[2] *= 1.5
    convert.export(sae, "dictionary-learning", tmp_path / "out", inputs(sae, 1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    assert convert.load(tmp_path / "out").activation == "batchtopk"


# ------------------------------------------------------- folders that other tools have written


def linear_folder(
    folder: Path, name: str, bias: str, **settings: object
) -> dict[str, torch.Tensor]:
    """A folder of dictionary_learning whose encoder and decoder are linear layers."""
    sae = any_sae("relu", 2)
    rows = torch.nn.functional.normalize(sae.W_dec + 1e-3, dim=1)
    w = {
        "encoder.weight": sae.W_enc.T.detach(),
        "encoder.bias": sae.b_enc.detach(),
        "decoder.weight": rows.T.detach(),
        bias: sae.b_dec.detach(),
    }
    folder.mkdir()
    torch.save({name: t.contiguous() for name, t in w.items()}, folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_MODEL, "dict_size": N_LATENTS, **settings}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return w


@pytest.mark.parametrize(
    ("name", "bias"), [("AutoEncoder", "bias"), ("AutoEncoderNew", "decoder.bias")]
)
def test_linear_autoencoders_are_read(name, bias, tmp_path):
    w = linear_folder(tmp_path / "in", name, bias)
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))
    off = w[bias] if name == "AutoEncoder" else 0
    acts = ((x - off) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    sae = convert.load(tmp_path / "in")
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), acts @ w["decoder.weight"].T + w[bias])


def test_a_topk_autoencoder_is_read_as_topk(tmp_path):
    w = linear_folder(tmp_path / "in", "AutoEncoderTopK", "b_dec", k=3)
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))
    acts = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    top = acts.topk(3)
    sae = convert.load(tmp_path / "in")
    assert (sae.activation, sae.k) == ("topk", 3)
    torch.testing.assert_close(
        sae.encode(x), torch.zeros_like(acts).scatter(1, top.indices, top.values)
    )


def test_sparsify_is_read_as_topk(tmp_path):
    w = linear_folder(tmp_path / "in", "AutoEncoderTopK", "b_dec", k=3)
    other = tmp_path / "sparsify"
    other.mkdir()
    decoder = w["decoder.weight"].T.contiguous()
    tensors = {name: t.contiguous() for name, t in w.items() if name != "decoder.weight"}
    save_file(tensors | {"W_dec": decoder}, other / "sae.safetensors")
    config = {"d_in": D_MODEL, "num_latents": N_LATENTS, "k": 3, "activation": "topk"}
    (other / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(convert.load(other)(x), convert.load(tmp_path / "in")(x))
    for name in ("transcode", "skip_connection"):
        (other / "cfg.json").write_text(json.dumps(config | {name: True}))
        with pytest.raises(UserError, match=name):
            convert.load(other)
    (other / "cfg.json").write_text(json.dumps(config | {"activation": "groupmax"}))
    with pytest.raises(UserError, match="groupmax"):
        convert.load(other)


def test_topk_that_forgets_its_rows_norms_is_refused(tmp_path):
    w = linear_folder(tmp_path / "in", "AutoEncoderTopK", "b_dec", k=3)
    w["decoder.weight"][:, 4] *= 2
    torch.save({name: t.contiguous() for name, t in w.items()}, tmp_path / "in" / "ae.pt")
    with pytest.raises(UserError, match="another SAE"):
        convert.load(tmp_path / "in")


# ------------------------------------------------------------------------------------- bad input


def saelens_folder(folder: Path) -> Path:
    sae = any_sae("jumprelu", 1)
    convert.export(sae, "saelens", folder, inputs(sae, 1))
    return folder


def change_config(folder: Path, **changed: object) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architecture": "gated"}, "'gated' cannot be read here"),
        ({"architecture": "transcoder"}, "'transcoder' cannot be read here"),
        ({"architecture": "standard"}, "contradicts its architecture"),
        ({"architecture": "topk"}, "k must be a number"),
        ({"d_sae": 21}, "21 latents"),
        ({"d_in": "12"}, "d_in must be a whole number"),
        ({"d_sae": None}, "d_sae must be a whole number"),
        ({"d_sae": math.nan}, "d_sae must be a whole number"),
        ({"d_sae": math.inf}, "d_sae must be a whole number"),
        ({"normalize_activations": "expected_average_only_in"}, "the scale of its inputs"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"metadata": {"matryoshka_sae": {"activation": "jumprelu"}}}, "contradicts"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(changed, words, tmp_path):
    folder = saelens_folder(tmp_path / "in")
    change_config(folder, **changed)
    with pytest.raises(UserError, match=words) as raised:
        convert.load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("W_enc", torch.zeros(16, 19), "W_enc is"),
        ("W_dec", torch.zeros(16, 20), "W_dec is"),
        ("b_enc", torch.full((20,), torch.nan), "not finite"),
        ("b_dec", torch.zeros(16, dtype=torch.int32), "must hold floats"),
        ("threshold", torch.zeros(3), "threshold is"),
        ("finetuning_scaling_factor", torch.full((20,), 2.0), "finetuning_scaling_factor"),
    ],
)
def test_tensors_that_cannot_be_right_are_refused(name, tensor, words, tmp_path):
    folder = saelens_folder(tmp_path / "in")
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    with pytest.raises(UserError, match=words):
        convert.load(folder)


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
def test_half_a_folder_is_refused(missing, tmp_path):
    folder = saelens_folder(tmp_path / "in")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"cannot be read|holds no SAE"):
        convert.load(folder)


def test_files_that_are_something_else_are_refused(tmp_path):
    folder = saelens_folder(tmp_path / "in")
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold an object"):
        convert.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        convert.load(folder)
    folder = saelens_folder(tmp_path / "other")
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file"):
        convert.load(folder)
    with pytest.raises(UserError, match="nowhere"):
        convert.load(tmp_path / "nowhere")


class Harmful:
    """What a pickle may do once it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_a_pickle_with_anything_but_tensors_is_refused(tmp_path, capsys):
    linear_folder(tmp_path / "in", "AutoEncoder", "bias")
    for content in ({"encoder.weight": Harmful()}, [torch.zeros(2)], {"k": 3}):
        torch.save(content, tmp_path / "in" / "ae.pt")
        with pytest.raises(UserError, match=r"ae\.pt"):
            convert.load(tmp_path / "in")
    (tmp_path / "in" / "ae.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"ae\.pt"):
        convert.load(tmp_path / "in")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "'GatedAutoEncoder' cannot be read here"),
        ({"dict_size": 21}, "encoder.weight is"),
        ({"dict_class": "BatchTopKSAE", "k": 3}, "b_dec is missing|threshold is missing"),
    ],
)
def test_a_class_that_the_tensors_are_not_of_is_refused(settings, words, tmp_path):
    linear_folder(tmp_path / "in", "AutoEncoder", "bias", **settings)
    with pytest.raises(UserError, match=words):
        convert.load(tmp_path / "in")


def test_k_must_be_the_same_in_both_files(tmp_path):
    sae = any_sae("topk", 1)
    convert.export(sae, "dictionary-learning", tmp_path / "in", inputs(sae, 1))
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    config["trainer"]["k"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="k is 5"):
        convert.load(tmp_path / "in")


@pytest.mark.parametrize("groups", [[4.5, 5.5, 10.0], [4, 0, 16], [4, 16, 1], [[20]]])
def test_groups_of_latents_must_be_whole_and_add_up(groups, tmp_path):
    sae = any_sae("batchtopk", 1)
    convert.export(sae, "dictionary-learning", tmp_path / "in", inputs(sae, 1), [4, 10, N_LATENTS])
    path = tmp_path / "in" / "ae.pt"
    torch.save(torch.load(path) | {"group_sizes": torch.tensor(groups)}, path)
    with pytest.raises(UserError, match=f"groups that add up to {N_LATENTS}"):
        convert.load(tmp_path / "in")


@pytest.mark.parametrize("mean_norm", [math.nan, math.inf, 0.0])
def test_a_mean_norm_that_cannot_be_right_is_refused(mean_norm, tmp_path):
    sae = any_sae("relu", 1)
    convert.export(sae, "dictionary-learning", tmp_path / "in", inputs(sae, 1))
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    config["matryoshka_sae"]["mean_norm"] = mean_norm
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="mean_norm"):
        convert.load(tmp_path / "in")


# -------------------------------------------------------------------------- nothing half written


def test_an_sae_that_is_another_once_read_back_leaves_nothing(tmp_path, monkeypatch):
    sae = any_sae("batchtopk", 1)
    original = saelens_format.weights_of

    def forgets_a_threshold(sae: SAE) -> object:
        weights = original(sae)
        weights.threshold.mul_(0.5)
        return weights

    monkeypatch.setattr(saelens_format, "weights_of", forgets_a_threshold)
    with pytest.raises(UserError, match="is not the same SAE"):
        convert.export(sae, "saelens", tmp_path / "out", inputs(sae, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    folder = saelens_folder(tmp_path / "in")
    before = (folder / "cfg.json").read_bytes()
    sae = any_sae("relu", 2)
    with pytest.raises(UserError, match="is not empty"):
        convert.export(sae, "saelens", folder, inputs(sae, 2))
    assert (folder / "cfg.json").read_bytes() == before
    with pytest.raises(UserError, match="is not empty"):
        convert.export(sae, "saelens", folder / "cfg.json", inputs(sae, 2))


def test_what_no_target_can_hold_is_refused(tmp_path):
    sae = SAE(D_MODEL, N_LATENTS, activation="batchtopk", k=4)
    for target in convert.TARGETS:
        with pytest.raises(UserError, match="train it first"):
            convert.export(sae, target, tmp_path / "out", inputs(sae, 0))
    huge = any_sae("relu", 0)
    huge = huge.with_tensors(b_dec=torch.full((D_MODEL,), 1e38), mean_norm=torch.tensor(1e5))
    for target in convert.TARGETS:
        with pytest.raises(UserError, match="float32 cannot hold"):
            convert.export(huge, target, tmp_path / "out", inputs(huge, 0))
    assert list(tmp_path.iterdir()) == []


def test_classes_of_dictionary_learning_are_those_that_are_written():
    assert set(dictionary_learning_format.ACTIVATIONS) < set(dictionary_learning_format.TENSORS)


def test_a_comparison_is_one_of_every_input():
    """An SAE without one latent differs where that latent fires, and nowhere else."""
    sae, n = any_sae("relu", 3), 600
    x = inputs(sae, 3, n)
    b_enc = sae.b_enc.detach().clone()
    b_enc[0] = -1e9
    comparison = compare(sae, codec(sae.with_tensors(b_enc=b_enc)), x)
    acts = sae.encode(x)
    assert comparison.n_fired == int((acts[:, sae.W_dec.norm(dim=1) > 0] > 0).sum())
    assert comparison.n_different == int((acts[:, 0] > 0).sum()) > 0
    assert comparison.largest_error == 0.0
    assert not comparison.is_same
    error = (x - sae(x)).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert comparison.fvu[0] == pytest.approx(float(error.detach()), rel=1e-4)


def test_a_small_difference_of_the_reconstruction_is_found():
    sae = any_sae("relu", 3)
    x = inputs(sae, 3)
    other = sae.with_tensors(W_dec=sae.W_dec * (1 + 1e-4))
    comparison = compare(sae, codec(other), x)
    assert comparison.n_different == 0
    assert 1e-5 < comparison.largest_error < 1e-3
    assert not comparison.is_same


def test_an_sae_that_says_nothing_is_the_same_as_itself():
    sae = SAE(D_MODEL, N_LATENTS)
    sae = sae.with_tensors(W_dec=torch.zeros(N_LATENTS, D_MODEL))
    assert compare(sae, codec(sae), inputs(sae, 0)).is_same
