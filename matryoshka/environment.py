"""Where a result was made: versions, commit, device, and what decides how sums are rounded."""

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
    """Where a result was made. Every `results.json` has this. It contains no paths.

    It has the versions and the commit of the code; the device and the number of threads; and what
    decides how sums are rounded, and thereby the bits of a seed's result: the CPU, its instruction
    sets, and the variables that restrict them.
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
    """The CPU's name, and those of its instruction sets that arithmetic may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)  # None for an ARM CPU
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    sets = [
        flag
        for flag in (flags[1].split() if flags else [])
        if re.match(r"avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm", flag)
    ]
    return name[1].strip() if name else platform.machine(), sorted(sets)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16.

    Without them, such products take many times as long as in float32. True for a CPU whose
    instruction sets are not known.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instruction_sets = _cpu()[1]
    return not instruction_sets or any("bf16" in name for name in instruction_sets)


@functools.cache
def commit() -> str | None:
    """The git commit of the checkout that this file is in; None if it is not in a checkout.

    It ends in "+changes" if a Python file that git tracks differs from the commit.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside another checkout, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def fix_kernels() -> None:
    """Makes MKL and PyTorch use kernels that every x86-64 CPU with AVX2 has.

    Otherwise they choose kernels by the CPU, and each kernel rounds differently. In the toy's
    40,000 steps a rounding can decide whether a seed finds all features. Call this before the
    first computation, when both libraries read these variables. Processes that are started later
    inherit them, and variables that are already set are kept. A step then takes 1.5 times as long.
    An Intel and an AMD CPU gave different results all the same: see docs/toy_details.md.
    """
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and " avx2 " in cpu_info.read_text(encoding="utf-8"):
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
