"""`em_statistics` in Triton, by the pass that suits the shape.

Logits are in base 2: log2(e) / temperature is folded into one factor, so that exp2 serves.
"""

from __future__ import annotations

import math

import torch

from ..shared.bases import directions_of
from . import em_fused, em_general, em_wide
from .tiles import offsets_fit


def em_pass(
    features: torch.Tensor,
    directions: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sums, mass and payload sums in parts, to be added up over their first axis in order.

    How many parts depends on the shapes alone, so equal calls give equal bits. Arguments as for
    `em_fused.fused_pass`, but for the temperature.
    """
    scale = math.log2(math.e) / temperature
    num_bases = directions.shape[-2]
    tensors = [features] if payload is None else [features, payload]
    half = all(tensor.element_size() == 2 and offsets_fit(tensor) for tensor in tensors)
    if half and num_bases <= em_fused.LARGEST_BASES:
        if max(tensor.shape[-1] for tensor in tensors) <= em_fused.WIDTHS[-1]:
            return em_fused.fused_pass(features, directions, payload, scale)
        return em_wide.wide_pass(features, directions, payload, scale)
    return em_general.general_pass(features, directions, payload, scale)


@torch.library.custom_op("stem_kernels::em_statistics_triton", mutates_args=())
def em_statistics_triton(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, h, n, D], bases [B, h, K, D], payload [B, h, n, E] or None, any strides.

    Returns float32 sums, mass and payload sums (E = 0 without a payload).
    """
    width = 0 if payload is None else payload.shape[-1]
    outputs = _outputs(features, bases.shape[-2], width)
    if features.numel() == 0:
        return outputs
    directions = directions_of(bases.float(), normalize).to(features.dtype).contiguous()
    sums, mass, payload_sums = em_pass(
        features, directions, payload if width else None, temperature
    )
    return sums.sum(0), mass.sum(0), outputs[2] if payload_sums is None else payload_sums.sum(0)


@em_statistics_triton.register_fake
def _(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(features, bases.shape[-2], 0 if payload is None else payload.shape[-1])


def _outputs(
    features: torch.Tensor, num_bases: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lead = (*features.shape[:2], num_bases)
    return (
        features.new_zeros((*lead, features.shape[-1]), dtype=torch.float32),
        features.new_zeros(lead, dtype=torch.float32),
        features.new_zeros((*lead, width), dtype=torch.float32),
    )
