"""`python -m stem_kernels.info --check`: every operator on every backend here against float64.

A row is an operator on a device by a backend in a dtype, on one shape of each kind of kernel that
it has; the error shown is the one that is the largest part of its bound. Bounds are those of the
tests: `testing.parity_bound` with the operators' `ROUNDING_ATOL`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..backends import BACKENDS, Backend
from ..shared import forms
from .cases import CASES, Case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Row(NamedTuple):
    """One line of the table; `failed` is what a call raised, or None."""

    operator: str
    device: str
    backend: str
    dtype: str
    error: float
    bound: float
    failed: str | None

    @property
    def wrong(self) -> bool:
        """Whether a kernel is wrong, or could not be run."""
        return self.failed is not None or not self.error <= self.bound

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        if self.failed is not None:
            return *self[:4], "-", "-", f"FAILS: {self.failed}"
        verdict = "WRONG" if self.wrong else "right"
        return *self[:4], f"{self.error:.1e}", f"{self.bound:.1e}", verdict


HEAD = ("operator", "device", "backend", "dtype", "error", "bound", "verdict")


def rows() -> Iterator[Row]:
    """Every operator, device, backend and dtype that can run here, measured one after another."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        usable = [one for one in BACKENDS.values() if not one.machine() and not one.device(device)]
        for operator, cases in CASES.items():
            for dtype in DTYPES:
                serving = [backend for backend in usable if dtype in backend.dtypes]
                if serving:
                    yield from _rows(operator, cases(device, dtype), serving, device, dtype)


def _rows(
    operator: str,
    cases: Iterable[Case],
    serving: list[Backend],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Row]:
    listed = list(cases)
    for backend in serving if listed else ():
        error, bound, failed = 0.0, float("inf"), None
        for case in listed:
            try:
                # Here wrong kernels are shown, not refused.
                with torch.no_grad(), forms.suspended():
                    found = case.judge(case.call(backend.name))
            except (RuntimeError, ValueError, TypeError, OSError) as raised:
                failed = f"{type(raised).__name__}: {raised}".splitlines()[0]
                break
            for ours, most in found:
                if bound == float("inf") or not ours * bound <= error * most:
                    error, bound = ours, most
        name = str(dtype).removeprefix("torch.")
        yield Row(operator, str(device), backend.name, name, error, bound, failed)


def table(found: list[Row]) -> str:
    """The rows as text, and a last line that counts them."""
    lines = [HEAD, *(row.cells() for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    text = [
        "  ".join([*map(str.ljust, line[:-1], widths), line[-1]])  # the verdict may be long
        for line in lines
    ]
    wrong = sum(row.wrong for row in found)
    return "\n".join([*text, f"{len(found)} rows, {wrong} wrong"])
