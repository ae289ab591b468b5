"""Errors that say that memory is lacking, of all who raise them."""

from __future__ import annotations

import torch

# Of torch's allocator for CPUs (on Linux, on Windows), of CUDA's and HIP's calls and Triton's
# launches, and of cuBLAS and cuDNN: RuntimeErrors, of which only the text tells.
_SAID = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory was lacking, on a CPU or a GPU.

    Args:
        error: Error that a computation raised.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)
