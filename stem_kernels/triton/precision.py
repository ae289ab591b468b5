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
        "PRECISION": "tf32" if dtype == torch.float32 and _tf32_asked_for() else "ieee",
        "UPCAST": dtype == torch.bfloat16 and interpreted(),
    }


def _tf32_asked_for() -> bool:
    # torch >= 2.9 has a setting of its own for this, and the older question then raises.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is not None:
        return setting == "tf32"
    return torch.get_float32_matmul_precision() != "highest"
