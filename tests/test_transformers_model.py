"""Models of `transformers` by our names, against what they say of themselves and hooks by name."""

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_factory import CONFIGS, D_VOCAB, HEADLESS, SEQ, save_model

from matryoshka.errors import UserError
from matryoshka.language_models import LanguageModel, load_language_model
from matryoshka.sites import SITES
from matryoshka.tiny_model import hash_of
from matryoshka.transformers_model import NO_LIMIT, TransformersModel, longest_row

CAUSAL = [name for name in CONFIGS if name not in HEADLESS]
# Where each architecture has its blocks, and in a block what adds to the residual stream.
BY_NAME = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "gpt_neox_sequential": ("gpt_neox.layers", "attention", "mlp"),
    "gpt_neo": ("transformer.h", "attn", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
    "opt_post_norm": ("model.decoder.layers", "self_attn", "fc2"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "qwen2": ("model.layers", "self_attn", "mlp"),
    "qwen3": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("model.layers", "self_attn", "mlp"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "bert": ("encoder.layer", "attention.output.dense", "output.dense"),
    "roberta": ("encoder.layer", "attention.output.dense", "output.dense"),
}
TOK_IDS = torch.randint(2, D_VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_model(name, folder))


@pytest.fixture(scope="module")
def load(folder_of: Callable[[str], Path]) -> Callable[[str], TransformersModel]:
    return cache(lambda name: load_language_model(folder_of(name)))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


def own(model: TransformersModel, path: str, run: Callable[[], Any]) -> Any:
    """What the module at `path` returned when the model ran: the hook that a user would write."""
    found = []
    hook = model.model.get_submodule(path).register_forward_hook(lambda *a: found.append(a[2]))
    run()
    hook.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_the_hidden_states(
    load: Callable[[str], TransformersModel], name: str
) -> None:
    model: LanguageModel = load(name)
    hidden = model.model(TOK_IDS, output_hidden_states=True).hidden_states
    assert model.n_layers == len(hidden) - 1 == model.model.config.num_hidden_layers
    assert (model.d_model, model.d_vocab, model.has_head) == (16, D_VOCAB, name not in HEADLESS)
    blocks = BY_NAME[name][0]
    for layer in range(model.n_layers):
        close(model.residual(TOK_IDS, layer), hidden[layer])
        post = own(model, f"{blocks}.{layer}", lambda: model.model(TOK_IDS))
        close(model.activations(TOK_IDS, layer, "resid_post"), post)
    close(model.residual(TOK_IDS, model.n_layers), post)  # before the last norm


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_and_mlp_are_found(load: Callable[[str], TransformersModel], name: str) -> None:
    model = load(name)
    blocks, attention, mlp = BY_NAME[name]
    for layer in range(model.n_layers):
        for site, part in (("attn_out", attention), ("mlp_out", mlp)):
            expected = own(model, f"{blocks}.{layer}.{part}", lambda: model.model(TOK_IDS))
            found = model.activations(TOK_IDS, layer, site)
            close(found, expected.reshape(found.shape))


@pytest.mark.parametrize("name", CAUSAL)
def test_from_a_layer_on_it_predicts_as_a_whole(
    load: Callable[[str], TransformersModel], name: str
) -> None:
    model = load(name)
    expected = model.model(TOK_IDS).logits.log_softmax(dim=-1)
    for layer in range(model.n_layers + 1):
        residual = model.residual(TOK_IDS, layer)
        close(model.forward_from(residual, layer), expected)
        changed = model.forward_from(residual.flip(2), layer)
        assert not torch.allclose(changed, expected, atol=1e-2)
    close(model.model(TOK_IDS).logits.log_softmax(dim=-1), expected)  # nothing is left behind


@pytest.mark.parametrize("name", CAUSAL)
def test_a_replacement_reaches_the_head(
    load: Callable[[str], TransformersModel], name: str
) -> None:
    model = load(name)
    expected = model.model(TOK_IDS).logits.log_softmax(dim=-1)
    for site in SITES:
        seen: list[Tensor] = []
        close(model.log_probs_with(TOK_IDS, 1, site, lambda x: seen.append(x) or x), expected)  # noqa: B023
        close(seen[0], model.activations(TOK_IDS, 1, site))
        zeroed = model.log_probs_with(TOK_IDS, 1, site, torch.zeros_like)
        assert not torch.allclose(zeroed, expected, atol=1e-3)
    without = model.residual(TOK_IDS, 2).flip(2)
    spliced = model.log_probs_with(TOK_IDS, 1, "resid_post", lambda x: x.flip(2))
    close(spliced, model.forward_from(without, 2))


@pytest.mark.parametrize("where", ["left", "right", "both"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_token(
    load: Callable[[str], TransformersModel], name: str, where: str
) -> None:
    model = load(name)
    lengths = (9, 5, 2)
    is_real = torch.zeros(3, 12, dtype=torch.bool)
    for row, n in enumerate(lengths):
        start = {"left": 12 - n, "right": 0, "both": (12 - n) // 2}[where]
        is_real[row, start : start + n] = True
    tok_ids = torch.ones(3, 12, dtype=torch.int64)  # the id of padding
    tok_ids[is_real] = torch.cat([TOK_IDS[row, :n] for row, n in enumerate(lengths)])
    for layer in range(model.n_layers + 1):
        residual = model.residual(tok_ids, layer, is_real)
        for row, n in enumerate(lengths):
            alone = model.residual(TOK_IDS[row : row + 1, :n], layer)[0]
            close(residual[row, is_real[row]], alone)
    if model.has_head:
        log_probs = model.forward_from(model.residual(tok_ids, 1, is_real), 1, is_real)
        for row, n in enumerate(lengths):
            alone = model.forward_from(model.residual(TOK_IDS[row : row + 1, :n], 1), 1)[0]
            close(log_probs[row, is_real[row]], alone)


def test_only_the_blocks_that_are_needed_run(load: Callable[[str], TransformersModel]) -> None:
    model, ran = load("llama"), []
    norms = [f"model.layers.{layer}.input_layernorm" for layer in range(3)]
    model.check_site(1, "attn_out")  # finding a block's parts runs it, once for a layer
    assert model.stream_is_all  # finding that out runs the model, once
    hooks = [
        model.model.get_submodule(name).register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, name in enumerate([*norms, "model.norm"])
    ]
    for site, expected in [("resid_pre", [0]), ("attn_out", [0, 1]), ("resid_post", [0, 1])]:
        model.activations(TOK_IDS, 1, site)
        assert ran == expected
        ran.clear()
    model.forward_from(model.residual(TOK_IDS, 0), 2)
    assert ran == [2, 3]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_the_dtype_that_was_asked_for(
    folder_of: Callable[[str], Path], dtype: str
) -> None:
    model = load_language_model(folder_of("llama"), dtype=dtype)
    hidden = model.model(TOK_IDS, output_hidden_states=True).hidden_states
    residual = model.residual(TOK_IDS, 2)
    assert residual.dtype == getattr(torch, dtype)
    assert torch.equal(residual, hidden[2])
    assert model.activations(TOK_IDS, 2, "mlp_out").dtype == residual.dtype
    expected = model.model(TOK_IDS).logits.float().log_softmax(dim=-1)
    assert torch.equal(model.forward_from(residual.float(), 2), expected)


def test_the_hash_is_of_names_shapes_and_float32_values(
    load: Callable[[str], TransformersModel], folder_of: Callable[[str], Path]
) -> None:
    model = load("gpt2")
    assert model.weights_hash == hash_of(model.model.state_dict())
    assert model.weights_hash == load_language_model(folder_of("gpt2")).weights_hash
    assert (
        model.weights_hash != load_language_model(folder_of("gpt2"), dtype="bfloat16").weights_hash
    )
    assert model.weights_hash != load("phi").weights_hash


def test_weights_that_no_file_holds_are_not_hashed(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a masked language model, BERT's encoder has a pooler of random weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder_of("bert"))
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    hashes = {load_language_model(tmp_path).weights_hash for _ in range(2)}
    assert len(hashes) == 1


# ------------------------------------------------------------------------------ what is refused


def test_an_encoder_says_that_it_has_no_head(load: Callable[[str], TransformersModel]) -> None:
    model = load("bert")
    for ask in (
        lambda: model.forward_from(model.residual(TOK_IDS, 1), 1),
        lambda: model.log_probs_with(TOK_IDS, 1, "resid_pre", lambda x: x),
    ):
        with pytest.raises(UserError, match="BertModel has no head that predicts next tokens"):
            ask()


@pytest.mark.parametrize(
    ("layer", "site", "message"),
    [
        (4, "resid_pre", "layer 4 is not there: this model has 0 to 3"),
        (3, "mlp_out", "layer 3 is not there: this model has 0 to 2 with site mlp_out"),
        (1, "resid_mid", "--site must be one of resid_pre, resid_post, attn_out, mlp_out, got"),
    ],
)
def test_a_site_that_is_not_there(
    load: Callable[[str], TransformersModel], layer: int, site: str, message: str
) -> None:
    for ask in (
        lambda: load("gpt2").activations(TOK_IDS, layer, site),
        lambda: load("gpt2").log_probs_with(TOK_IDS, layer, site, lambda x: x),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_a_row_that_is_too_long(load: Callable[[str], TransformersModel]) -> None:
    with pytest.raises(UserError, match=f"rows of {SEQ + 1} tokens: the model has {SEQ} positions"):
        load("gpt2").residual(torch.ones(1, SEQ + 1, dtype=torch.int64), 1)
    assert load("roberta").max_seq_len == SEQ


def test_the_models_own_limit_counts_and_else_its_tokenizers(
    load: Callable[[str], TransformersModel],
) -> None:
    tokenizer = type("Tokenizer", (), {"model_max_length": 7})()
    assert longest_row(load("gpt2").model, load("gpt2").model.config, tokenizer) == SEQ
    assert longest_row(load("bloom").model, load("bloom").model.config, tokenizer) == 7
    assert longest_row(load("bloom").model, load("bloom").model.config, None) == NO_LIMIT


def test_blocks_that_scale_what_they_add_have_no_parts(tmp_path: Path) -> None:
    import transformers

    config = transformers.GraniteConfig(**CONFIGS["llama"][1], residual_multiplier=0.3)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    model = load_language_model(tmp_path)
    assert model.activations(TOK_IDS, 1, "resid_post").shape == (3, 9, 16)
    with pytest.raises(UserError, match="no attn_out and mlp_out were found: in GraniteDecoder"):
        model.activations(TOK_IDS, 1, "mlp_out")


def test_a_model_without_a_list_of_blocks_says_what_was_found(tmp_path: Path) -> None:
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=D_VOCAB, hidden_size=16, num_attention_heads=2, num_hidden_layers=3
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    message = r"no list of 3 blocks .* in AlbertModel; its lists of modules are encoder.albert_lay"
    with pytest.raises(UserError, match=message):
        load_language_model(tmp_path)


def test_a_model_that_needs_more_than_ids(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=D_VOCAB, d_model=16, d_kv=8, num_layers=1, num_heads=2
    )
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="T5Model does not run on token ids alone"):
        load_language_model(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder_of("llama") / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder_of("llama") / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"lack 1 tensors, such as model.layers.1.mlp.up_proj"):
        load_language_model(tmp_path)


def test_no_code_of_a_model_is_run(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    witness, folder = tmp_path / "it_ran", tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder_of("gpt2") / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Python code of its own, which is run only with --trust-"):
        load_language_model(folder)
    assert not witness.exists()


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return open, (str(self.witness), "w")


def test_pickled_weights_run_no_code(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    (tmp_path / "config.json").write_bytes((folder_of("gpt2") / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"wte": Evil(witness)}))
    with pytest.raises(UserError, match="are a pickle that holds more than tensors: it is not"):
        load_language_model(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["nowhere", "someone/nothing"])
def test_without_a_network_the_ways_out_are_named(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"no language model {name} .*HF_HUB_OFFLINE=1 and HF_HOME"
    ):
        load_language_model(name)
