"""The Triton backend. Importing this package imports neither triton nor any kernel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

Probe = TypeVar("Probe", bound=Callable[[], str | None])

MIN_CAPABILITY = (8, 0)
AMD_ARCHITECTURES = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
"""AMD's GPUs for which all kernels were compiled; `configs/` has a table for each."""
OLDEST_TRITON = (3, 6)  # that of the oldest torch; tl.range(disable_licm=...) came with 3.5


_import_errors: list[str | None] = []
_compiler_errors: list[str | None] = []


def _outside_tracing(probe: Probe) -> Probe:
    """Decorates a function that torch.compile is to call, not to trace: it cannot trace imports."""
    # What torch.compiler.assume_constant_result does, which imports all of torch._dynamo.
    probe._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return probe


@_outside_tracing
def import_error() -> str | None:
    """Why triton cannot be imported or is too old, or None where it serves."""
    # A list and not functools.cache, which torch.compile warns about.
    if not _import_errors:
        try:
            import triton

            _import_errors.append(_too_old(triton.__version__))
        except ImportError as error:
            _import_errors.append(
                f"triton cannot be imported ({error}); install it with: pip install triton"
            )
    return _import_errors[0]


def _too_old(version: str) -> str | None:
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"triton is {version}; it needs {oldest} or newer, which newer torch brings"


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@_outside_tracing
def compiler_error() -> str | None:
    """Why triton finds no C compiler, which it makes launchers with, or None where it does."""
    if not _compiler_errors:
        asked = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        missing = f"triton finds no C compiler ({', '.join(asked)}); install gcc, or set CC to one"
        _compiler_errors.append(None if any(map(shutil.which, asked)) else missing)
    return _compiler_errors[0]


def machine_reasons() -> list[str]:
    """Why no call at all can run on this machine."""
    error = import_error() or (None if interpreted() else compiler_error())
    return [error] if error else []


def device_reasons(device: torch.device) -> list[str]:
    """Why tensors on `device` cannot be served."""
    if interpreted():
        return []
    if device.type != "cuda":
        return [f"tensors are on {device}; it needs a CUDA GPU (or TRITON_INTERPRET=1, for tests)"]
    amd = amd_architecture(device)
    if amd is not None:
        if amd in AMD_ARCHITECTURES:
            return []
        served = ", ".join(AMD_ARCHITECTURES)
        return [
            f"{device} is {amd}; of AMD's GPUs it serves {served}, as for others no kernel was "
            "compiled yet, and tiles that fit one may not fit another"
        ]
    capability = device_capability(device)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return [f"{device} has compute capability {have}; it needs {need} or newer"]
    return []


def auto_reasons(device: torch.device) -> list[str]:
    """Why `backend="auto"` passes it over on `device` though it can run there."""
    if device.type == "cuda" and not interpreted() and amd_architecture(device) is not None:
        return [
            "no GPU of AMD's has run its kernels yet, they were only compiled for it; "
            'backend="triton" tries them'
        ]
    return []


def max_widths(device: torch.device) -> Mapping[str, int]:
    """The largest last sizes of tensors by their argument's name."""
    return {"query": 512, "query_target": 512, "query_source": 512, "value": 512}


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make that the tensor's, or one that rounds as GPUs."""
    if interpreted():
        from .rounding import rounded_bfloat16

        return rounded_bfloat16()
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def amd_architecture(device: torch.device) -> str | None:
    """The name of an AMD GPU's architecture, such as "gfx942"; None with a torch for others."""
    if torch.version.hip is None:
        return None
    name: str = torch.cuda.get_device_properties(device).gcnArchName
    return name.partition(":")[0]  # features, such as "sramecc+", follow


def device_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability (major, minor) of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
