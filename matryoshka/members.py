"""The SAEs that one training has, each with its name, its kind and its settings."""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka.errors import UserError
from matryoshka.kinds import KINDS, config_of
from matryoshka.trainer_config import TrainerConfig
from matryoshka.training_config import TrainingConfig
from sae import WITH_K

SHARED_SETTINGS = ("n_steps",)  # the same for all SAEs of a training, as they share its batches
MEMBER_SETTINGS = {field.name for field in dataclasses.fields(TrainerConfig)} - {*SHARED_SETTINGS}
MEMBER_SETTINGS |= {"n_latents", "activation"}
RESERVED = ("checkpoint",)  # a file of this name has another meaning in the folder


class Member(NamedTuple):
    """One SAE of a training."""

    name: str  # its file is NAME.safetensors
    kind: str  # a key of KINDS
    config: TrainingConfig  # the training's settings, but for those that are this SAE's own


def members_of(config: TrainingConfig) -> list[Member]:
    """The SAEs that `config` asks for. Raises `UserError` where one is impossible.

    Without a file of members, each is named by its kind, and if there are several target L0s by its
    own, too: "vanilla_l0_20".
    """
    if config.members is not None:
        if len(config.targets) > 1:
            raise UserError("--members names every SAE: --target-l0 takes one value beside it")
        members = [_from_table(table, config) for table in read_tables(Path(config.members))]
    else:
        members = [
            Member(_name(kind, target, config), kind, _own_config(kind, config, target_l0=target))
            for target in config.targets
            for kind in config.saes
        ]
    _check_names([member.name for member in members])
    for member in members:
        _check(member)
    return members


def settings_of(config: TrainingConfig, members: Sequence[Member]) -> dict[str, Any]:
    """The settings as JSON, where "members" has the SAEs of a file of members, not its name."""
    settings = config.as_json()
    if config.members is not None:
        settings["members"] = [
            {"name": name, "kind": kind}
            | {k: v for k, v in own.as_json().items() if k in MEMBER_SETTINGS and v != settings[k]}
            for name, kind, own in members
        ]
    return settings


def _name(kind: str, target: float, config: TrainingConfig) -> str:
    """The name of an SAE that no file of members names."""
    return kind if len(config.targets) == 1 else f"{kind}_l0_{target:g}"


def _own_config(kind: str, config: TrainingConfig, **own: Any) -> TrainingConfig:
    """The settings of one SAE: the training's, overridden by its own and then by its kind's."""
    own = {"target_l0": config.targets[0], **own, "target_l0s": ()}
    return config_of(kind, dataclasses.replace(config, **own))


def _check(member: Member) -> None:
    """Raises `UserError`, which names the SAE, where one of its settings is impossible."""
    config = member.config
    try:
        config.check(config.n_latents, config.batch_size)
        if config.activation in WITH_K and config.target_l0 < 1:
            raise UserError(
                f"{config.activation} takes a --target-l0 of 1 or more, got {config.target_l0:g}"
            )
        if config.activation == "topk" and config.target_l0 % 1:
            raise UserError(f"topk takes a whole number as --target-l0, got {config.target_l0:g}")
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from None


def _check_names(names: Sequence[str]) -> None:
    """Raises `UserError` where a name is there twice, or cannot be that of a file."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"two SAEs are called {name}: an SAE's file is called by its name")
        is_plain = name.isprintable() and len(name) <= 100 and name == Path(name).name
        if not name or name in RESERVED or not is_plain or name[0] == ".":
            raise UserError(f"no SAE's file can be called {name!r}: choose another name")


# ------------------------------------------------------------------------------ a file of members


def read_tables(path: Path) -> list[dict[str, Any]]:
    """The tables [[sae]] of a TOML file, or the list of a JSON file {"sae": [{...}, ...]}.

    Raises `UserError` where the file cannot be read, or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"--members {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise UserError(f"--members {path} is not {kind}: {error}") from None
    tables = content.get("sae") if isinstance(content, dict) and list(content) == ["sae"] else None
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"--members {path} must hold tables [[sae]], one an SAE, and nothing else")
    return tables


def _from_table(table: Mapping[str, Any], config: TrainingConfig) -> Member:
    """The SAE that a table of the file `config.members` describes. Raises `UserError` where a
    setting in it is unknown or impossible."""
    where, settings = f"--members {config.members}", dict(table)
    kind = settings.pop("kind", "matryoshka")
    if kind not in list(KINDS):  # a list, since `kind` may be of a type that cannot be hashed
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    name = settings.pop("name", kind)
    if not isinstance(name, str):
        raise UserError(f"{where}: name must be a string, got {name!r}")
    hints = typing.get_type_hints(TrainingConfig)
    for key, value in settings.items():
        if key not in MEMBER_SETTINGS:
            raise UserError(f"{where}: {key} is no setting of an SAE; there are {_listed()}")
        if key in KINDS[kind]:
            raise UserError(f"{where}: a {kind} SAE has no {key} of its own")
        settings[key] = _of_type(value, hints[key], f"{where}: {key}")
    return Member(name, kind, _own_config(kind, config, **settings))


def _listed() -> str:
    """The settings that a table may have, for an error message."""
    return ", ".join(sorted({"kind", "name", *MEMBER_SETTINGS}))


def _of_type(value: Any, hint: Any, what: str) -> Any:
    """`value`, converted to the type `hint` of a setting. Raises `UserError` where it has another
    type. `what` names the setting in the message."""
    values = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        of_how_many = "" if Ellipsis in values else f" of {len(values)}"
        if not isinstance(value, list) or (of_how_many and len(value) != len(values)):
            raise UserError(f"{what} must be a list{of_how_many}, got {value!r}")
        return tuple(_of_type(part, values[0], what) for part in value)
    if typing.get_origin(hint) is typing.Literal:
        if value not in values:
            raise UserError(f"{what} must be one of {', '.join(values)}, got {value!r}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_finite = is_number and abs(value) < 2**1000
    if hint is float and is_finite:
        return float(value)
    if hint is int and is_finite and value == int(value):
        return int(value)
    expected = "a whole number" if hint is int else "a finite number"
    raise UserError(f"{what} must be {expected}, got {value!r}")
