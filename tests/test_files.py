"""Files that are whole, and folders with one writer."""

import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from matryoshka import files
from matryoshka.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), safetensors.SafetensorError("No space")],
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, failure: Exception
) -> None:
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def fill(part: Path) -> None:
        part.write_text("half")
        raise failure

    with pytest.raises(UserError, match=r"cannot write .*/results\.json \(No space"):
        files.write_atomically(path, fill)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing half written stays"


def test_a_folder_where_a_file_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/results\.json \(Is a directory\)"):
        files.write_json(tmp_path / "results.json", {})
    with pytest.raises(UserError, match=r"cannot write .*/nowhere/a\.json \(No such file"):
        files.write_json(tmp_path / "nowhere" / "a.json", {})


def test_a_written_file_has_the_mode_that_the_system_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        files.one_writer(tmp_path),
        pytest.raises(UserError, match=f"--out {tmp_path}: another process is writing there"),
        files.one_writer(tmp_path),
    ):
        pytest.fail("two writers")
    with files.one_writer(tmp_path, "--volume"):
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
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    entered = False
    with files.one_writer(tmp_path):
        entered = True
    assert entered
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path} cannot be locked (")
    assert said.count("\n") == 1


@pytest.mark.processes
def test_scripts_import_where_there_is_no_fcntl() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None; from matryoshka import files; "
        "assert files.fcntl is None"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_json_has_a_line_a_key_and_a_line_an_item() -> None:
    value = {"config": {"a": 1, "b": [1, 2]}, "runs": [{"sae": "x"}, {"sae": "y"}], "empty": []}
    text = files.json_text(value)
    assert json.loads(text) == value
    assert len(text.splitlines()) == 2 + len(value) - 1 + len(value["runs"]) + 2
    assert json.loads(files.json_text([{"a": 1}, {"a": 2}])) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="JSON compliant"):
        files.json_text({"a": float("nan")})


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    """Without an encoding the locale's is used, which may be another where a file is read."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("matryoshka/**/*.py"),
        *ROOT.glob("studies/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node)
                is_text = node.func.attr in ("read_text", "write_text") or (
                    node.func.attr == "open"
                    and call.endswith((".open('a')", ".open('w')", ".open()"))
                )
                if is_text and "encoding='utf-8'" not in call:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {call}")
    assert found == []
