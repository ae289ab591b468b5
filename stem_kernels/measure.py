"""Peak memory of a piece of work, on a GPU or of the process."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from types import TracebackType

import torch

logger = logging.getLogger("stem_kernels")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager: how far memory rose above where it stood on entry.

    On a CUDA device, bytes that torch's allocator handed out. On a CPU, the process's resident
    set (Linux): pages that the allocator had kept from earlier work are returned first, so that
    reusing them counts.

    Args:
        device: Device whose memory is measured.

    Attributes:
        extra_bytes: Peak above the start, in bytes; None where this system does not tell.
        what: Quantity measured, for a table's heading.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.extra_bytes: int | None = None
        on_gpu = self.device.type == "cuda"
        self.what = "CUDA memory allocated" if on_gpu else "resident set of the process"
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            if hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)
            try:
                _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
                self._start = _status_bytes("VmRSS")
            except OSError as error:  # some sandboxes hide these files
                logger.info("peak memory is not measured: %s", error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.extra_bytes = torch.cuda.max_memory_allocated(self.device) - (self._start or 0)
        elif self._start is not None:
            self.extra_bytes = max(0, _status_bytes("VmHWM") - self._start)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")
