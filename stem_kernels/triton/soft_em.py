"""`soft_em` in Triton: two launches an iteration, or three, and no wait for the device.

One launch before them takes tokens for bases and makes their directions; the last update also
rounds the bases and turns their mass into a bias, for the attention that follows.
"""

from __future__ import annotations

import torch

from ..shared.bases import candidates_of, least_mass, reseeded
from .em_statistics import em_pass
from .em_update import Bases, start, update
from .program import Layout, Program, programs
from .registration import operator


@programs
def _program(
    features: Layout,
    bases: Layout | None,
    payload: Layout | None,
    num_bases: int,
    num_iters: int,
    temperature: float,
    normalize: bool,
    keep_empty: bool,
    bias: str,
) -> tuple[Program, tuple[int, ...]]:
    """The program, and where the outputs of `soft_em_triton` are."""
    program = Program(features.device)
    tokens = program.input(features).with_heads()
    source = tokens if bases is None else program.input(bases).with_heads()
    values = None if payload is None else program.input(payload).with_heads()
    *lead, n, dim = features.shape
    found = Bases.memory(program, (*lead, num_bases, dim), features.dtype)
    start(program, found, source, spread=bases is None, normalize=normalize)
    for iteration in range(num_iters):
        last = iteration == num_iters - 1
        parts = em_pass(program, tokens, found.directions, values if last else None, temperature)
        carried = update(
            program,
            found,
            parts,
            num_tokens=n,
            keep_empty=keep_empty,
            normalize=normalize and not last,
            bias=bias if last else "none",
        )
    payload_bases, rounded_payload, with_bias = carried
    outputs = (
        found.bases, payload_bases, found.mass, found.directions, rounded_payload, with_bias
    )  # fmt: skip
    return program, tuple(output.place for output in outputs)


@operator
def soft_em_triton(
    features: torch.Tensor,
    bases: torch.Tensor | None,
    payload: torch.Tensor | None,
    num_bases: int,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
    bias: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, (h,) n, D], bases [B, (h,) K, D], payload [B, (h,) n, E] or None, any strides.

    Without bases EM starts from `num_bases` tokens. Returns float32 bases, payload bases (E = 0
    without a payload) and mass; bases and payload bases rounded to the features' dtype; and the
    bias "log" or "mask", [B, h, K] (0 elements where it is "none").
    """
    width = 0 if payload is None else payload.shape[-1]
    payload = payload if width else None
    layout = Layout.of(features)
    rest = (temperature, normalize, empty != "zero")
    if empty == "reseed" and num_iters > 1:
        # Each iteration but the last is a program of its own, and empty bases are put elsewhere.
        least = least_mass(features.shape[-2], num_bases)
        candidates = candidates_of(features, num_bases)
        for _ in range(num_iters - 1):
            given = None if bases is None else Layout.of(bases)
            program, at = _program(
                layout, given, None, num_bases, 1, temperature, normalize, False, "none"
            )
            tensors = program(features, bases)
            bases = reseeded(tensors[at[0]], tensors[at[2]] < least, candidates)
        num_iters = 1
    program, at = _program(
        layout, Layout.of_any(bases), Layout.of_any(payload), num_bases, num_iters, *rest, bias
    )
    tensors = program(features, bases, payload)
    found, payload_bases, mass, rounded, rounded_payload, with_bias = (
        tensors[place] for place in at
    )
    if not width:
        payload_bases = mass.new_empty((*mass.shape, 0))
        rounded_payload = features.new_empty((*mass.shape, 0))
    if bias == "none":
        with_bias = mass.new_empty(0)
    return found, payload_bases, mass, rounded, rounded_payload, with_bias


@torch.library.register_fake("stem_kernels::soft_em_triton")
def _(
    features: torch.Tensor,
    bases: torch.Tensor | None,
    payload: torch.Tensor | None,
    num_bases: int,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
    bias: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lead = (*features.shape[:-2], num_bases)
    width = 0 if payload is None else payload.shape[-1]
    single = torch.float32
    return (
        features.new_empty((*lead, features.shape[-1]), dtype=single),
        features.new_empty((*lead, width), dtype=single),
        features.new_empty(lead, dtype=single),
        features.new_empty((*lead, features.shape[-1])),
        features.new_empty((*lead, width)),
        features.new_empty(0 if bias == "none" else lead, dtype=single),
    )
