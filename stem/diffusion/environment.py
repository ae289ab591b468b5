"""What the last bits of a computation depend on beside its settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stem_kernels import cuda

from .pipeline import execution_device
from .weights import ON_A_DISK, offloading

logger = logging.getLogger("stem")

_OFFLOADING = "offloading"


def numeric_environment(pipeline: Any) -> dict[str, str]:
    """Name and value of everything outside the settings that bits depend on.

    Sums are split over threads and vector registers, so their order, and with it the rounding,
    changes with the number of threads and the kind of processor.

    Args:
        pipeline: Pipeline that runs, of diffusers.
    """
    device = execution_device(pipeline)
    found = {
        "threads": str(torch.get_num_threads()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        found["extension"] = cuda.instructions() or "none"
    found[_OFFLOADING] = offloading(pipeline)
    if getattr(pipeline.vae, "use_tiling", False):
        found["vae"] = "tiled"
    return found


def warn_of_differences(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn where a run that goes on would have other last bits than one that was never stopped.

    Args:
        path: Path of what is gone on with, for the message.
        before: Environment of the part that is done.
        now: Environment of this process.
    """
    changed = [
        f"{name} {before.get(name, 'not recorded')} -> {now.get(name, 'not recorded')}"
        for name in sorted(before.keys() | now.keys())
        if not _of_equal_bits(name, before, now)
    ]
    if changed:
        logger.warning(
            "%s was begun under other conditions (%s): what is computed now differs in its last "
            "bits from what an uninterrupted run would have given",
            path,
            ", ".join(changed),
        )


def _of_equal_bits(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    if name != _OFFLOADING or "gpu" in now:
        return name == _OFFLOADING or before.get(name) == now.get(name)
    # Weights that are read from files lie elsewhere in memory, by which a CPU sums small layers.
    return (ON_A_DISK in before.get(name, "")) == (ON_A_DISK in now[name])
