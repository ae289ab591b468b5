"""How the torch backend cuts its work: by head on a CPU, and by tokens everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# 2**18 logits in float32 are 1 MiB: 1,024 tokens against 256 bases, and their softmax, stay in
# the cores' caches. A GPU wants larger launches: 2**22 (16 MiB).
CPU_LOGITS = 2**18
GPU_LOGITS = 2**22
MIN_TOKENS = 16


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32: what logits, softmax and sums are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def groups(tokens: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the two leading sizes of `tokens`: each head alone on a CPU, else all at once."""
    if tokens.device.type == "cpu":
        for batch in range(tokens.shape[0]):
            for head in range(tokens.shape[1]):
                yield slice(batch, batch + 1), slice(head, head + 1)
    else:
        yield slice(None), slice(None)


def token_chunks(tokens: torch.Tensor, num_bases: int) -> Iterator[slice]:
    """Slices of the token axis of `tokens` [..., n, D] that keep the logits small."""
    n = tokens.shape[-2]
    rows = tokens.shape[:-2].numel() * num_bases
    budget = CPU_LOGITS if tokens.device.type == "cpu" else GPU_LOGITS
    size = max(MIN_TOKENS, budget // rows)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
