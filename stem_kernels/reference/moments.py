"""`moments` in plain torch, which derivatives pass through."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import pad

from ..shared.bases import directions_of
from ..shared.outputs import compute_dtype


def moments_torch(
    query: torch.Tensor,
    features: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bases: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
    temperature: float,
    scale: float,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, r, d], features [B, (h,) m, D], key [B, h, m, d], value [B, h, m, e], bases
    [B, (h,) K, D], base_key [B, h, K, d], base_value [B, h, K, e]; each B may be 1.

    Returns the correction [B, h, d + 1, e], `share` of the matrix and a row of zeros, and the mean
    query 0 [B, h, d], in float32 or float64.
    """
    compute = compute_dtype(key)
    with _without_autocast(key.device):
        directions = directions_of(bases.to(compute), normalize=True)
        shares = torch.softmax(features.to(compute) @ directions.mT / temperature, -1)
        if shares.ndim == 3:
            shares = shares.unsqueeze(1)
        query, key, value, base_key, base_value = (
            tensor.to(compute) for tensor in (query, key, value, base_key, base_value)
        )
        of_keys, of_values = key - shares @ base_key, value - shares @ base_value
        spread = (query.mT @ query) * (of_keys.mT @ of_keys)
        spread = spread.sum((-1, -2), keepdim=True) * (scale**2 / (query.shape[-2] * key.shape[-2]))
        matrix = of_keys.mT @ of_values * (share * scale / key.shape[-2])
        correction = pad(matrix * (1 + spread).rsqrt(), (0, 0, 0, 1))
    return correction, correction.new_zeros((*correction.shape[:2], query.shape[-1]))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Tensors without data, such as kernels are counted with, know no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
