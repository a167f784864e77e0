"""A comparison's settings, handed through; its name, and whose folder it is."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from matryoshka import comparison as parts
from matryoshka.cache_config import CacheConfig
from matryoshka.comparison import Comparison, parse
from matryoshka.errors import UserError
from train_tinystories import Config


def of(*words: str, **settings: Any) -> Comparison:
    """The comparison of these flags."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    return parse([*words, *flags], Config)


def test_the_defaults_are_the_scripts() -> None:
    comparison = of()
    own = {"resume": True, "checkpoint_seconds": 60.0}  # a checkpoint is committed to a Volume
    assert comparison.training == dataclasses.replace(Config(), **own)
    assert comparison.cache == CacheConfig()
    assert comparison.validation == CacheConfig(split="validation", tokens=500_000)


def test_every_flag_reaches_its_script_and_no_two_are_one() -> None:
    """A flag that training and a cache both had would reach only one of them."""
    of_cache = {f.name for f in dataclasses.fields(CacheConfig)} - {*parts.NOT_OF_CACHE}
    of_training = {f.name for f in dataclasses.fields(Config)} - {*parts.NOT_OF_TRAINING}
    assert "members" in of_training
    own = {f.name for f in dataclasses.fields(parts.ComparisonConfig)}
    assert not of_cache & of_training
    assert not own & (of_cache | of_training)
    flags = {f.name for f in dataclasses.fields(parts.flags_of(Config))}
    assert flags == of_cache | of_training | own
    words = "--layer 2 --tokens 12345 --batch-size 13 --cache-batch-size 7 --lr 0.5 --seed 4"
    comparison = of(*words.split(), *["--saes", "vanilla", "--model-revision", "r"])
    cache, training = comparison.cache, comparison.training
    assert (cache.layer, cache.tokens, cache.batch_size, cache.model_revision) == (
        *(2, 12345, 7, "r"),
    )
    assert (training.batch_size, training.lr, training.seed, training.saes) == (
        *(13, 0.5, 4, ("vanilla",)),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "--tokens"),
        ({"validation_tokens": 0}, "--validation-tokens is 0"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"cache_batch_size": 0}, "--cache-batch-size is 0"),
        ({"n_prefixes": 4000}, "--n-prefixes 4000 is more than there are latents"),
        ({"tokens": 1000}, "--batch-size 1024 is more than --tokens 1000"),
        ({"layer": -1}, "--layer is -1"),
        ({"name": "../else"}, "--name must be at most 64 letters.*got ../else"),
        ({"checkpoint_seconds": -1}, "--checkpoint-seconds is -1"),
        ({"dtype": "int8"}, "--dtype"),
        ({"step": 3}, "--step"),
        ({"members": "nowhere.toml"}, "--members nowhere.toml cannot be read"),
        ({"activation": "topk", "target_l0": 0.5}, "topk takes a --target-l0 of 1 or more"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of(**settings)


def test_the_default_name_is_made_of_what_shapes_an_sae() -> None:
    name = of().name
    assert name.startswith("30000000tokens-3072x10-l0_30-30000steps-")
    assert of(seeds=3, checkpoint_every=1, checkpoint_seconds=2, cache_batch_size=3).name == name
    assert of(lr=2e-3).name != name
    assert of(layer=2).name != name
    assert of(validation_tokens=7).name != name
    assert of(name="mine").name == "mine"


def test_several_target_l0s_of_a_kind_are_trained_in_one_pass(tmp_path: Path) -> None:
    comparison = of(*["--target-l0", "10", "20", "40", "--saes", "vanilla", "matryoshka"])
    assert comparison.kinds == [("vanilla", ("vanilla",)), ("matryoshka", ("matryoshka",))]
    assert comparison.training.targets == (10, 20, 40)
    assert "-l0_10_20_40-" in comparison.name
    (tmp_path / "saes.toml").write_text('[[sae]]\nkind = "vanilla"\ntarget_l0 = 3')
    assert len(of(members=tmp_path / "saes.toml").kinds) == 1


def test_a_recipe_changes_defaults_and_not_what_is_given() -> None:
    training = of(*["--recipe", "paper", "--lr", "0.5"]).training
    assert (training.activation, training.batch_size, training.lr) == ("batchtopk", 2048, 0.5)
    assert of("--recipe", "paper").name != of().name


def test_what_is_sent_to_a_container_can_be_sent(tmp_path: Path) -> None:
    job = parts.TrainJob(Config(), {"cache": "validation"})
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_name_is_for_one_comparison(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    parts.claim(run, of().shape)
    parts.claim(run, of(seeds=3).shape)
    with pytest.raises(UserError, match=r"--name mine was a comparison with --lr 0.001, not 0.5"):
        parts.require_same_shape(run, of(lr=0.5).shape)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"colour": "red"}), "--colour red, not a version that has no such setting"),
        ("{", "config.json is damaged"),
        ("[1]", "config.json is damaged"),
    ],
)
def test_a_folder_of_another_version_or_a_damaged_one(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        parts.claim(tmp_path, of().shape)
    assert (tmp_path / "config.json").read_text() == content


def test_a_larger_cache_is_trained_on_in_part(tmp_path: Path, monkeypatch: Any) -> None:
    class Record:
        n_tokens = 2_000

    monkeypatch.setattr(parts, "read_record", lambda path: Record)
    for tokens, asked in ((1_500, 1_500), (2_000, 0), (3_000, 0)):
        comparison = of(tokens=tokens, seeds=2, seed=5)
        jobs = parts.train_jobs(comparison, tmp_path / "run", tmp_path, {"cache": "v"})
        assert [(job.config.saes, job.config.seed) for job in jobs] == [
            (("matryoshka",), 5), (("vanilla",), 5), (("matryoshka",), 6), (("vanilla",), 6),
        ]  # fmt: skip
        assert {job.config.tokens for job in jobs} == {asked}
        assert len({job.thing for job in jobs}) == 4
