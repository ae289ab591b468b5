"""What a user is told of a kernel that is wrong or cannot be launched."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .. import cuda
from ..backends import Tensors
from .comparison import Comparison


def said(op: str, backend: str, tensors: Tensors, wrong: Comparison | Exception) -> str:
    """What is wrong, on what, where, and how to report it."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(present.values())).device
    if isinstance(wrong, Comparison):
        what = (
            f"gave wrong results: its {wrong.output} is off by {wrong.error:.3g} from the torch "
            f"backend's, and {wrong.bound:.3g} is allowed"
        )
    else:
        what = f"could not be launched: {type(wrong).__name__}: {wrong}"
    shapes = ", ".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in present.items()
    )
    return (
        f"{op}: the kernel of backend {backend} {what}\n"
        f"  on {shapes}\n"
        f"  {where(device)}\n"
        "  Please report this with the output of `python -m stem_kernels.info --check`. "
        "STEM_KERNELS_VERIFY=never runs such kernels unchecked."
    )


def where(device: torch.device) -> str:
    """The device, and the versions of what made its kernels."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    else:
        name = f"{platform.machine()}, {cuda.instructions() or 'no'} kernels of the extension"
    runtime = torch.version.hip or torch.version.cuda
    versions = {
        "stem-inversion": _version("stem-inversion"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA or ROCm": runtime or "none",
        "python": platform.python_version(),
    }
    return f"{device} ({name}); " + ", ".join(f"{one} {of}" for one, of in versions.items())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
