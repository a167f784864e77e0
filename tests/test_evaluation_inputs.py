"""evaluate.py on models of `transformers` that read text: at any site, with or without a head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_factory import (
    D_VOCAB,
    WORDS,
    make_documents,
    save_model,
    save_tokenizer,
    write_documents,
)

import cache_activations
import evaluate
import train
from matryoshka.cache_config import rows_of
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.evaluation_tables import report
from matryoshka.language_models import load_language_model

CONCEPTS = {"people": {"words": ["girl", "lily", "nobody"]}, "rest": {"words": [*WORDS[:4]]}}
KINDS = {"gpt2": "mlp_out", "bert": "resid_pre"}  # models, each with the site that is cached


def write_cache(world: Path, name: str, split: str, **changed: Any) -> str:
    settings: dict[str, Any] = {
        **{"model": str(world / name), "dataset": str(world / "text"), "split": split},
        **{"layer": 1, "site": KINDS.get(name, "resid_pre"), "context": 16, "tokens": 10**6},
        **{"out": str(world / f"{name}.{split}"), "device": "cpu", "rows_per_shard": 30},
    }
    return str(cache_activations.run(cache_activations.Config(**settings | changed))["out"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their tokenizers, text, caches of it, and an SAE of each."""
    folder = tmp_path_factory.mktemp("world")
    for seed, split in enumerate(("train", "validation")):
        write_documents(folder / "text" / f"{split}.jsonl", make_documents(120, seed))
    (folder / "concepts.json").write_text(json.dumps({"concepts": CONCEPTS}))
    for name in KINDS:
        save_tokenizer(save_model(name, folder), name)
        caches = [write_cache(folder, name, split) for split in ("train", "validation")]
        small: dict[str, Any] = {"n_steps": 30, "batch_size": 128, "device": "cpu"}
        small |= {"n_latents": 24, "n_prefixes": 3, "target_l0": 3.0, "cache": caches[0]}
        train.run(train.Config(**small, out=str(folder / f"{name}.run")))
    return folder


def config_for(world: Path, name: str, out: Path, **changed: Any) -> evaluate.Config:
    usual: dict[str, Any] = {
        **{"run": str(world / f"{name}.run"), "cache": str(world / f"{name}.validation")},
        **{"concepts": str(world / "concepts.json"), "out": str(out), "device": "cpu"},
    }
    return evaluate.Config(**usual | changed)


def test_reconstructions_are_spliced_where_the_activations_were(
    world: Path, tmp_path: Path
) -> None:
    results = evaluate.run(config_for(world, "gpt2", tmp_path))
    cache = ActivationCache(world / "gpt2.validation")
    model = load_language_model(world / "gpt2")
    losses = []
    for block in rows_of(cache.recipe, model).blocks(0, None, 1):
        n = 16 if block.is_real is None else int(block.is_real.sum())
        row = torch.from_numpy(block.tok_ids[:, :n])
        log_probs = model.log_probs_with(row, 1, "mlp_out", lambda acts: acts)
        losses += [-float(log_probs[0, t, row[0, t + 1]]) for t in range(n - 1)]
    assert results["cross_entropy"]["predictions"] == len(losses)
    assert results["cross_entropy"]["replaced"] == cache.n_tokens
    assert results["cross_entropy"]["clean"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert results["left_out"] == {}
    for sae in results["runs"]:
        assert sae["loss_recovered"] is not None
    assert results["cache"]["held_out"] is True


def test_concepts_are_words_of_the_models_tokenizer(world: Path, tmp_path: Path) -> None:
    results = evaluate.run(config_for(world, "gpt2", tmp_path))
    assert results["concepts"] == {"words": 7, "words_left_out": 1}
    assert "Left out, because they are not a single token: 1 of 7 words." in report(results)
    cache, model = ActivationCache(world / "gpt2.validation"), load_language_model(world / "gpt2")
    tok_ids = cache.tokens(0, cache.n_tokens)[0]
    texts = [model.text_of(i) for i in range(D_VOCAB)]
    n_people = sum(texts[i] in (" girl", " lily") for i in tok_ids.tolist())
    people = results["runs"][0]["concepts"][0]
    assert people["tokens"] + people["tokens_chosen_on"] == n_people > 50


def test_an_encoder_is_scored_without_next_tokens(world: Path, tmp_path: Path) -> None:
    results = evaluate.run(config_for(world, "bert", tmp_path))
    reason = f"{world / 'bert'} has no head that predicts next tokens"
    assert results["left_out"] == {"cross_entropy": reason}
    assert results["cross_entropy"] is None
    for sae in results["runs"]:
        assert sae["cross_entropy"] is sae["loss_recovered"] is None
        assert 0 < sae["fvu"] < 2
        assert sae["absorption"] is not None
    assert f"No cross-entropy: {reason}." in report(results)


def refused(config: evaluate.Config) -> str:
    with pytest.raises(UserError) as error:
        evaluate.run(config)
    assert "\n" not in str(error.value)
    assert not (config.out_folder / "evaluation.json").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"site": "attn_out"}, "its site is attn_out, expected mlp_out"),
        ({"layer": 2}, "its layer is 2, expected 1"),
        ({"tokenizer": "other"}, "its tokenizer_hash is "),
        ({"model": "weights"}, "its weights_hash is "),
    ],
)
def test_another_cache_than_was_trained_on_is_refused(
    world: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    save_tokenizer(tmp_path / "other", "llama")
    save_tokenizer(save_model("gpt2", tmp_path), "gpt2").rename(tmp_path / "weights")
    change_weights(tmp_path / "weights")
    for key in changed.keys() & {"tokenizer", "model"}:
        changed = {**changed, key: str(tmp_path / changed[key])}
    cache = write_cache(world, "gpt2", "validation", out=str(tmp_path / "c"), **changed)
    assert named in refused(config_for(world, "gpt2", tmp_path / "out", cache=cache))


def change_weights(folder: Path) -> None:
    """Another step of the model's training, so to say."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.wte.weight"] += 0.01
    save_file(weights, path, {"format": "pt"})


def test_a_model_that_changed_since_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "gpt2", tmp_path / "gpt2")
    change_weights(tmp_path / "gpt2")
    named = refused(config_for(world, "gpt2", tmp_path / "o", model=str(tmp_path / "gpt2")))
    assert "was made with other weights than those of" in named
    assert "--model-revision" in named


def test_the_revision_that_was_cached_is_the_one_that_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, revision: str | None, *rest: Any) -> Any:
        asked.append((name, revision))
        return load_language_model(name, None, *rest)

    cache = write_cache(world, "gpt2", "validation", out=str(tmp_path / "c"))
    manifest = json.loads((Path(cache) / "manifest.json").read_text())
    manifest["make"]["model_revision"] = "step3"
    (Path(cache) / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("matryoshka.evaluation_inputs.load_language_model", load)
    device = torch.device("cpu")
    for changed in ({}, {"model_revision": "main"}):
        config = config_for(world, "gpt2", tmp_path / "o", cache=cache, **changed)
        evaluate.read_inputs(config, device)
    name = str(world / "gpt2")
    assert asked == [(name, "step3"), (name, "main")]


def test_a_model_that_cannot_be_had_says_what_can_be_done_without(
    world: Path, tmp_path: Path
) -> None:
    config = config_for(world, "gpt2", tmp_path / "o", model=str(tmp_path / "nowhere"))
    assert "--model none leaves out what needs the model" in refused(config)
    results = evaluate.run(config_for(world, "gpt2", tmp_path / "o", model="none", concepts=None))
    assert results["left_out"].keys() == {"cross_entropy", "absorption"}
    tokenizer = str(world / "gpt2")
    config = config_for(world, "gpt2", tmp_path / "t", model="none", tokenizer=tokenizer)
    assert evaluate.run(config)["runs"][0]["concepts"]
