"""What a result says of where it was made."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from matryoshka import environment

ROOT = Path(__file__).parents[1]


def test_a_result_says_which_cpu_and_code_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    made = environment.environment(torch.device("cpu"))
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
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: arm)
    name, sets = environment._cpu()
    assert name
    assert sets == ["asimd", "bf16", "sve"]

    def missing(self: Path, encoding: str) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    name, sets = environment._cpu()
    assert name
    assert sets == []


def test_only_a_cpu_that_names_its_instructions_is_said_to_lack_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for sets, expected in (
        (["avx2", "fma"], False),
        (["avx2", "avx512_bf16"], True),
        (["amx_bf16"], True),
        (["asimd", "bf16"], True),
        ([], True),
    ):
        monkeypatch.setattr(environment, "_cpu", lambda sets=sets: ("a CPU", sets))
        assert environment.multiplies_bfloat16(cpu) == expected, sets


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
        environment.commit.cache_clear()
        return environment.commit()

    package = tmp_path / "package"
    package.mkdir()
    copy = shutil.copy(ROOT / "matryoshka" / "environment.py", package / "environment.py")
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(environment, "__file__", str(copy))
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
        environment.commit.cache_clear()
