"""`em_statistics` in Triton, by the pass that suits the shape.

Logits are in base 2: log2(e) / temperature is folded into one factor, so that exp2 serves.
"""

from __future__ import annotations

import math

import torch

from ...shared.outputs import statistics_output
from ..program import Buffer, Layout, Program, programs
from ..registration import operator
from ..tiles import offsets_fit
from . import fused, general, many, wide
from .update import Bases, Parts, start, update


def em_pass(
    program: Program,
    features: Buffer,
    directions: Buffer,
    payload: Buffer | None,
    temperature: float,
) -> Parts:
    """Add a pass to a program; arguments as for `fused.fused_pass`, but for the temperature.

    How many parts it leaves depends on shapes and device, so equal calls give equal bits.
    """
    scale = math.log2(math.e) / temperature
    layouts = [tokens.layout for tokens in (features, payload) if tokens is not None]
    half = all(layout.element_size() == 2 and offsets_fit(layout) for layout in layouts)
    arguments = (program, features, directions, payload, scale)
    if half and directions.layout.shape[-2] <= fused.LARGEST_BASES:
        if max(layout.shape[-1] for layout in layouts) <= fused.WIDTHS[-1]:
            return fused.fused_pass(*arguments)
        return wide.wide_pass(*arguments)
    options = many.many_options(features) if half and payload is None else {}
    if options:
        return many.many_pass(program, features, directions, scale, options)
    return general.general_pass(*arguments)


@programs
def _program(
    features: Layout, bases: Layout, payload: Layout | None, temperature: float, normalize: bool
) -> tuple[Program, int, int, int]:
    """The program, and where its outputs are."""
    program = Program(features.device)
    tokens, source = (program.input(layout).with_heads() for layout in (features, bases))
    values = None if payload is None else program.input(payload).with_heads()
    found = Bases.memory(program, bases.shape, features.dtype)
    start(program, found, source, spread=False, normalize=normalize)
    parts = em_pass(program, tokens, found.directions, values, temperature)
    payload_sums, _, _ = update(program, found, parts, num_tokens=features.shape[-2], divide=False)
    return program, found.bases.place, found.mass.place, payload_sums.place


@operator
def em_statistics_triton(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, (h,) n, D], bases [B, (h,) K, D], payload [B, (h,) n, E] or None, any strides.

    Returns float32 sums, mass and payload sums (E = 0 without a payload).
    """
    width = 0 if payload is None else payload.shape[-1]
    if features.numel() == 0:
        sums, mass, payload_sums = statistics_output(features, bases, payload)
        return sums.zero_(), mass.zero_(), payload_sums.zero_()
    payload = payload if width else None
    program, *outputs = _program(
        Layout.of(features), Layout.of(bases), Layout.of_any(payload), temperature, normalize
    )
    tensors = program(features, bases, payload)
    sums, mass, payload_sums = (tensors[place] for place in outputs)
    return sums, mass, payload_sums if width else mass.new_empty((*mass.shape, 0))


torch.library.register_fake("stem_kernels::em_statistics_triton")(statistics_output)
