"""What all scripts share: command lines, errors of one line, and tables.

A script's settings are a frozen dataclass whose fields are made by `setting`. `parse` turns a
command line into an instance of it, and `--help` shows every flag with its default. Bad input
raises `UserError`, which `main_guard` turns into one line on stderr and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from matryoshka.environment import commit
from matryoshka.errors import Interrupted, UserError
from matryoshka.process import in_main_thread

Config = typing.TypeVar("Config")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    alias: str | None = None,
    flag: str | None = None,
    is_flag: bool = True,
) -> Any:
    """A dataclass field that is also a command-line flag, with its default and its help text.

    flag: the flag's name, if it is not the field's; alias: a second name of the flag; is_flag:
    False means that the field has no flag.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "metavar": metavar}
    metadata |= {"alias": alias, "flag": flag, "is_flag": is_flag}
    return dataclasses.field(default=default, metadata=metadata)


def inherited(config_class: Any, name: str, **changes: Any) -> Any:
    """The setting `name` of another dataclass, with some of the arguments of `setting` changed."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return setting(**({"default": field.default, **field.metadata} | changes))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints descriptions as they are written, and every default that is not empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, (), "")
        return super()._get_help_string(action) if has_default else action.help


class _Parser(argparse.ArgumentParser):
    """Writes one line to stderr if a command line cannot be parsed."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows every flag)\n")


def parser_for(config_class: type, description: str) -> argparse.ArgumentParser:
    """An argparse parser with one flag for each field of `config_class`: `--n-latents`, say.

    A bool field has two flags, `--name` and `--no-name`. A field of type `X | None` takes an X, a
    `Literal` field takes one of its values, and a tuple field takes several values. Flags cannot be
    abbreviated: `--step` does not stand for `--steps`.
    """
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.metadata["is_flag"]:
            continue
        first = field.metadata["flag"] or field.name
        names = [name for name in (first, field.metadata["alias"]) if name]
        flags = ["--" + name.replace("_", "-") for name in names]
        parser.add_argument(*flags, **_argument(field, hints[field.name]))
    return parser


def _argument(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field of type `hint`."""
    is_required = field.default is dataclasses.MISSING
    common: dict[str, Any] = {"dest": field.name, "help": field.metadata["help"]}
    common |= {"required": True} if is_required else {"default": field.default}
    if types.NoneType in typing.get_args(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if hint is bool:
        return common | {"action": argparse.BooleanOptionalAction}
    values = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return common | {"type": type(values[0]), "choices": values}
    if typing.get_origin(hint) is tuple:
        variable = Ellipsis in values
        common |= {"nargs": "+" if variable else len(values), "action": _Tuple}
        return common | {"type": values[0], "metavar": values[0].__name__.upper()}
    choices = field.metadata["choices"]
    metavar = field.metadata["metavar"] or (None if choices else hint.__name__.upper())
    return common | {"type": hint, "choices": choices, "metavar": metavar}


class _Tuple(argparse.Action):
    """Stores several values as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def parse(
    config_class: type[Config],
    description: str,
    argv: Sequence[str] | None,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """The `config_class` that a command line describes. Exits with code 2 if it cannot be parsed.

    argv: the words of the command line; None: those of this process. recipes: for each value of
    --recipe, the defaults that replace the fields' own.
    """
    parser = parser_for(config_class, description)
    arguments = parser.parse_args(argv)
    if recipes is not None:
        parser.set_defaults(**recipes[arguments.recipe])
        arguments = parser.parse_args(argv)
    return config_class(**vars(arguments))


@contextlib.contextmanager
def main_guard() -> Iterator[None]:
    """Turns `UserError` into one line on stderr and exit code 2, and Ctrl-C into a line and 130.

    Characters that stdout's encoding lacks are printed as "?". A stdout that cannot be written to
    is a `UserError`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # While it imported torch, a script may have let Ctrl-C end it without a word.
    if in_main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        commit()  # kept from here on, because the checkout may change while the script runs
        yield
        _flush_stdout()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(130)


def _flush_stdout() -> None:
    """Raises `UserError` if what was printed cannot be written: a full disk, a closed pipe."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes again at exit
        raise UserError(f"stdout cannot be written to ({error.strerror})") from None


def require_positive(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of `names` whose value is not finite or not above 0."""
    require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def require_recipe(config: Any, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `UserError` if a config names a recipe but has less than a third of its settings.

    The command line fills in the recipe's settings. In Python they must be given.
    """
    settings = recipes[config.recipe]
    n_there = sum(getattr(config, name) == value for name, value in settings.items())
    if 3 * n_there < len(settings):
        raise UserError(
            f"--recipe {config.recipe} has only {n_there} of its {len(settings)} settings: leave "
            f"it out (in Python, a recipe is Config(**RECIPES['{config.recipe}']))"
        )


def require_not_negative(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of `names` whose value is not finite or below 0."""
    require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")


def require_finite(config: Any, *names: str) -> None:
    """Raises `UserError` naming the first of the settings `names` that is NaN, infinite, or an
    integer too large for 64 bits."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be below 2^63")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be a finite number")


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises `UserError` if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name} is not there ({reason}); try --device cpu") from None
    return device


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table that is also Markdown; all but the first column are right-aligned."""
    cells = [list(map(str, headers)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return "\n".join([line(cells[0]), rule + "|", *map(line, cells[1:])])


def narrow_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int = 80) -> str:
    """Like `table`, but for a terminal: as several tables if one would be wider than `width`.

    The tables are one below another, and each begins with the first column.
    """
    groups: list[list[int]] = [[0]]
    for i in range(1, len(headers)):
        wider = [*groups[-1], i]
        fits = len(_columns(headers, rows, wider).split("\n")[0]) <= width
        if fits or len(wider) == 2:
            groups[-1] = wider
        else:
            groups.append([0, i])
    return "\n\n".join(_columns(headers, rows, group) for group in groups)


def _columns(headers: Sequence[str], rows: Sequence[Sequence[object]], which: list[int]) -> str:
    """`table` of the columns whose numbers are `which`."""
    return table([headers[i] for i in which], [[row[i] for i in which] for row in rows])
