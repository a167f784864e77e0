"""What latents do to output tokens of a model that has a last norm. The rest is in test_browse."""

import pytest
import torch
from run_factory import random_sae
from transformers_factory import save_model

from matryoshka.language_models import load_language_model
from matryoshka.latent_data import output_effects, similar_latents


@pytest.mark.parametrize(
    ("name", "norm", "head"),
    [("gpt2", "transformer.ln_f", "lm_head"), ("llama", "model.norm", "lm_head")],
)
def test_outputs_go_through_the_last_norm_and_the_head(tmp_path, name, norm, head):
    model = load_language_model(save_model(name, tmp_path))
    own, sae = model.model, random_sae(n_latents=70, d_model=16)
    direction = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    with torch.inference_mode():
        norm, head = own.get_submodule(norm), own.get_submodule(head)
        effects = head(norm(direction)) - head(norm(torch.zeros_like(direction)))
    effects = effects - effects.mean(1, keepdim=True)
    found = output_effects(sae, model)
    best, worst = effects.topk(10, dim=1), (-effects).topk(10, dim=1)
    torch.testing.assert_close(torch.from_numpy(found.promoted_by), best.values)
    torch.testing.assert_close(torch.from_numpy(found.suppressed_by), -worst.values)
    assert found.promoted[:, 0].tolist() == best.indices[:, 0].tolist()
    assert found.counts.sum(1).tolist() == [effects.shape[1]] * 70


def test_neighbours_do_not_count_themselves_and_zero_rows_do_no_harm():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.0]])
    found, cosines = similar_latents(rows, rows, 5, True)
    assert found.shape == (3, 2)
    assert found[0].tolist() == [1, 2]
    assert cosines[2].tolist() == [0, 0]
    found, _ = similar_latents(rows, rows[:1], 5, False)
    assert found[:, 0].tolist() == [0, 0, 0]
