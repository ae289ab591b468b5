"""How the torch backend cuts its work: by head on a CPU, and by tokens everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# On a CPU each core takes a head, so that its softmax and second product read what it wrote
# itself, and 512 tokens of it against 256 bases: 512 KiB of float32 logits stay in its cache.
# A GPU wants larger launches: 2**22 logits of all heads, 16 MiB.
CPU_LOGITS_PER_HEAD = 2**17
GPU_LOGITS = 2**22
MIN_TOKENS = 16
# A long float32 sum rounds as often as something is added, each time by more. So chunks are added
# up in runs, and the runs' sums after that.
CHUNKS_PER_RUN = 64


def groups(tokens: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the two leading sizes of `tokens`: a head a core on a CPU, else all at once."""
    if tokens.device.type == "cpu":
        # A graph cannot ask for the number of threads.
        tracing = torch.compiler.is_compiling()
        heads = max(1, tokens.shape[1]) if tracing else torch.get_num_threads()
        for batch in range(tokens.shape[0]):
            for head in range(0, tokens.shape[1], heads):
                yield slice(batch, batch + 1), slice(head, head + heads)
    else:
        yield slice(None), slice(None)


def token_chunks(tokens: torch.Tensor, num_bases: int) -> Iterator[slice]:
    """Slices of the token axis of `tokens` [..., n, D] that keep the logits small."""
    n = tokens.shape[-2]
    if tokens.device.type == "cpu":
        size = CPU_LOGITS_PER_HEAD // num_bases
    else:
        size = GPU_LOGITS // max(1, tokens.shape[:-2].numel() * num_bases)
    size = max(MIN_TOKENS, size)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def token_runs(tokens: torch.Tensor, num_bases: int) -> Iterator[list[slice]]:
    """The same slices, in lists of those whose sums are added up first; more where there are more.

    Args:
        tokens: Tokens [..., n, D].
        num_bases: Number K of bases.
    """
    chunks = list(token_chunks(tokens, num_bases))
    size = max(CHUNKS_PER_RUN, math.isqrt(len(chunks)))
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]
