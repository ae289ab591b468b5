"""The two ends of an EM iteration: bases to directions, and parts of sums to bases, bias and all.

A program has one base; in the interpreter it has many. The update reads S K D floats, adds the
parts up in a fixed order, divides, keeps what an empty base was, and writes what comes next needs:
directions of the next pass, or rounded bases and a bias for the attention. `em_update` is that
alone, of sums that chunks have added up: one part, and no directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...shared.bases import MASS_EPS, NORM_EPS, least_mass
from ...shared.spread import GOLDEN
from .. import interpreted
from ..precision import weight_unit
from ..program import Buffer, Layout, Program, programs
from ..registration import operator
from ..tiles import in_eights
from ..tuning import tile_for

PART_ELEMENTS = 8192  # of a tile of parts
MASS_PARTS = 1024  # of a tile of parts of the mass: one wait for memory, not one for each
GOLDEN_RATIO = tl.constexpr(GOLDEN)


@triton.jit
def _directions_kernel(
    p_source, p_bases, p_directions,
    n, K, D, H, ROWS, stride_sb, stride_sh, stride_sn, stride_sd, norm_eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPREAD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    # [BLOCK_R], [BLOCK_D]
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m = (o_r < ROWS)[:, None] & (o_d < D)[None, :]
    lead, place = o_r // K, o_r % K
    if SPREAD:
        # As in `shared.spread`.
        edge = place * n // K
        stretch = (place + 1) * n // K - edge
        place = edge + (((place * GOLDEN_RATIO) % 4294967296 * stretch) >> 32)
    o_source = (lead // H) * stride_sb + (lead % H) * stride_sh + place * stride_sn
    # [BLOCK_R, BLOCK_D]
    b_bases = tl.load(
        p_source + o_source[:, None] + (o_d * stride_sd)[None, :], mask=m, other=0.0
    ).to(tl.float32)  # fmt: skip
    o_base = (o_r * D)[:, None] + o_d[None, :]
    tl.store(p_bases + o_base, b_bases, mask=m)
    if NORMALIZE:
        b_bases = b_bases / (tl.sqrt(tl.sum(b_bases * b_bases, axis=1)) + norm_eps)[:, None]
    tl.store(p_directions + o_base, b_bases.to(p_directions.dtype.element_ty), mask=m)


@triton.jit
def added_parts(
    p_parts, o_r, PARTS, ROWS, D,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D]: rows of parts [PARTS, ROWS, D], added in an order that sizes decide."""
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m = (o_r < ROWS)[:, None] & (o_d < D)[None, :]
    o_row = (o_r * D)[:, None] + o_d[None, :]
    # [BLOCK_R, BLOCK_S, BLOCK_D]
    b_parts = tl.zeros((BLOCK_R, BLOCK_S, BLOCK_D), dtype=tl.float32)
    for s in range(0, PARTS, BLOCK_S):
        o_part = (s + o_s).to(tl.int64) * ROWS * D
        b_parts += tl.load(
            p_parts + o_row[:, None, :] + o_part[None, :, None],
            mask=m[:, None, :] & (s + o_s < PARTS)[None, :, None], other=0.0,
        )  # fmt: skip
    return tl.sum(b_parts, axis=1)


@triton.jit
def _update_kernel(
    p_sums, p_mass_parts, p_payload_sums, p_old, p_bases, p_mass, p_payload,
    p_directions, p_rounded_payload, p_bias,
    PARTS, MASS_PARTS, PAYLOAD_PARTS, ROWS, D, E, unit, least_mass, mass_eps, norm_eps,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ES: tl.constexpr, BLOCK_E: tl.constexpr, DIVIDE: tl.constexpr, KEEP_EMPTY: tl.constexpr,
    NORMALIZE: tl.constexpr, WITH_PAYLOAD: tl.constexpr, BIAS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    D, E = in_eights(D, EIGHTS), in_eights(E, EIGHTS)
    # [BLOCK_R], [BLOCK_D]
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < ROWS
    m = m_r[:, None] & (o_d < D)[None, :]
    o_base = (o_r * D)[:, None] + o_d[None, :]
    # [BLOCK_R, BLOCK_T]
    o_t = tl.arange(0, BLOCK_T)
    b_mass = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    for t in range(0, MASS_PARTS, BLOCK_T):
        o_part = (t + o_t).to(tl.int64) * ROWS
        b_mass += tl.load(
            p_mass_parts + o_r[:, None] + o_part[None, :],
            mask=m_r[:, None] & (t + o_t < MASS_PARTS)[None, :], other=0.0,
        )  # fmt: skip
    # [BLOCK_R]
    b_mass = tl.sum(b_mass, axis=1) * unit
    b_share = (b_mass + mass_eps)[:, None]
    # [BLOCK_R, BLOCK_D]
    b_bases = added_parts(p_sums, o_r, PARTS, ROWS, D, BLOCK_R, BLOCK_S, BLOCK_D) * unit
    if WITH_PAYLOAD:
        o_e = tl.arange(0, BLOCK_E)
        m_e = m_r[:, None] & (o_e < E)[None, :]
        o_value = (o_r * E)[:, None] + o_e[None, :]
        # [BLOCK_R, BLOCK_E]
        b_payload = added_parts(
            p_payload_sums, o_r, PAYLOAD_PARTS, ROWS, E, BLOCK_R, BLOCK_ES, BLOCK_E
        )
        b_payload *= unit
        if DIVIDE:
            b_payload = tl.div_rn(b_payload, b_share)
            b_rounded = b_payload.to(p_rounded_payload.dtype.element_ty)
            tl.store(p_rounded_payload + o_value, b_rounded, mask=m_e)
        tl.store(p_payload + o_value, b_payload, mask=m_e)
    if DIVIDE:
        b_bases = tl.div_rn(b_bases, b_share)
    if KEEP_EMPTY:
        b_empty = b_mass < least_mass
        b_old = tl.load(p_old + o_base, mask=m, other=0.0)
        b_bases = tl.where(b_empty[:, None], b_old, b_bases)
        b_mass = tl.where(b_empty, 0.0, b_mass)
    tl.store(p_bases + o_base, b_bases, mask=m)
    tl.store(p_mass + o_r, b_mass, mask=m_r)
    if BIAS == "log":
        tl.store(p_bias + o_r, tl.log(b_mass), mask=m_r)
    if BIAS == "mask":
        tl.store(p_bias + o_r, tl.where(b_mass == 0.0, float("-inf"), 0.0), mask=m_r)
    if DIVIDE:
        if NORMALIZE:
            b_bases = b_bases / (tl.sqrt(tl.sum(b_bases * b_bases, axis=1)) + norm_eps)[:, None]
        tl.store(p_directions + o_base, b_bases.to(p_directions.dtype.element_ty), mask=m)


@dataclass(frozen=True)
class Parts:
    """What a pass leaves, to be added up over the first axis; float32, times `weight_unit`.

    Args:
        sums: Parts of the sums, [S, B, h, K, D].
        mass: Parts of the mass, [T, B, h, K].
        payload: Parts of the payload sums, [U, B, h, K, E], or None.
    """

    sums: Buffer
    mass: Buffer
    payload: Buffer | None


@dataclass(frozen=True)
class Bases:
    """Memory of the bases of a program: float32 but for what is of the features' dtype.

    Args:
        bases: Bases [B, h, K, D], or sums.
        mass: Mass [B, h, K].
        directions: Directions [B, h, K, D] of the features' dtype.
    """

    bases: Buffer
    mass: Buffer
    directions: Buffer

    @classmethod
    def memory(cls, program: Program, shape: tuple[int, ...], dtype: torch.dtype) -> Bases:
        """Memory for bases [B, h, K, D] over features of `dtype`."""
        return cls(
            program.memory("bases", shape, torch.float32),
            program.memory("mass", shape[:-1], torch.float32),
            program.memory("directions", shape, dtype),
        )


def start(program: Program, bases: Bases, source: Buffer, *, spread: bool, normalize: bool) -> None:
    """Add a launch that copies bases and makes their directions.

    Args:
        program: Program to add it to.
        bases: Bases to write, and directions.
        source: Bases [B, h, K, D] to copy, of any floating dtype and strides; with `spread`
            tokens [B, h, n, D], of which those that `spread_tokens` names are copied.
        spread: Whether the source holds tokens.
        normalize: Whether the directions are the bases divided by their length.
    """
    num_bases, dim = bases.bases.layout.shape[-2:]
    heads, rows = source.layout.shape[1], bases.mass.layout.numel()
    block_r, block_d = block_of_rows(rows), tile_for(dim, 1 << 30)
    program.launch(
        _directions_kernel,
        (triton.cdiv(rows, block_r),),
        (source, bases.bases, bases.directions),
        (source.layout.shape[-2], num_bases, dim, heads, rows, *source.layout.strides, NORM_EPS),
        BLOCK_R=block_r, BLOCK_D=block_d, SPREAD=spread, NORMALIZE=normalize, num_warps=4,
    )  # fmt: skip


def block_of_rows(rows: int) -> int:
    """How many rows a program has that does little with each."""
    # In the interpreter a program costs milliseconds, whatever its size.
    return tile_for(rows, 256) if interpreted() else 1


def block_of_parts(count: int, block_r: int, block_d: int) -> int:
    """How many of `count` parts of rows are loaded at once."""
    return min(max(1, PART_ELEMENTS // (block_r * block_d)), 1 << (count - 1).bit_length())


def update(
    program: Program,
    bases: Bases,
    parts: Parts,
    *,
    num_tokens: int,
    old: Buffer | None = None,
    keep_empty: bool = False,
    divide: bool = True,
    normalize: bool = False,
    bias: str = "none",
) -> tuple[Buffer, Buffer, Buffer]:
    """Add a launch that turns a pass's parts into new bases.

    Args:
        program: Program to add it to.
        bases: Bases to write. Their directions become those of the new bases, or, if not
            `normalize`, the new bases rounded to the directions' dtype.
        parts: Parts that the pass left.
        num_tokens: Number n of tokens, by which a base is empty (see `soft_em`).
        old: Bases [B, h, K, D] that the pass was made with, contiguous; None where they are what
            lies in `bases`.
        keep_empty: Whether empty bases keep their value and get the mass 0.
        divide: Whether the sums are divided by the mass; where not, `bases.bases` becomes the sums,
            and the directions stay.
        normalize: Whether the directions are the bases divided by their length.
        bias: Bias made of the mass, "none", "log" or "mask" (-inf where it is 0).

    Returns:
        Payload bases (or sums) [B, h, K, E] in float32, the same rounded to the directions' dtype,
        and the bias [B, h, K] in float32; the mass stands for what is not made.
    """
    *lead, num_bases, dim = bases.bases.layout.shape
    width = 0 if parts.payload is None else parts.payload.layout.shape[-1]
    dtype = bases.directions.layout.dtype
    rows = bases.mass.layout.numel()
    block_r = block_of_rows(rows)
    block_d, block_e = (tile_for(max(1, size), 1 << 30) for size in (dim, width))
    payload = rounded = with_bias = bases.mass
    if width:
        payload = program.memory("payload", (*lead, num_bases, width), torch.float32)
    if width and divide:
        rounded = program.memory("rounded payload", (*lead, num_bases, width), dtype)
    if bias != "none":
        with_bias = program.memory("bias", (*lead, num_bases), torch.float32)
    of_payload = parts.sums if parts.payload is None else parts.payload
    program.launch(
        _update_kernel,
        (triton.cdiv(rows, block_r),),
        (
            parts.sums, parts.mass, of_payload, bases.bases if old is None else old,
            bases.bases, bases.mass, payload, bases.directions, rounded, with_bias,
        ),
        (
            parts.sums.layout.shape[0], parts.mass.layout.shape[0], of_payload.layout.shape[0],
            rows, dim, width, 1.0 / weight_unit(dtype), least_mass(num_tokens, num_bases),
            MASS_EPS, NORM_EPS,
        ),
        BLOCK_R=block_r, BLOCK_T=tile_for(parts.mass.layout.shape[0], MASS_PARTS),
        BLOCK_S=block_of_parts(parts.sums.layout.shape[0], block_r, block_d), BLOCK_D=block_d,
        BLOCK_ES=block_of_parts(of_payload.layout.shape[0], block_r, block_e), BLOCK_E=block_e,
        DIVIDE=divide, KEEP_EMPTY=keep_empty, NORMALIZE=normalize, WITH_PAYLOAD=width > 0,
        BIAS=bias, EIGHTS=dim % 8 == width % 8 == 0, num_warps=8,
    )  # fmt: skip
    return payload, rounded, with_bias


@programs
def _program(
    sums: Layout,
    mass: Layout,
    bases: Layout,
    payload_sums: Layout | None,
    num_tokens: int,
    keep_empty: bool,
) -> tuple[Program, int, int, int]:
    """The program, and where its outputs are; all layouts are contiguous."""
    program = Program(sums.device)
    of_sums, of_mass, old = (program.input(layout) for layout in (sums, mass, bases))
    of_payload = None if payload_sums is None else _one_part(program.input(payload_sums))
    new = program.memory("bases", sums.shape, torch.float32)
    # Directions that are not normalized are the bases again, in the same memory.
    found = Bases(new, program.memory("mass", mass.shape, torch.float32), new)
    parts = Parts(_one_part(of_sums), _one_part(of_mass), of_payload)
    payload, _, _ = update(
        program, found, parts, num_tokens=num_tokens, old=old, keep_empty=keep_empty
    )
    return program, new.place, found.mass.place, payload.place


def _one_part(whole: Buffer) -> Buffer:
    layout = whole.layout
    layout = layout._replace(shape=(1, *layout.shape), strides=(0, *layout.strides))
    return Buffer(whole.place, layout)


@operator
def em_update_triton(
    sums: torch.Tensor,
    mass: torch.Tensor,
    bases: torch.Tensor,
    payload_sums: torch.Tensor | None,
    num_tokens: int,
    keep_empty: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 sums, bases [..., K, D], not empty, mass [..., K], payload sums [..., K, E] or None.

    Returns bases, payload bases (E = 0 without a payload) and mass.
    """
    width = 0 if payload_sums is None else payload_sums.shape[-1]
    given = [tensor.contiguous() for tensor in (sums, mass, bases)]
    ridden = payload_sums.contiguous() if payload_sums is not None and width else None
    program, *outputs = _program(
        *map(Layout.of, given), Layout.of_any(ridden), num_tokens, keep_empty
    )
    tensors = program(*given, ridden)
    found, found_mass, payload = (tensors[place] for place in outputs)
    return found, payload if width else mass.new_empty((*mass.shape, 0)), found_mass


@torch.library.register_fake("stem_kernels::em_update_triton")
def _(
    sums: torch.Tensor,
    mass: torch.Tensor,
    bases: torch.Tensor,
    payload_sums: torch.Tensor | None,
    num_tokens: int,
    keep_empty: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = 0 if payload_sums is None else payload_sums.shape[-1]
    return (
        sums.new_empty(sums.shape),
        mass.new_empty((*mass.shape, width)),
        mass.new_empty(mass.shape),
    )
