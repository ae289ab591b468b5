"""`window_attention` and `video_attention` in Triton.

The first is one launch. The second is a sort of the tokens by base, a launch for the bases' means,
three for what these leave out, and one for the attention, see `window`.
"""

from __future__ import annotations

import math

import torch
import triton

from ...reference.video_bases import group_moments
from ...shared.outputs import attention_output, partial_output
from ..precision import dot_options
from ..program import Buffer, Layout, Program, programs
from ..registration import operator
from ..tiles import aligned
from ..tuning import MIN_TILE, tile_for, tiles
from .bases import means, products
from .patches import LARGEST_HEAD, needs_64_bits, patch_for
from .window import window_attention_kernel

Seen = tuple[Layout, Layout, Layout]
"""Keys and values that every query sees, and their bias."""


def serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there are kernels for these: not for wide heads, nor for GPUs without tiles."""
    width = int(max(query.shape[-1], value.shape[-1]))
    return width <= LARGEST_HEAD and _has_tiles(width, query.device, query.dtype)


def _has_tiles(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    return bool(_tiles(width, device, dtype))


# torch.compile is to call it, not to trace it: it reads the tables' files.
_has_tiles._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _options(query: torch.Tensor | Layout, value: torch.Tensor | Layout) -> dict[str, int]:
    """Tiles and launch options of the window's kernel."""
    return _tiles(max(query.shape[-1], value.shape[-1]), query.device, query.dtype)


def _tiles(width: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """The same by width; none where the kernel is not for this device."""
    block = tile_for(width, LARGEST_HEAD)
    return tiles(f"video_attention {max(64, block)}", device, dtype)


@programs
def _window_program(
    query: Layout,
    key: Layout,
    value: Layout,
    assignment: Layout | None,
    bases: Seen | None,
    text: Seen | None,
    matrix: Layout | None,
    masked: bool,
    grid: tuple[int, int, int],
    window: int,
    scale: float,
) -> tuple[Program, int, int]:
    """The program, and where the output and its logsumexp are; without bases, in float32."""
    batch, heads, n, dim = query.shape
    width = value.shape[-1]
    program = Program(query.device)
    first = program.input(query)
    # What is absent points at the queries, and is not read.
    others = (assignment, *(bases or (None,) * 3), *(text or (None,) * 3), matrix)
    inputs = [first, program.input(key), program.input(value)]
    inputs += [first if layout is None else program.input(layout) for layout in others]
    num_bases = 0 if bases is None else bases[0].shape[-2]
    num_texts = 0 if text is None else text[0].shape[-2]
    options = _options(query, value)
    block_m, block_n = options.pop("block_m"), options.pop("block_n")
    block_k = tile_for(num_bases or 1, options.pop("block_k"))
    reach = min(window, grid[1] - 1), min(window, grid[2] - 1)
    # Squared; no place is farther than over the whole diagonal, which is in 32 bits.
    farthest = min(window * (window + 1), grid[1] ** 2 + grid[2] ** 2)
    tail = options.pop("tail") == 1
    patch = patch_for(grid, reach, block_m, block_n, num_bases + num_texts, tail)
    patches = patch.tiles(grid)
    logsumexp: Buffer
    if bases is None:
        out = program.memory("out", (batch, heads, n, width), torch.float32)
        logsumexp = program.memory("logsumexp", (batch, heads, n), torch.float32)
        strides = out.layout.strides[:3]
    else:
        out = logsumexp = program.memory("out", (batch, n, heads, width), query.dtype)
        strides = tuple(out.layout.stride(axis) for axis in (0, 2, 1))
    seen = (query, key, value) if text is None else (query, key, value, *text[:2])
    program.launch(
        window_attention_kernel,
        (batch * heads * math.prod(patches),),
        (*inputs, out, logsumexp),
        (
            *grid, heads, num_bases, num_texts, *reach, farthest, patch.rows, patch.columns,
            patch.query_frames, patch.key_frames, math.prod(patches), patches[0], patches[2],
            patch.parts, *query.strides, *key.strides, *value.strides, *strides,
            *((0,) * 8 if text is None else (*text[0].strides, *text[1].strides)),
            scale * math.log2(math.e),
        ),
        D=dim, E=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_D=tile_for(dim, LARGEST_HEAD), BLOCK_E=tile_for(width, LARGEST_HEAD),
        WITH_BASES=bases is not None, WITH_TEXT=text is not None, MASKED=masked,
        CORRECTED=matrix is not None, LOGSUMEXP=bases is None,
        TAIL=grid[0] % patch.key_frames != 0, STEP=_step(query),
        ALIGNED=aligned(query, key, value) and width % 8 == 0, LARGE=needs_64_bits(*seen),
        **dot_options(query.dtype), **options,
    )  # fmt: skip
    return program, out.place, logsumexp.place


def _step(query: Layout) -> int:
    """How many channels of queries meet the matrix at a time: more would spill in float32."""
    block = tile_for(query.shape[-1], LARGEST_HEAD)
    return MIN_TILE if query.dtype == torch.float32 else block


@operator
def window_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: list[int],
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key [B, h, n, d], value [B, h, n, e], any strides, of tensors that `serves`.

    Returns the float32 output [B, h, n, e] and logsumexp [B, h, n].
    """
    if value.shape[-1] == 0:
        return partial_output(query, key, value)
    layouts = map(Layout.of, (query, key, value))
    program, out, logsumexp = _window_program(
        *layouts, None, None, None, None, False, tuple(grid), window, scale
    )
    tensors = program(query, key, value)
    return tensors[out], tensors[logsumexp]


@operator
def video_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    grid: list[int],
    window: int,
    num_bases: int,
    corrected: bool,
    scale: float,
) -> torch.Tensor:
    """Arguments as for `reference.video_attention`, of tensors that `serves`.

    Returns contiguous [B, n, h, e] of the query's dtype.
    """
    if value.shape[-1] == 0:
        return attention_output(query, key, value)
    numbers = assignment.to(torch.int32).contiguous()
    block_k = tile_for(num_bases, _options(query, value)["block_k"])
    padded = triton.cdiv(num_bases, block_k) * block_k
    base_key, base_value, *seen = means(key, value, numbers, num_bases, padded)
    matrix = None
    if corrected:
        matrix = _matrix(query, key, value, numbers, base_key, base_value, seen, scale)
    text = None
    if text_key is not None and text_value is not None:
        bias = query.new_zeros(text_key[:, 0, :, 0].shape, dtype=torch.float32)
        if text_mask is not None:
            bias.masked_fill_(~text_mask, float("-inf"))
        text = (text_key, text_value, bias)
    operands = (query, key, value, numbers)
    program, out, _ = _window_program(
        *map(Layout.of, operands),
        tuple(map(Layout.of, seen)),
        None if text is None else tuple(map(Layout.of, text)),
        Layout.of_any(matrix),
        text_mask is not None,
        tuple(grid),
        window,
        scale,
    )
    present = (tensor for tensor in (*operands, *seen, *(text or ()), matrix) if tensor is not None)
    return program(*present)[out]


def _matrix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    numbers: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
    seen: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """[B, h, d, e] of the query's dtype: what the queries are multiplied by for the correction."""
    if query.dtype == torch.float32:
        lead = query.shape[:2]
        keys, values, queries = (part.flatten(0, 1) for part in (key, value, query))
        bases = base_key.flatten(0, 1), base_value.flatten(0, 1)
        with torch.autocast(query.device.type, enabled=False):
            found = group_moments(numbers.flatten(0, 1).long(), keys, values, *bases)
            of_queries = queries.mT @ queries / queries.shape[1]
        of_both, of_keys, of_queries = (part.unflatten(0, lead) for part in (*found, of_queries))
    else:
        of_both, of_keys, of_queries = products(key, value, query, numbers, *seen[:2])
    # The mean square of what logits differ by from their base's, over queries and tokens.
    spread = (of_queries * of_keys).sum((-1, -2), keepdim=True) * scale**2
    return (of_both * (scale * (1 + spread).rsqrt())).to(query.dtype)


torch.library.register_fake("stem_kernels::window_attention_triton")(partial_output)
torch.library.register_fake("stem_kernels::video_attention_triton")(attention_output)
