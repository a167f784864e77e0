"""The kinds of SAE by name, each with the settings that it changes."""

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
    """`config` with the settings of kind `name`. Raises `UserError` if there is no such kind."""
    if name not in KINDS:
        raise UserError(f"{name} is not a kind of SAE: choose from {', '.join(KINDS)}")
    return dataclasses.replace(config, **KINDS[name])


def check_names(names: Sequence[str], flag: str = "--saes") -> None:
    """Raises `UserError` if there are no names, or a name is unknown or occurs twice."""
    if not names:
        raise UserError(f"{flag} must name an SAE: {', '.join(KINDS)}")
    for i, name in enumerate(names):
        if name not in KINDS:
            raise UserError(f"{flag} {name} is not a kind of SAE: choose from {', '.join(KINDS)}")
        if name in names[:i]:
            raise UserError(f"{flag} names {name} twice: each SAE's file has the SAE's name")
