"""The least time that an operator can take: what it must do over what the machine can do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import time_call

EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor, on every GPU served


@dataclass(frozen=True)
class Work:
    """What an operator cannot avoid.

    Args:
        flops: Operations of matrix products, 2 per multiply and add.
        exponentials: Number of them, one per token and base.
        bytes: Traffic, every input read once and every output written once.
    """

    flops: float
    exponentials: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What a machine does in a second.

    Args:
        flops: Operations in a large matrix product of the dtype at hand, measured.
        exponentials: Number of them, on a GPU counted, multiprocessors x 16 x clock; on a CPU
            measured.
        bytes: Traffic of a large copy, read and written, measured.
    """

    flops: float
    exponentials: float
    bytes: float

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds that `work` takes at least, and which of the ceilings says so."""
        seconds = {
            "matrix": work.flops / self.flops,
            "exponentials": work.exponentials / self.exponentials,
            "bytes": work.bytes / self.bytes,
        }
        limit = max(seconds, key=lambda name: seconds[name])
        return seconds[limit], limit


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure this machine."""
    on_gpu = device.type == "cuda"
    side, count = (8192, 2**28) if on_gpu else (1024, 2**24)
    left = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(left)
    matrix = _warm_seconds(lambda: torch.mm(left, left, out=product), device)
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = _warm_seconds(lambda: target.copy_(source), device)
    return Ceilings(
        flops=2 * side**3 / matrix,
        exponentials=_gpu_exponentials(device) if on_gpu else _cpu_exponentials(device),
        bytes=8 * count / copy,
    )


def _warm_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of a call that is not the first: that one also starts a library."""
    work()
    return time_call(work, device=device).median


def _gpu_exponentials(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device)
    hertz = 1e6 * (_highest_megahertz(str(properties.uuid)) or properties.clock_rate / 1e3)
    return properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * hertz


def _highest_megahertz(uuid: str) -> int | None:
    """The clock that nvidia-smi says a GPU can reach; None where it says none, as "[N/A]"."""
    query = ["nvidia-smi", "--query-gpu=uuid,clocks.max.sm", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return None
    # Its numbers are not torch's: it lists what CUDA_VISIBLE_DEVICES hides, too.
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    clocks = dict(line.split(", ", 1) for line in said.splitlines() if ", " in line)
    found = clocks.get(f"GPU-{uuid}", "").strip()
    return int(found) if found.isdecimal() else None


def _cpu_exponentials(device: torch.device) -> float:
    numbers = torch.rand(2**16, device=device)
    out = torch.empty_like(numbers)
    return len(numbers) / _warm_seconds(lambda: torch.exp(numbers, out=out), device)
