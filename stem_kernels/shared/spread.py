"""Which tokens stand for all of them."""

from __future__ import annotations

import torch

GOLDEN = 2654435769  # 2^32 / golden ratio, rounded to odd: its multiples fill 0 ... 2^32 evenly


def spread_tokens(
    num_tokens: int, count: int, device: torch.device, *, other: bool = False
) -> torch.Tensor:
    """Token indices, one from each of `count` equal stretches.

    Within its stretch an index lies where the golden ratio's multiples put it. An even stride
    would do worse: rows of a feature map are often powers of two wide, and it then sees one column.

    Args:
        num_tokens: Number n of tokens, at least 1.
        count: Number of indices; where it exceeds n, tokens come more than once.
        device: Device of the result; the indices are the same on every device.
        other: Whether each index lies half a stretch from where it would be otherwise. What a
            start of as many bases says of the tokens that it took does not hold for all tokens.

    Returns:
        int64 [count], ascending, distinct where count <= n.
    """
    stretch = torch.arange(count + 1, device=device)
    edges = stretch * num_tokens // count
    place = (stretch[:-1] * GOLDEN + (2**31 if other else 0)) % 2**32
    offset = (place * edges.diff()) >> 32
    return edges[:-1] + offset
