"""The seat of the CUDA C++ extension, which is not written yet."""

from __future__ import annotations


def machine_reasons() -> list[str]:
    """Why no call at all can run on this machine."""
    return ["the C++ extension is not built: this version of the package does not have one yet"]
