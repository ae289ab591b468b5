"""How the kernels multiply matrices."""

from __future__ import annotations

import torch

from . import interpreted


def dot_options(dtype: torch.dtype) -> dict[str, str | bool]:
    """The constexpr arguments PRECISION and UPCAST for operands of `dtype`.

    PRECISION "ieee" multiplies float32 in float32; "tf32" where torch was asked for it. UPCAST is
    for bfloat16 in triton 3.7's interpreter, whose dot multiplies the bits of bfloat16 as integers.
    """
    return {
        "PRECISION": "tf32" if dtype == torch.float32 and tf32_asked_for() else "ieee",
        "UPCAST": dtype == torch.bfloat16 and interpreted(),
    }


def tf32_asked_for() -> bool:
    """Whether torch was asked to multiply float32 in TF32, on GPUs that have it: not AMD's."""
    setting: str = torch.backends.cuda.matmul.fp32_precision
    return setting == "tf32" and torch.version.hip is None


def weight_unit(dtype: torch.dtype) -> float:
    """What responsibilities are multiplied by before they are rounded to `dtype` for a product.

    In float16 those below 2^-25 would be 0 in the sums and count in the mass; times 2^15, a power
    of two that 1 is far from overflowing with, only those below 2^-40 are. Sums and mass are both
    in this unit until the bases' update.
    """
    return 2.0**15 if dtype == torch.float16 else 1.0
