"""Two results side by side, and which part of a call is compared."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..shared.parity import max_error, parity_bound
from ..shared.spread import spread_tokens
from ..triton.precision import tf32_asked_for

Rounding = dict[torch.dtype, float]

SLACK = 2.0
"""How much more than an operator's parity bound is allowed: a false alarm takes a kernel away."""
ROWS = 512
"""Rows of an attention that are compared."""
CPU_PRODUCTS = 2**26
GPU_PRODUCTS = 2**35
"""Multiplications that a comparison makes at most, twice over."""


class Comparison(NamedTuple):
    """The largest error of one output, and what it may be."""

    output: str
    error: float
    bound: float

    def ratio(self) -> float:
        """The error over its bound; more than 1 is wrong."""
        if self.bound > 0:
            return self.error / self.bound
        return float("inf") if self.error > 0 else 0.0


def compared(
    output: str,
    result: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    rounding: Rounding,
    largest_logit: float = 0.0,
) -> Comparison | None:
    """A result beside the exact one and one that is rounded where kernels round.

    Values that `result`'s dtype has no number for are left out. None where there is nothing but
    zeros to compare.
    """
    kept = exact.to(result.dtype).isfinite()
    result, exact, plain = (part[kept].double() for part in (result, exact, plain))
    if not exact.any():
        return None
    bound = SLACK * parity_bound(exact, plain, {torch.float64: rounding[dtype]}, largest_logit)
    return Comparison(output, max_error(result, exact), bound)


def products(device: torch.device) -> int:
    """Multiplications that a comparison on `device` may take."""
    return CPU_PRODUCTS if device.type == "cpu" else GPU_PRODUCTS


def places(size: int, count: int, device: torch.device) -> torch.Tensor:
    """Up to `count` ascending places in 0 ... size - 1, the first and the last among them."""
    found = spread_tokens(size, max(1, min(size, count)), device)
    if len(found) > 1:
        found[0], found[-1] = 0, size - 1
    return found


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` as operands of a product in `dtype`, in float32."""
    if dtype == torch.float32 and values.is_cuda and tf32_asked_for():
        bits = values.float().view(torch.int32)
        return ((bits + 0x1000) & -0x2000).view(torch.float32)
    return values.to(dtype).float()


def finite(*tensors: torch.Tensor | None) -> bool:
    """Whether all values are numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)
