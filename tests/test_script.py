"""What scripts share: settings, one-line errors, files that are whole, where a result was made."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import script
from script import UserError, setting

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of no script."""

    steps: int = setting(3, "how many")
    share: float = setting(0.5, "a share")
    fast: bool = setting(False, "whether")


def main(body: str, *, out: Any = subprocess.PIPE, **settings: str) -> subprocess.CompletedProcess:
    """A script in a process of its own, whose guarded part is `body`."""
    lines = [
        "import os, signal, sys",
        "import script",
        "with script.main_guard():",
        *(f"    {line}" for line in body.splitlines()),
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=out,
        stderr=subprocess.PIPE,
        timeout=120,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | settings,
    )


# ---------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("flag", ["--step=5", "--s=5", "--sha=1", "--no-f"])
def test_an_abbreviated_flag_is_unknown(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.parse(Config, "", [flag])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
    assert script.parse(Config, "", ["--steps=5", "--fast"]) == Config(steps=5, fast=True)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize("check", [script.require_positive, script.require_not_negative])
def test_what_is_not_finite_is_refused(value: str, check: Any) -> None:
    config = script.parse(Config, "", [f"--share={value}"])
    with pytest.raises(UserError, match=r"--share is -?(inf|nan): it must be a finite number"):
        check(config, "steps", "share")


def test_positive_and_not_negative_differ_at_zero() -> None:
    script.require_positive(Config(), "steps", "share")
    script.require_not_negative(Config(steps=0, share=0.0), "steps", "share")
    with pytest.raises(UserError, match="--steps is 0: it must be positive"):
        script.require_positive(Config(steps=0), "share", "steps")
    with pytest.raises(UserError, match=r"--share is -0\.5: it must not be negative"):
        script.require_not_negative(Config(share=-0.5), "steps", "share")
    script.require_positive(Config(steps=2**63 - 1), "steps")
    with pytest.raises(UserError, match=r"--steps is 10+: it must be below 2\^63"):
        script.require_positive(Config(steps=10**400), "steps")


# ----------------------------------------------------------------------------------------- output


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
    quiet = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    code = f"{quiet}\nimport os, script\nwith script.main_guard(): os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_waits_and_a_second_one_does_not(number: int) -> None:
    before = signal.getsignal(number)
    with script.deferring_signals() as caught:
        os.kill(os.getpid(), number)
        assert caught == [number]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_narrow_table_has_every_cell_and_fits() -> None:
    headers = ["SAE", *(f"figure {i}" for i in range(11))]
    rows = [[name, *range(11)] for name in ("matryoshka", "vanilla")]
    text = script.narrow_table(headers, rows)
    assert max(map(len, text.split("\n"))) <= 80
    parts = [[line.strip("| ").split("|") for line in t.split("\n")] for t in text.split("\n\n")]
    assert len(parts) > 1
    for i, row in enumerate([headers, None, *rows]):
        if row is not None:
            assert [c.strip() for part in parts for c in part[i][1:]] == list(map(str, row[1:]))
            assert {part[i][0].strip() for part in parts} == {row[0]}
    assert script.narrow_table(headers[:4], [r[:4] for r in rows]) == script.table(
        headers[:4], [r[:4] for r in rows]
    )
    long = script.narrow_table(["a", "b"], [["x" * 60, "y" * 60]])
    assert long == script.table(["a", "b"], [["x" * 60, "y" * 60]]), "it cannot be narrower"


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), safetensors.SafetensorError("No space")],
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, failure: Exception
) -> None:
    path = tmp_path / "results.json"
    script.write_json(path, {"a": 1})

    def fill(part: Path) -> None:
        part.write_text("half")
        raise failure

    with pytest.raises(UserError, match=r"cannot write .*/results\.json \(No space"):
        script.write_atomically(path, fill)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing half written stays"


def test_a_folder_where_a_file_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/results\.json \(Is a directory\)"):
        script.write_json(tmp_path / "results.json", {})
    with pytest.raises(UserError, match=r"cannot write .*/nowhere/a\.json \(No such file"):
        script.write_json(tmp_path / "nowhere" / "a.json", {})


def test_a_written_file_has_the_mode_that_the_system_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        script.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        script.one_writer(tmp_path),
        pytest.raises(UserError, match=f"--out {tmp_path}: another process is writing there"),
        script.one_writer(tmp_path),
    ):
        pytest.fail("two writers")
    with script.one_writer(tmp_path, "--volume"):
        pass  # the first one's lock went with it


@pytest.mark.parametrize("system", ["no fcntl", "flock refused"])
def test_without_locks_a_line_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if system == "no fcntl":
        monkeypatch.setattr(script, "fcntl", None)
    else:
        monkeypatch.setattr(script.fcntl, "flock", refuse)
    entered = False
    with script.one_writer(tmp_path):
        entered = True
    assert entered
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path} cannot be locked (")
    assert said.count("\n") == 1


def test_scripts_import_where_there_is_no_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import script; assert script.fcntl is None"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# ------------------------------------------------------------------------- where a result was made


def test_a_result_says_which_cpu_and_code_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    made = script.environment(torch.device("cpu"))
    assert made["MKL_CBWR"] == "COMPATIBLE"
    assert made["ATEN_CPU_CAPABILITY"] is None
    assert made["torch_cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert made["cpu"]
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert set(made["instruction_sets"]) <= set(flags)
        assert ("avx2" in made["instruction_sets"]) == ("avx2" in flags)
        assert "smep" not in made["instruction_sets"], "that one is no arithmetic"
    assert str(ROOT) not in json.dumps(made)


def test_an_arm_cpu_and_a_system_without_proc_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = "processor\t: 0\nFeatures\t: fp asimd crc32 sve bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda self: arm)
    name, sets = script._cpu()
    assert name
    assert sets == ["asimd", "bf16", "sve"]

    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    name, sets = script._cpu()
    assert name
    assert sets == []


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_commit_is_that_of_the_checkout_and_changes_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *name, "-C", str(tmp_path), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def found() -> str | None:
        script.commit.cache_clear()
        return script.commit()

    package = tmp_path / "package"
    package.mkdir()
    copy = shutil.copy(ROOT / "script.py", package / "script.py")
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(script, "__file__", str(copy))
    try:
        assert found() is None, "no checkout"
        git("init", "-q")
        git("add", "results.json")
        git("commit", "-q", "-m", "without it")
        assert found() is None, "a checkout, but of other code"
        git("add", "package")
        git("commit", "-q", "-m", "with it")
        head = git("rev-parse", "HEAD")
        assert found() == head
        (tmp_path / "results.json").write_text("[]")
        assert found() == head, "what a run writes is no change of the code"
        copy.write_text("changed")
        assert found() == head + "+changes"
        monkeypatch.setenv("PATH", "")
        assert found() is None, "no git"
    finally:
        script.commit.cache_clear()
