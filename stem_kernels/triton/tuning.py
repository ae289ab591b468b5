"""Tile sizes of the Triton kernels, read from `configs/`."""

from __future__ import annotations

import functools
import json
from collections import ChainMap
from collections.abc import Mapping
from importlib import resources

import torch

from . import amd_architecture, device_capability, interpreted, multiprocessors

MIN_TILE = 16
ALIKE = {"sm103": "sm100", "sm121": "sm120", "gfx90a": "gfx942", "gfx1201": "gfx1100"}
"""GPUs that take the table of another: of one family, with as much of everything a block has."""
# Tokens that one float32 sum is made of at most. A long sum rounds as often as something is added,
# each time by more, and tensor cores truncate where others round.
LARGEST_RANGE = 2**14


def tiles(op: str, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, int]:
    """The tile sizes and launch options of one operator; the caller may change the copy.

    `default.json` is safe on every GPU of NVIDIA's that is served, and a table such as `sm90.json`
    takes the place of its rows on GPUs of that compute capability. AMD's have tables of their own,
    such as `gfx942.json`. In the interpreter a program costs
    milliseconds whatever its size, so `interpreter.json` has few and large ones.

    "programs" of a row is for each multiprocessor, here for all that the device has; in
    `interpreter.json` it is for all.

    Args:
        op: Name of a row of the tables, such as "em_fused 48".
        device: Device of the tensors.
        dtype: Type of the operands, of an operator that has a row of its own for float32, such as
            "basis_attention float32": products in full precision take more registers.

    Returns:
        Empty where no table has such a row: that kernel is not for this device.
    """
    if interpreted():
        return dict(table("interpreter")[op])
    if dtype == torch.float32:
        op = f"{op} float32"
    found = dict(_rows(device).get(op) or {})
    if "programs" in found:
        found["programs"] *= multiprocessors(device)
    return found


def _rows(device: torch.device) -> Mapping[str, dict[str, int]]:
    """All rows for a GPU; of AMD's GPUs only those of their own table."""
    amd = amd_architecture(device)
    if amd is not None:
        return table(amd)
    major, minor = device_capability(device)
    return ChainMap(table(f"sm{major}{minor}"), table("default"))


@functools.cache
def table(name: str) -> dict[str, dict[str, int]]:
    """The rows of one file of `configs/` by operator, of a GPU without one those of the GPU that it
    is alike; none where there is neither."""
    file = resources.files("stem_kernels").joinpath(f"configs/{name}.json")
    if file.is_file():
        return json.loads(file.read_text())
    return table(ALIKE[name]) if name in ALIKE else {}


def tile_for(size: int, largest: int) -> int:
    """The smallest power of two that covers `size`, within MIN_TILE ... `largest`."""
    return min(largest, max(MIN_TILE, 1 << (size - 1).bit_length()))


def two_tiles(width: int) -> tuple[int, int]:
    """Powers of two of at least MIN_TILE that cover `width` together; the second may be 0.

    40 = 32 + 8 (a tile of 16), 80 = 64 + 16, 160 = 128 + 32: padding 40 channels to 64 would cost
    60 % more matrix work.
    """
    main = max(MIN_TILE, 1 << (width.bit_length() - 1))
    rest = width - main
    return main, tile_for(rest, main) if rest > 0 else 0


def token_ranges(num_tokens: int, block_n: int, programs: int) -> tuple[int, int]:
    """Into how many ranges tokens are cut for about so many programs, and the tokens of each.

    It depends on the shapes and the device alone, and what is found of ranges is put together in
    order: equal calls give equal bits.
    """
    wanted = max(1, min(-(-num_tokens // block_n), programs))
    tokens = -(-num_tokens // (wanted * block_n)) * block_n
    return -(-num_tokens // tokens), tokens


def sum_ranges(num_tokens: int, block_n: int, programs: int) -> tuple[int, int]:
    """The same for tokens that are summed up: more ranges where they are more than LARGEST_RANGE.

    The partial sums are added in order.
    """
    most = max(1, LARGEST_RANGE // block_n) * block_n
    return token_ranges(num_tokens, block_n, max(programs, -(-num_tokens // most)))


def rows_for(row_bytes: int, block_bytes: int) -> int:
    """How many rows of `row_bytes` a tile of about `block_bytes` has, MIN_TILE ... 64.

    Both are powers of two, and so is the result.
    """
    return max(MIN_TILE, min(64, block_bytes // row_bytes))
