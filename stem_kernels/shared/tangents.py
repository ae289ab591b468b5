"""Forward-mode automatic differentiation, which operators of torch's dispatcher know nothing of.

Torch gives their outputs no tangents, without a word: derivatives would be zero.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether tangents may go through what is computed now (`torch.func.jvp`, `dual_level`)."""
    return forward_ad._current_level >= 0


def carries_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a tangent, or may have one that transforms of `torch.func` hide."""
    if not forward_mode():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None
