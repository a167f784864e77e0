"""How the notebook shows text, tables and figures, and which command made what they show."""

import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import IPython.display
import PIL.Image

import train_tinystories
import train_toy
from matryoshka.errors import UserError
from matryoshka.kinds import KINDS
from studies import ablate_toy, tables

# Settings that say where files are or how the work is shared, not what is computed.
NOT_SHOWN = {"out", "overwrite", "cache", "device", "workers", "resume", "checkpoint_every"}
CONFIGS: dict[str, Any] = {
    "train_toy.py": train_toy.Config,
    "train_tinystories.py": train_tinystories.Config,
    "-m studies.ablate_toy": ablate_toy.Config,
}


def text(*paragraphs: str | Callable[[], str]) -> None:
    """Shows Markdown, or what functions return as such; one line in place of absent results."""
    shown = [p if isinstance(p, str) else or_absence(p) for p in paragraphs]
    IPython.display.display(IPython.display.Markdown("\n\n".join(shown)))


def or_absence(function: Callable[[], str]) -> str:
    """What `function` returns, or which file of results/ it lacks."""
    try:
        return function()
    except UserError as error:
        return f"*{error}*"


def figure(draw: Callable[..., None], *args: Any, alt: str) -> None:
    """Shows the figure that `draw(path, *args)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        try:
            draw(path, *args)
        except UserError as error:
            text(f"*{error}*")
        else:
            png(path, alt)


def png(path: Path, alt: str) -> None:
    """Shows a figure at half its pixels; in 256 colours it has a third of the bytes."""
    palette = PIL.Image.open(path).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    buffer = io.BytesIO()
    palette.save(buffer, "png", optimize=True)
    IPython.display.display(IPython.display.Image(buffer.getvalue(), width=830, alt=alt))


# --------------------------------------------------------------------------- where numbers are from


def made_by(name: str, program: str) -> str:
    """The commands that made a file of results/, from the settings in it, and where that was."""
    return or_absence(lambda: _made_by(name, program))


def _made_by(name: str, program: str) -> str:
    sources = tables.read(name)["sources"]
    lines = [f"`results/{name}`: {tables.where(name)}"]
    for source in sources:
        took = f", {source['seconds']:.0f} s" if "seconds" in source else ""
        lines.append(f"- `{command(source['config'], program)}`{took}")
    return "\n".join(lines)


def command(config: dict[str, Any], program: str) -> str:
    """The command line that has the settings of a recorded `config`."""
    recorded = with_todays_names(config, program)
    flags = [
        flag(field.name, recorded[field.name])
        for field in dataclasses.fields(CONFIGS[program])
        if field.name in recorded and field.name not in NOT_SHOWN
        if not is_default(field, recorded)
    ]
    return " ".join(["python", program, *flags])


def is_default(field: "dataclasses.Field[Any]", recorded: dict[str, Any]) -> bool:
    """Whether a setting was left alone. The toy's n_latents is recorded as it was filled in."""
    value = recorded[field.name]
    filled_in = field.name == "n_latents" and "n_eval" in recorded
    return filled_in or value == field.default or value == list_of(field.default)


def list_of(value: Any) -> Any:
    """As JSON has it: a tuple is a list there."""
    return list(value) if isinstance(value, tuple) else value


def flag(name: str, value: Any) -> str:
    name = "target_l0" if name == "target_l0s" else name
    words = [f"--{name.replace('_', '-')}"]
    if value is False:
        words = [f"--no-{name.replace('_', '-')}"]
    elif value is not True:
        values = value if isinstance(value, list) else [value]
        words += [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return " ".join(words)


def with_todays_names(config: dict[str, Any], program: str) -> dict[str, Any]:
    """Recorded settings under the names, and with the values, that they have today."""
    recorded, known = dict(config), CONFIGS[program].__dataclass_fields__
    for name, todays in (("steps", "n_steps"), ("products", "matmul_dtype")):
        if name in recorded and name not in known:
            recorded[todays] = recorded.pop(name)
    if "dense" in recorded:
        recorded["gradient"] = "dense" if recorded.pop("dense") else "auto"
    if "sae" in recorded:
        sae = recorded.pop("sae")
        recorded["saes"] = list(KINDS) if sae == "both" else [sae]
    if "target_l0s" in known and "target_l0" in recorded:
        recorded.setdefault("target_l0s", [recorded["target_l0"]])
        del recorded["target_l0"]
    tree = f"studies/trees/{Path(str(recorded.get('tree'))).name}"  # a kept file has its name alone
    if (tables.ROOT / tree).is_file():
        recorded["tree"] = tree
    return recorded


def measured_by(part: str) -> str:
    """As `made_by`, of a part of studies.bench."""
    name = f"bench/{part}.json"
    words = f"`results/{name}`: `python -m studies.bench --part {part}`"
    return or_absence(lambda: f"{words}, {tables.where(name)}")
