"""bfloat16 in Triton's interpreter, which cuts bits off where GPUs round: its mistake, put right.

The kernels and what is compiled of them stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def rounded_bfloat16() -> Iterator[None]:
    """Inside, float32 becomes bfloat16 by rounding to the nearest, ties to even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    before = InterpreterBuilder.cast_impl

    def cast(builder: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return before(builder, source, dtype)
        # The upper half of the bits, plus one where the lower half is more than half of it.
        bits = source.data.view(np.uint32)
        upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        upper = np.where(np.isnan(source.data), 0x7FC0, upper)
        return TensorHandle(upper.astype(np.uint16), dtype.scalar)

    InterpreterBuilder.cast_impl = cast
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl = before
