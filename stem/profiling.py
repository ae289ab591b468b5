"""NVTX ranges, for profilers. Without the package nvtx they cost one comparison."""

from __future__ import annotations

import contextlib
import importlib.util
from contextlib import AbstractContextManager

import torch

_NVTX_INSTALLED = importlib.util.find_spec("nvtx") is not None
_NO_RANGE = contextlib.nullcontext()


def nvtx_range(name: str) -> AbstractContextManager[object]:
    """A range named `name` in the domain "stem"; nothing without nvtx or while compiling."""
    if not _NVTX_INSTALLED or torch.compiler.is_compiling():
        return _NO_RANGE
    import nvtx

    return nvtx.annotate(name, domain="stem")
