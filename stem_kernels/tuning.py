"""Tile sizes of the Triton kernels, read from `configs/`."""

from __future__ import annotations

import functools
import json
from importlib import resources

from .triton import interpreted

MIN_TILE = 16


def tiles(op: str) -> dict[str, int]:
    """The tile sizes and launch options of one operator; the caller may change the copy.

    `default.json` is safe on every GPU that is served. In the interpreter a program costs
    milliseconds whatever its size, so `interpreter.json` has few and large ones.
    """
    return dict(_table("interpreter" if interpreted() else "default")[op])


@functools.cache
def _table(name: str) -> dict[str, dict[str, int]]:
    text = resources.files("stem_kernels").joinpath(f"configs/{name}.json").read_text()
    return json.loads(text)


def tile_for(size: int, largest: int) -> int:
    """The smallest power of two that covers `size`, within MIN_TILE ... `largest`."""
    return min(largest, max(MIN_TILE, 1 << (size - 1).bit_length()))


def rows_for(row_bytes: int, block_bytes: int) -> int:
    """How many rows of `row_bytes` a tile of about `block_bytes` has, MIN_TILE ... 128.

    Both are powers of two, and so is the result.
    """
    return max(MIN_TILE, min(128, block_bytes // row_bytes))
