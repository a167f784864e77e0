"""Where a result was made: versions, the commit, the device, what decides how sums are rounded."""

import functools
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was made; goes into every `results.json`. No path of the machine is in it.

    Versions and the code's commit, device and threads, and what decides how sums are rounded: the
    CPU, its instruction sets, and what was asked of them. A seed's bits depend on these.
    """
    on_gpu = device.type == "cuda"
    cpu, instruction_sets = _cpu()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "instruction_sets": instruction_sets,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ.get(name) for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")},
    }


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and which of the instruction sets that arithmetic may use it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)  # an ARM CPU gives none
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [
        flag
        for flag in (flags[1].split() if flags else [])
        if re.match(r"avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm", flag)
    ]
    return name[1].strip() if name else platform.machine(), sorted(sets)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16; without, they take many times a
    float32 product's time. True for a CPU that does not say what it has."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instruction_sets = _cpu()[1]
    return not instruction_sets or any("bf16" in name for name in instruction_sets)


@functools.cache
def commit() -> str | None:
    """The git commit of the checkout that this file is in; None where it is in none.

    "+changes" follows where a Python file that git tracks is not the commit's.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not the checkout around an installed copy
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def fix_kernels() -> None:
    """Asks for kernels of matrix products and vectors that every x86-64 CPU with AVX2 has.

    MKL and PyTorch choose their kernels by the CPU, each with a rounding of its own, and in the
    toy's 40,000 steps a rounding decides whether a seed finds all features. Both read these
    variables when they first compute something, so this must come before that; processes born
    later inherit them. It costs half of a step's time again. Variables that are set already are
    left alone. An Intel and an AMD CPU ended apart all the same: see docs/toy_details.md.
    """
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and " avx2 " in cpu_info.read_text():
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
