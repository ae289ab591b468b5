"""For every token the most similar one of others."""

from __future__ import annotations

import torch

from ..verification import attention, run
from ..verification.comparison import Comparison
from .checks import check_floating, check_same_dtype

OP = "nearest_token"

ROUNDING_ATOL = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
"""How much smaller than the largest cosine the found key's may be: products of all dtypes are
exact, and added up in float32."""


def nearest_token(
    query: torch.Tensor, keys: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    r"""The key with the largest cosine: $\arg\max_j\, q_i \cdot k_j / \lVert k_j \rVert$.

    This is equivalent to the following, but never holds the products `[B, n, m]`:

        norms = keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return (query @ (keys / norms).mT).argmax(-1).to(torch.int32)

    The length of a query scales all of its cosines equally, so it is left out.

    Args:
        query: Tokens [B, n, d], any strides; n may be 0.
        keys: Tokens [B, m, d] of the same dtype, m and d at least 1. A key of zeros has the
            cosine 0 with every query.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        int32 [B, n]: numbers 0 ... m - 1. Of equal cosines the first counts. If two cosines differ
        by less than float32's rounding, either may count. NaN and infinities are not checked: if a
        query's products are not finite, its number is in range but has no meaning.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2307.10373, the nearest-neighbour field of TokenFlow.
    """
    check_floating(OP, query=query, keys=keys)
    check_same_dtype(OP, query=query, keys=keys)
    if query.ndim != 3:
        raise ValueError(f"{OP}: query must be [B, n, d], not {list(query.shape)}")
    batch, _, dim = query.shape
    if keys.ndim != 3 or keys.shape[0] != batch or keys.shape[2] != dim:
        raise ValueError(
            f"{OP}: query is {list(query.shape)}, so keys must be [{batch}, m, {dim}], "
            f"not {list(keys.shape)}"
        )
    if keys.shape[1] == 0 or dim == 0:
        raise ValueError(f"{OP}: keys are {list(keys.shape)}; m and d must be at least 1")
    if keys.shape[1] >= 2**31:
        raise ValueError(f"{OP}: there are {keys.shape[1]} keys; an int32 numbers less than 2^31")
    # The result is a number of a key, which has no gradient.
    query, keys = query.detach(), keys.detach()

    def on(chosen: str) -> torch.Tensor:
        if chosen == "triton":
            from ..triton.nearest.token import nearest_token_triton

            return nearest_token_triton(query, keys)
        if chosen == "cuda":
            from ..cuda.nearest_token import nearest_token_cuda

            return nearest_token_cuda(query, keys)
        assert chosen == "torch"
        from ..reference.nearest_token import nearest_token_torch

        return nearest_token_torch(query, keys)

    def check(found: torch.Tensor, _: str) -> list[Comparison] | None:
        return attention.nearest_token(found, query, keys, ROUNDING_ATOL)

    return run(OP, backend, {"query": query, "keys": keys}, None, on, check)
