"""`soft_em` in Triton: two launches an iteration, or three, and no wait for the device.

One launch before them takes tokens for bases and makes their directions; the last update also
rounds the bases and turns their mass into a bias, for the attention that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch

from ...shared.bases import candidates_of, least_mass, reseeded
from ..program import Layout, Program, programs
from ..registration import operator
from .statistics import em_pass
from .update import Bases, start, update

Outputs = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


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
) -> tuple[Program, Outputs]:
    """The program, and what takes the outputs of `soft_em_triton` out of its tensors."""
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
    outputs = [found.bases, found.mass, found.directions]
    if payload is not None:
        outputs += [payload_bases, rounded_payload]
    if bias != "none":
        outputs.append(with_bias)
    return program, itemgetter(*(output.place for output in outputs))


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
) -> list[torch.Tensor]:
    """features [B, (h,) n, D], bases [B, (h,) K, D], payload [B, (h,) n, E > 0], any strides.

    Without bases EM starts from `num_bases` tokens. Returns float32 bases, mass, and the bases
    rounded to the features' dtype; with a payload its bases likewise, and the same rounded; with a
    bias "log" or "mask" that, [B, h, K].
    """
    if features.shape[:-2].numel() == 0:
        return _outputs(
            features, bases, payload, num_bases, num_iters, temperature, normalize, empty, bias
        )
    layout = Layout.of(features)
    rest = (temperature, normalize, empty != "zero")
    if empty == "reseed" and num_iters > 1:
        # Each iteration but the last is a program of its own, and empty bases are put elsewhere.
        least = least_mass(features.shape[-2], num_bases)
        candidates = candidates_of(features, num_bases)
        for _ in range(num_iters - 1):
            given = None if bases is None else Layout.of(bases)
            program, outputs = _program(
                layout, given, None, num_bases, 1, temperature, normalize, False, "none"
            )
            found, mass, _ = outputs(program(features, bases))
            bases = reseeded(found, mass < least, candidates)
        num_iters = 1
    program, outputs = _program(
        layout, Layout.of_any(bases), Layout.of_any(payload), num_bases, num_iters, *rest, bias
    )
    return list(outputs(program(features, bases, payload)))


@torch.library.register_fake("stem_kernels::soft_em_triton")
def _outputs(
    features: torch.Tensor,
    bases: torch.Tensor | None,
    payload: torch.Tensor | None,
    num_bases: int,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
    bias: str,
) -> list[torch.Tensor]:
    lead, dim = (*features.shape[:-2], num_bases), features.shape[-1]
    single = torch.float32
    found = [
        features.new_empty((*lead, dim), dtype=single),
        features.new_empty(lead, dtype=single),
        features.new_empty((*lead, dim)),
    ]
    if payload is not None:
        width = payload.shape[-1]
        found += [
            features.new_empty((*lead, width), dtype=single), features.new_empty((*lead, width))
        ]  # fmt: skip
    if bias != "none":
        found.append(features.new_empty(lead, dtype=single))
    return found
