"""Which queries a program of the window's kernel takes, and which keys in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ...shared.grid import Grid
from ..program import Layout

LARGEST_HEAD = 128
"""Channels of a head up to which there are kernels."""
KEY_COST = 1.5
"""What a key of the window takes beside a base: three products of d channels in place of two."""


class Patch(NamedTuple):
    """Rows and columns of places whose queries a program has, and in how many frames.

    Its keys are those places and the border around them, of `key_frames` frames in a step; or of
    one, in `parts` steps, where they are more than a tile has.
    """

    rows: int
    columns: int
    query_frames: int
    key_frames: int
    parts: int

    def tiles(self, grid: Grid) -> tuple[int, int, int]:
        """Numbers of patches along frames, rows and columns."""
        sizes = zip(grid, (self.query_frames, self.rows, self.columns), strict=True)
        frames, rows, columns = (-(-size // own) for size, own in sizes)
        return frames, rows, columns


def patch_for(
    grid: Grid, reach: tuple[int, int], block_m: int, block_n: int, others: int, tail: bool
) -> Patch:
    """The patch with the fewest products, of padded tiles.

    Args:
        grid: Frames, height and width.
        reach: Places of the window to each side, down and across.
        block_m: Number of queries in a tile.
        block_n: Number of keys in a tile.
        others: Number of keys that every query sees besides.
        tail: Whether the last step may have fewer frames than the others.
    """

    def cost(patch: Patch) -> tuple[float, int]:
        steps = -(-grid[0] // patch.key_frames) * patch.parts
        # A step's worth for what a program takes at its begin and end.
        keys = others + KEY_COST * (steps + 1) * block_n
        return math.prod(patch.tiles(grid)) * keys, patch.parts

    return min(_patches(grid, reach, block_m, block_n, tail), key=cost)


def _patches(
    grid: Grid, reach: tuple[int, int], block_m: int, block_n: int, tail: bool
) -> Iterator[Patch]:
    frames, height, width = grid
    for rows in range(1, min(height, block_m) + 1):
        for columns in range(1, min(width, block_m // rows) + 1):
            query_frames = _even(frames, block_m // (rows * columns))
            places = (rows + 2 * reach[0]) * (columns + 2 * reach[1])
            parts = -(-places // block_n)
            most = 1 if parts > 1 else min(frames, block_n // places)
            key_frames = _even(frames, most)
            if not tail:
                key_frames = max(size for size in range(1, most + 1) if frames % size == 0)
            yield Patch(rows, columns, query_frames, key_frames, parts)


def _even(size: int, most: int) -> int:
    """The least part of `size` that takes no more parts than one of `most`."""
    parts = -(-size // min(size, most))
    return -(-size // parts)


def needs_64_bits(*layouts: Layout) -> bool:
    """Whether places inside a head are beyond 32 bits."""
    return any(
        layout.shape[-2] * layout.stride(-2) + layout.shape[-1] * layout.stride(-1) >= 2**31
        for layout in layouts
    )
