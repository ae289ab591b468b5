"""`python -m stem_kernels.info`: which backends can run here, and why the others cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .backends import BACKEND_VARIABLE, BACKENDS
from .triton import interpreted


def describe() -> str:
    """The report that `python -m stem_kernels.info` prints."""
    lines = [
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"stem-inversion {_version('stem-inversion')}, torch {torch.__version__}, "
        f"triton {_version('triton')}" + (" (interpreter)" if interpreted() else ""),
        f"{BACKEND_VARIABLE}: {os.environ.get(BACKEND_VARIABLE, 'not set')}",
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
    return "\n".join(lines)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
