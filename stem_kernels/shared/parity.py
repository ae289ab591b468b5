"""How far a result may be from the exact one."""

from __future__ import annotations

import torch


def max_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference, in float64; inf where `result` is not finite."""
    if result.numel() == 0:
        return 0.0
    difference = (result.double() - reference.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


def parity_bound(
    reference: torch.Tensor,
    same_dtype: torch.Tensor,
    rounding: dict[torch.dtype, float],
    largest_logit: float = 0.0,
) -> float:
    """2 max|same_dtype - reference| + rounding atol, the error that an operator may make.

    Args:
        reference: Result in float64.
        same_dtype: Result of plain torch in the dtype under test.
        rounding: Rounding tolerances of the operator by dtype, relative to max|reference|.
        largest_logit: Largest |S|. Float32 rounds a logit by up to 2^-24 of it, which moves every
            weight by as large a part; with few tokens plain torch's own error can miss that.
    """
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    relative = rounding[same_dtype.dtype] + largest_logit * torch.finfo(torch.float32).eps
    return 2 * max_error(same_dtype, reference) + relative * largest
