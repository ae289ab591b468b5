"""The moments of what bases leave out, against torch in float64 for some of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..reference.moments import moments_torch
from ..shared.bases import directions_of
from .comparison import SLACK, Comparison, Rounding, compared, finite, places, products, rounded


def moments(
    found: Sequence[torch.Tensor],
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
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.moments`, `found` its results by a backend; two heads at most."""
    correction, mean = found
    if correction.numel() == 0:
        return None
    batch, heads = correction.shape[:2]
    each = features.shape[-2] * bases.shape[-2] * features.shape[-1]
    count = min(2, products(key.device) // each)
    leads = places(batch * heads, count, key.device)

    def of(tensor: torch.Tensor) -> torch.Tensor:
        """[1, leads, rows, channels]"""
        tensor = tensor if tensor.ndim == 4 else tensor.unsqueeze(1)
        tensor = tensor.expand(batch, heads, *tensor.shape[2:])
        return tensor[leads // heads, leads % heads].unsqueeze(0)

    tensors = [of(each) for each in (query, features, key, value, bases, base_key, base_value)]
    if not finite(*tensors):
        return None
    numbers = (temperature, scale, share)
    in_double: tuple[Any, ...] = (*(tensor.double() for tensor in tensors), *numbers)
    exact, _ = moments_torch(*in_double)
    as_given: tuple[Any, ...] = (*tensors, *numbers, key.dtype)
    plain, largest = _plain(*as_given)
    one = compared("correction", of(correction), exact, plain, key.dtype, rounding, largest)
    of_mean = Comparison("mean query", float(mean.abs().nan_to_num(nan=float("inf")).max()), 0.0)
    if one is None:
        return [of_mean]
    # Where every token is a base, what is left of keys and values is nothing but rounding.
    left = (float(rounding[key.dtype] * tensor.abs().max()) for tensor in (key, value))
    return [of_mean, one._replace(bound=one.bound + SLACK * share * scale * math.prod(left))]


def _plain(
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
    dtype: torch.dtype,
) -> tuple[torch.Tensor, float]:
    """The correction rounded where kernels round, and the largest logit; float32."""
    query, features, key, value, base_key, base_value = (
        rounded(tensor, dtype) for tensor in (query, features, key, value, base_key, base_value)
    )
    directions = rounded(directions_of(bases.float(), normalize=True), dtype)
    logits = features @ directions.mT / temperature
    shares = rounded(torch.softmax(logits, -1), dtype)
    of_keys = rounded(key - shares @ base_key, dtype)
    of_values = rounded(value - shares @ base_value, dtype)
    spread = (scale * (query @ of_keys.mT)).square().mean((-1, -2), keepdim=True)
    matrix = of_keys.mT @ of_values * (share * scale / key.shape[-2]) * (1 + spread).rsqrt()
    return torch.nn.functional.pad(matrix, (0, 0, 0, 1)), float(logits.abs().max())
