"""Kinds of SAE by name: the settings in which each differs from those that were asked for."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from matryoshka.errors import UserError
from matryoshka.trainer_config import TrainerConfig

KINDS: dict[str, dict[str, Any]] = {
    "matryoshka": {},
    "vanilla": {"n_prefixes": 1, "widths": (), "width_weights": ()},
}

AnyConfig = TypeVar("AnyConfig", bound=TrainerConfig)


def config_of(name: str, config: AnyConfig) -> AnyConfig:
    """`config` for the kind `name`. Raises `UserError` where there is none of that name."""
    if name not in KINDS:
        raise UserError(f"{name} is no kind of SAE: there are {', '.join(KINDS)}")
    return dataclasses.replace(config, **KINDS[name])


def check_names(names: Sequence[str], flag: str = "--saes") -> None:
    """Raises `UserError` where a name is unknown, is there twice, or there is none at all."""
    if not names:
        raise UserError(f"{flag} must name an SAE: {', '.join(KINDS)}")
    for i, name in enumerate(names):
        if name not in KINDS:
            raise UserError(f"{flag} {name} is no kind of SAE: there are {', '.join(KINDS)}")
        if name in names[:i]:
            raise UserError(f"{flag} names {name} twice: an SAE's file is called by its name")
