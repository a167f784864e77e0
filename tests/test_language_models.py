"""TinyModel by the names that every language model has, and which loader a name goes to."""

from pathlib import Path

import pytest
import torch
from tiny_factory import make_state, write_model

from matryoshka.errors import UserError
from matryoshka.language_models import LanguageModel, load_language_model
from matryoshka.sites import SITES
from matryoshka.tiny_model import BEGIN, PAD, TinyModel


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.from_state_dict(make_state())


TOK_IDS = torch.tensor([[BEGIN, 1, 2, 3, 4], [BEGIN, 5, 6, PAD, PAD]])
IS_REAL = TOK_IDS != PAD


def test_a_tiny_model_has_every_name_of_a_language_model(model: TinyModel) -> None:
    one: LanguageModel = model
    assert (one.d_model, one.d_vocab, one.n_layers, one.max_seq_len) == (32, 10_000, 2, 256)
    assert (one.begin_id, one.pad_id, one.special_ids) == (BEGIN, PAD, {BEGIN, PAD})
    assert one.has_head
    assert one.device == torch.device("cpu")
    assert (one.text_of(7), one.text_of(BEGIN), one.text_of(PAD)) == ("7", "[BEGIN]", "[PAD]")


def test_the_sites_of_a_block_add_up_to_the_stream_it_leaves(model: TinyModel) -> None:
    for layer in range(2):
        pre, post, attn_out, mlp_out = (model.activations(TOK_IDS, layer, site) for site in SITES)
        torch.testing.assert_close(pre + attn_out + mlp_out, post)
        assert torch.equal(pre, model.residual(TOK_IDS, layer))
        assert torch.equal(post, model.residual(TOK_IDS, layer + 1))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_activations_in_their_own_place_change_nothing(
    model: TinyModel, site: str, layer: int
) -> None:
    clean, seen = model(TOK_IDS), []

    def same(acts: torch.Tensor) -> torch.Tensor:
        seen.append(acts)
        return acts

    assert torch.equal(model.log_probs_with(TOK_IDS, layer, site, same), clean)
    assert torch.equal(seen[0], model.activations(TOK_IDS, layer, site))
    changed = model.log_probs_with(TOK_IDS, layer, site, torch.zeros_like)
    assert not torch.allclose(changed, clean, atol=1e-3)


def test_padding_at_the_end_changes_no_token(model: TinyModel) -> None:
    for layer in range(3):
        padded = model.residual(TOK_IDS, layer, IS_REAL)
        alone = model.residual(TOK_IDS[1:, :3], layer)
        torch.testing.assert_close(padded[1:, :3], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="only be padded at their end"):
        model.residual(TOK_IDS, 1, IS_REAL.flip(1))


@pytest.mark.parametrize(
    ("layer", "site", "message"),
    [
        (3, "resid_pre", "layer 3 is not there: this model has 0 to 2"),
        (2, "resid_post", "layer 2 is not there: this model has 0 to 1 with site resid_post"),
        (2, "mlp_out", "layer 2 is not there: this model has 0 to 1 with site mlp_out"),
        (0, "resid", "--site must be one of resid_pre, resid_post, attn_out, mlp_out, got resid"),
    ],
)
def test_a_site_that_is_not_there(model: TinyModel, layer: int, site: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.activations(TOK_IDS, layer, site)
    with pytest.raises(UserError, match=message):
        model.log_probs_with(TOK_IDS, layer, site, torch.zeros_like)


def test_weights_of_a_tiny_model_are_loaded_as_one(tmp_path: Path) -> None:
    file = write_model(tmp_path / "tiny_model.pt")
    for source in (file, tmp_path):
        loaded = load_language_model(source)
        assert isinstance(loaded, TinyModel)
        assert loaded.weights_hash == TinyModel.from_pretrained(file).weights_hash
    with pytest.raises(UserError, match="--model-dtype bfloat16: TinyModel runs in float32 only"):
        load_language_model(file, dtype="bfloat16")
