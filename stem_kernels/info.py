"""`python -m stem_kernels.info`: which backends can run here, and why the others cannot.

With `--check` it runs them all against float64, and ends with status 1 where a kernel is wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import cuda
from .backends import BACKEND_VARIABLE, BACKENDS
from .triton import interpreted
from .verification import VERIFY_VARIABLE, policy


def describe() -> str:
    """The report that `python -m stem_kernels.info` prints."""
    lines = [
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"stem-inversion {_version('stem-inversion')}, torch {torch.__version__}, "
        f"triton {_version('triton')}" + (" (interpreter)" if interpreted() else ""),
        f"{BACKEND_VARIABLE}: {os.environ.get(BACKEND_VARIABLE, 'not set')}",
        f"{VERIFY_VARIABLE}: {policy()}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        lines.append(f"{device} ({name})")
        for backend in BACKENDS.values():
            reasons = backend.machine() or backend.device(device)
            lines.append(f"  {backend.name:<7}{'; '.join(reasons) if reasons else 'usable'}")
    if len(devices) == 1:
        lines.append("no CUDA GPU is visible to torch")
    lines.append("C++ extension")
    for part, info in cuda.build_info().items():
        reason = cuda.load_error(part)
        built = ", ".join(f"{name} {value}" for name, value in info.items() if name != "reason")
        kernels = f" ({cuda.instructions()} kernels)" if part == "cpu" and not reason else ""
        lines.append(f"  {part:<7}{reason or 'loaded' + kernels}")
        lines += [f"         built with {built}"] if built else []
    return "\n".join(lines)


def check() -> tuple[str, bool]:
    """The table that `python -m stem_kernels.info --check` prints, and whether all is right."""
    from .selfcheck import rows, table

    found = list(rows())
    return table(found), not any(row.wrong for row in found)


def provenance(*distributions: str) -> dict[str, Any]:
    """What a file of results says of where it comes from: machine, versions, commit.

    Args:
        distributions: Installed packages to name with their versions, beside torch and triton.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("stem-inversion", "triton", *distributions)
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{name: _version(name) for name in names}},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    first = file.read_text().split("\n\n")[0] if file.is_file() else ""
    fields = [line.partition(":") for line in first.splitlines()]
    found = {name.strip(): value.strip() for name, _, value in fields}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    # Clouds call all of their AMD CPUs "AMD EPYC"; between two of them lies a factor of 1.7.
    named = [f"{name} {found[name]}" for name in ("cpu family", "model") if name in found]
    return found["model name"] + (f" ({', '.join(named)})" if named else "")


def _commit() -> str | None:
    """Commit of this file's checkout, "-dirty" if its code was changed; None if in none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    # What a benchmark writes does not change what the next one measures.
    code = (".", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and changed else commit or None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str]) -> int:
    """Print what was asked for; the exit status."""
    if arguments not in ([], ["--check"]):
        print(f"{' '.join(arguments)}: the only option is --check", file=sys.stderr)
        return 2
    print(describe())
    if not arguments:
        return 0
    text, right = check()
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
