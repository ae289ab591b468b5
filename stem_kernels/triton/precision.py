"""How the kernels multiply matrices."""

from __future__ import annotations

import torch

from . import interpreted


def dot_options(dtype: torch.dtype) -> dict[str, str | bool]:
    """The constexpr arguments PRECISION and UPCAST for operands of `dtype`.

    PRECISION "ieee" multiplies float32 in float32; "tf32" where torch was asked for it. UPCAST is
    for bfloat16 in triton 3.7's interpreter, whose dot multiplies the bits of bfloat16 as integers.
    """
    asked = torch.get_float32_matmul_precision() != "highest"
    return {
        "PRECISION": "tf32" if dtype == torch.float32 and asked else "ieee",
        "UPCAST": dtype == torch.bfloat16 and interpreted(),
    }
