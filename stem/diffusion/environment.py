"""What the last bits of a computation depend on beside its settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from stem_kernels import cuda

logger = logging.getLogger("stem")


def numeric_environment(device: torch.device) -> dict[str, str]:
    """Name and value of everything outside the settings that bits depend on.

    Sums are split over threads and vector registers, so their order, and with it the rounding,
    changes with the number of threads and the kind of processor.

    Args:
        device: Device that the UNet runs on.
    """
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
        if before.get(name) != now.get(name)
    ]
    if changed:
        logger.warning(
            "%s was begun under other conditions (%s): what is computed now differs in its last "
            "bits from what an uninterrupted run would have given",
            path,
            ", ".join(changed),
        )
