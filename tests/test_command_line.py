"""The command line: settings as flags, one-line errors, tables."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from matryoshka import command_line
from matryoshka.command_line import inherited, setting
from matryoshka.errors import UserError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of no command_line."""

    steps: int = setting(3, "how many")
    share: float = setting(0.5, "a share")
    fast: bool = setting(False, "whether")


def main(
    body: str, *, before: str = "", out: Any = subprocess.PIPE, **settings: str
) -> subprocess.CompletedProcess:
    """A script in a process of its own, whose guarded part is `body`."""
    lines = [
        "import os, signal, sys, unittest.mock",
        "sys.modules['torch'] = unittest.mock.MagicMock()",  # takes seconds, and the guard none
        before,
        "from matryoshka.command_line import main_guard",
        "with main_guard():",
        *(f"    {line}" for line in body.splitlines()),
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=out,
        stderr=subprocess.PIPE,
        timeout=600,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | settings,
    )


@pytest.mark.parametrize("flag", ["--step=5", "--s=5", "--sha=1", "--no-f"])
def test_an_abbreviated_flag_is_unknown(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.parse(Config, "", [flag])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
    assert command_line.parse(Config, "", ["--steps=5", "--fast"]) == Config(steps=5, fast=True)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize(
    "check", [command_line.require_positive, command_line.require_not_negative]
)
def test_what_is_not_finite_is_refused(value: str, check: Any) -> None:
    config = command_line.parse(Config, "", [f"--share={value}"])
    with pytest.raises(UserError, match=r"--share is -?(inf|nan): it must be a finite number"):
        check(config, "steps", "share")


def test_positive_and_not_negative_differ_at_zero() -> None:
    command_line.require_positive(Config(), "steps", "share")
    command_line.require_not_negative(Config(steps=0, share=0.0), "steps", "share")
    with pytest.raises(UserError, match="--steps is 0: it must be positive"):
        command_line.require_positive(Config(steps=0), "share", "steps")
    with pytest.raises(UserError, match=r"--share is -0\.5: it must not be negative"):
        command_line.require_not_negative(Config(share=-0.5), "steps", "share")
    command_line.require_positive(Config(steps=2**63 - 1), "steps")
    with pytest.raises(UserError, match=r"--steps is 10+: it must be below 2\^63"):
        command_line.require_positive(Config(steps=10**400), "steps")


def test_an_ascii_stdout_takes_every_result() -> None:
    done = main("print('0.5 ± 0.1 → 2')", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"0.5 ? 0.1 ? 2\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_results_that_do_not_reach_stdout_are_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = main("print('the result')", out=full)
    assert done.returncode == 2
    assert done.stderr == b"error: stdout cannot be written to (No space left on device)\n"


def test_ctrl_c_is_one_line_even_where_it_was_without_a_word_before() -> None:
    """A script may leave Ctrl-C to the system while it imports torch; the guard takes it back."""
    done = main("os.kill(os.getpid(), signal.SIGINT)\nsignal.pause()")
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")
    quiet = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    done = main("os.kill(os.getpid(), signal.SIGINT)", before=quiet)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_a_narrow_table_has_every_cell_and_fits() -> None:
    headers = ["SAE", *(f"figure {i}" for i in range(11))]
    rows = [[name, *range(11)] for name in ("matryoshka", "vanilla")]
    text = command_line.narrow_table(headers, rows)
    assert max(map(len, text.split("\n"))) <= 80
    parts = [[line.strip("| ").split("|") for line in t.split("\n")] for t in text.split("\n\n")]
    assert len(parts) > 1
    for i, row in enumerate([headers, None, *rows]):
        if row is not None:
            assert [c.strip() for part in parts for c in part[i][1:]] == list(map(str, row[1:]))
            assert {part[i][0].strip() for part in parts} == {row[0]}
    assert command_line.narrow_table(headers[:4], [r[:4] for r in rows]) == command_line.table(
        headers[:4], [r[:4] for r in rows]
    )
    long = command_line.narrow_table(["a", "b"], [["x" * 60, "y" * 60]])
    assert long == command_line.table(["a", "b"], [["x" * 60, "y" * 60]]), "it cannot be narrower"


@pytest.mark.processes
def test_what_is_slow_to_import_is_not_imported_before_it_is_needed() -> None:
    slow = {"transformers", "datasets", "matplotlib", "scipy", "modal"}
    code = f"""
import sys
import browse, cache_activations, evaluate, export, refit, train, train_toy
assert not {slow} & sys.modules.keys(), {slow} & sys.modules.keys()
from matryoshka import plots
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inheriting(Config):
    """Every kind of setting."""

    steps: int = inherited(Config, "steps", default=9, alias="n_steps")
    kind: Literal["a", "b"] = setting("a", "which")
    pair: tuple[float, float] = setting((0.5, 0.9), "two numbers")
    names: tuple[str, ...] = setting(("x",), "any number of names")
    maybe: int | None = setting(None, "a number, or none")
    either: Literal["c", "d"] | None = setting(None, "one of two, or none")
    hidden: int = setting(7, is_flag=False)


def test_every_kind_of_setting_is_a_flag() -> None:
    def parsed(*argv: str) -> Inheriting:
        return command_line.parse(Inheriting, "", argv)

    assert parsed() == Inheriting()
    assert parsed().steps == 9
    assert parsed("--n-steps", "4") == parsed("--steps", "4") == Inheriting(steps=4)
    assert parsed("--kind", "b").kind == "b"
    assert parsed("--pair", "1", "2").pair == (1.0, 2.0)
    assert parsed("--names", "x", "y").names == ("x", "y")
    assert parsed("--maybe", "3").maybe == 3
    assert parsed("--either", "d").either == "d"
    text = command_line.parser_for(Inheriting, "").format_help()
    assert "--hidden" not in text
    for field in dataclasses.fields(Inheriting)[:-1]:
        assert field.metadata["help"] in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--kind", "c"], "--kind"),
        (["--pair", "1"], "--pair"),
        (["--maybe", "some"], "--maybe"),
        (["--either", "e"], "--either"),
        (["--hidden", "1"], "--hidden"),
    ],
)
def test_a_flag_that_cannot_be_parsed_gets_one_line(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.parse(Inheriting, "", argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_a_setting_without_a_default_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        out: str = setting(help="where to")

    with pytest.raises(SystemExit):
        command_line.parse(Needs, "", [])
    assert "--out" in capsys.readouterr().err
    assert command_line.parse(Needs, "", ["--out", "x"]) == Needs("x")
