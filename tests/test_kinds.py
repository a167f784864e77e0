"""The kinds of SAE: what each overrides, and which names are refused."""

import dataclasses

import pytest

from matryoshka.errors import UserError
from matryoshka.kinds import KINDS, check_names, config_of
from matryoshka.trainer_config import TrainerConfig
from train import Config

CONFIG = Config(n_prefixes=7, lr=0.5, seed=3)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_overrides_its_own_settings_and_no_other(name: str) -> None:
    found = config_of(name, CONFIG)
    assert type(found) is Config
    assert dataclasses.asdict(found) == dataclasses.asdict(CONFIG) | KINDS[name]


def test_a_matryoshka_sae_has_the_prefixes_asked_for_and_a_vanilla_one_has_one() -> None:
    assert config_of("matryoshka", CONFIG).n_prefixes == 7
    assert config_of("vanilla", CONFIG).n_prefixes == 1


@pytest.mark.parametrize("name", KINDS)
def test_what_a_kind_overrides_are_settings_of_the_trainer(name: str) -> None:
    assert set(KINDS[name]) <= {field.name for field in dataclasses.fields(TrainerConfig)}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "--saes must name an SAE: matryoshka, vanilla"),
        (("topk",), "--saes topk is not a kind of SAE: choose from matryoshka, vanilla"),
        (("vanilla", "topk"), "--saes topk is not a kind"),
        (("vanilla", "matryoshka", "vanilla"), "--saes names vanilla twice"),
    ],
)
def test_names_that_are_no_kinds_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_names(names)


def test_an_unknown_kind_has_no_settings() -> None:
    with pytest.raises(UserError, match="topk is not a kind of SAE"):
        config_of("topk", CONFIG)
    check_names(tuple(KINDS))
