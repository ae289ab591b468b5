"""The compiled C++ extension: its CUDA part on GPUs, its CPU part on CPU tensors.

Two objects, built by setup.py, lie beside this package: `_ext_cpu.so` declares the operators of
`torch.ops.stem_kernels_ext` and implements them for CPUs, `_ext_cuda.so` implements them for GPUs
and is loaded only where torch has CUDA. Both are loaded when this module is imported, because
torch.compile cannot trace a load; neither initialises CUDA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..shared import forms

FOLDER = Path(__file__).parent.parent
BUILD_COMMAND = "pip install --no-deps ."
OPERATORS = (
    "basis_attention", "blended_attention", "em_statistics", "nearest_token", "partial_attention",
    "projected_attention", "soft_em", "video_attention", "window_attention",
)  # fmt: skip
MIN_CAPABILITY = (8, 0)
CONTIGUOUS = torch.contiguous_format
GPU_WIDTHS = {
    "features": 1280, "payload": 1280,
    "query": 160, "query_target": 160, "query_source": 160, "value": 160,
}  # fmt: skip


class Image(NamedTuple):
    """What the CUDA part was compiled for, "8.6" or "8.6+PTX": the capability, and whether there
    is PTX of it, which drivers compile for any newer GPU."""

    name: str
    capability: tuple[int, int]
    ptx: bool

    @classmethod
    def of(cls, name: str) -> Image:
        """The image of one architecture of the build's record."""
        major, minor = name.removesuffix("+PTX").split(".")
        return cls(name, (int(major), int(minor)), name.endswith("+PTX"))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU runs it: machine code serves later ones of the same major number, too."""
        same = self.capability[0] == capability[0]
        return self.capability <= capability and (same or self.ptx)


def build_info(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    """What setup.py wrote of each part, "cpu" and "cuda": how it was built, or the `reason`."""
    path = folder / "_build_info.json"
    if not path.is_file():
        missing = {"reason": "setup.py has not run"}
        return {"cpu": missing, "cuda": missing}
    found: dict[str, dict[str, str]] = json.loads(path.read_text())
    return found


def load(part: str, folder: Path = FOLDER) -> str | None:
    """Load the object of "cpu" or "cuda". Returns why it cannot be used, or None where it can."""
    info = build_info(folder)[part]
    if part == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA, which the C++ extension's cuda part needs"
    if "reason" in info:
        reason = f"{info['reason']} (to build it, in the source tree: {BUILD_COMMAND})"
        return f"the C++ extension's {part} part is not built: {reason}"
    path = folder / f"_ext_{part}.so"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch names only the file; what was wrong with it is the cause.
        return (
            f"{path.name} cannot be loaded: {error.__cause__ or error} "
            f"(built with torch {info['torch']}, this is {torch.__version__}); "
            f"build it again, in the source tree, with: {BUILD_COMMAND}"
        )
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.stem_kernels_ext, name)]
    if lacking:
        return (
            f"{path.name} lacks {', '.join(lacking)}: it was built from older sources; "
            f"build it again, in the source tree, with: {BUILD_COMMAND}"
        )
    return None


_load_errors = {"cpu": load("cpu")}
# The CPU part holds the operators' schemas, so there is no loading the other without it.
_load_errors["cuda"] = _load_errors["cpu"] or load("cuda")
_images = tuple(map(Image.of, build_info()["cuda"].get("architectures", "").split()))


def load_error(part: str) -> str | None:
    """Why the object of "cpu" or "cuda" is not loaded, or None where it is."""
    return _load_errors[part]


def machine_reasons() -> list[str]:
    """Why no call at all can run on this machine."""
    error = load_error("cpu")
    return [error] if error else []


def missed() -> str | None:
    """Why CPU tensors are not served here, where its kernels would be faster than torch's."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return load_error("cpu")
    return None


def device_reasons(device: torch.device) -> list[str]:
    """Why tensors on `device` cannot be served."""
    if device.type == "cpu":
        return []
    if device.type != "cuda":
        return [f"tensors are on {device}; it takes CPU and CUDA tensors"]
    error = load_error("cuda")
    if error:
        return [error]
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return [f"{device} has compute capability {have}; it needs {need} or newer"]
    # Records of older builds name none.
    if _images and not any(image.runs_on(capability) for image in _images):
        have, built = ".".join(map(str, capability)), ", ".join(image.name for image in _images)
        return [
            f"{device} has compute capability {have}; its kernels were compiled for {built}; build "
            f"it again, in the source tree, with: TORCH_CUDA_ARCH_LIST={have} {BUILD_COMMAND}"
        ]
    return []


def max_widths(device: torch.device) -> Mapping[str, int]:
    """The largest last sizes of tensors by their argument's name. The CPU part takes any."""
    return GPU_WIDTHS if device.type == "cuda" else {}


# Asked once, because torch.compile cannot trace an operator that returns a string.
_instructions = "" if load_error("cpu") else torch.ops.stem_kernels_ext.cpu_instructions()


def instructions() -> str:
    """Which of its kernels the CPU part takes here: "avx512", "avx2" or "baseline"."""
    return _instructions


def auto_reasons(device: torch.device) -> list[str]:
    """Why `backend="auto"` passes it over on `device` though it can run there."""
    if device.type == "cpu" and instructions() == "baseline":
        return ["its kernels for this CPU are not known to be faster than torch's"]
    return []


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied only where its last dimension is not contiguous."""
    # Not contiguous(), which leaves the strides of what has no elements as they are.
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=CONTIGUOUS)


def enter(
    op: str, tensor: torch.Tensor, like: torch.Tensor, num_bases: int, flags: object = None
) -> None:
    """Tell of the form of a launch (see `shared.forms`): the device, dtype and width of `tensor`,
    the width of `like`, and what else selects a kernel."""
    if not torch.compiler.is_compiling():
        form = (
            tensor.get_device(), op, "cuda", tensor.dtype, tensor.size(-1), like.size(-1),
            num_bases, flags,
        )  # fmt: skip
        forms.enter(form)
