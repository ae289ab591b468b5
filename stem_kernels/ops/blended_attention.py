"""Attention to bases by two maps, blended token by token."""

from __future__ import annotations

import torch

from ..verification import attention, run
from ..verification.comparison import Comparison
from .basis_attention import ROUNDING_ATOL, check_bases, fitting_bias
from .checks import check_floating, check_same_dtype

OP = "blended_attention"


def blended_attention(
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention to bases by a target's and a source's map, which a mask blends (FateZero).

    $$m_n\, \mathrm{softmax}_k(\text{scale}\, q^t_n \cdot k^t_k + b_k)\, v +
      (1 - m_n)\, \mathrm{softmax}_k(\text{scale}\, q^s_n \cdot k^s_k + b_k)\, v$$

    This is equivalent to the following, but never holds the weights `[B, h, n, K]` of a map:

        share = mask[:, None, :, None]
        target = basis_attention(query_target, key_target, value, scale=scale, bias=bias)
        source = basis_attention(query_source, key_source, value, scale=scale, bias=bias)
        return share * target + (1 - share) * source

    There is one difference: for a token with a mask of 1 or 0, the other map has no influence, even
    if it is NaN.

    Args:
        query_target: Queries [B, h, n, d] of the target, any strides; n may be 0.
        key_target: Keys [B or 1, h, K, d] of the target.
        query_source: Queries [B, h, n, d] of the source.
        key_source: Keys [B or 1, h, K, d] of the source.
        value: Values [B or 1, h, K, e], which both maps weight.
        mask: Share [B, n] of the target, floating, 0 ... 1 (not checked), for all heads. It gets
            no gradient.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        bias: Bias [..., K] of both maps' logits, as `basis_attention` takes it, or None.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        [B, h, n, e] of the queries' dtype; a view of memory laid out as [B, n, h, e]. Logits,
        softmax, sums and shares are float32.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2303.09535, FateZero's blended self-attention; the form through bases is this
    package's.
    """
    tensors: dict[str, torch.Tensor | None] = {
        "query_target": query_target, "key_target": key_target,
        "query_source": query_source, "key_source": key_source, "value": value,
    }  # fmt: skip
    check_floating(OP, **tensors, mask=mask, bias=bias)
    check_same_dtype(OP, **tensors)
    check_bases(OP, query_target, key_target, value, names=("query_target", "key_target"))
    check_bases(OP, query_source, key_source, value, names=("query_source", "key_source"))
    if query_source.shape != query_target.shape:
        raise ValueError(
            f"{OP}: query_target is {list(query_target.shape)}, so query_source must be the same, "
            f"not {list(query_source.shape)}"
        )
    batch, _, num_tokens, dim = query_target.shape
    if mask.shape != (batch, num_tokens):
        raise ValueError(f"{OP}: mask is {list(mask.shape)}; it must be {[batch, num_tokens]}")
    bias = fitting_bias(OP, bias, query_target, value.shape[-2])
    scale = dim**-0.5 if scale is None else float(scale)
    arguments = (query_target, key_target, query_source, key_source, value, mask, bias, scale)

    def on(chosen: str) -> torch.Tensor:
        if chosen == "triton":
            from ..triton.attention.blended import blended_attention_triton

            return blended_attention_triton(*arguments)
        if chosen == "cuda":
            from ..cuda.blended_attention import blended_attention_cuda

            return blended_attention_cuda(*arguments)
        assert chosen == "torch"
        from ..reference.blended_attention import blended_attention_torch

        return blended_attention_torch(*arguments)

    def check(found: torch.Tensor, _: str) -> list[Comparison] | None:
        return attention.blended_attention(found, *arguments, ROUNDING_ATOL)

    tensors |= {"mask": mask, "bias": bias}
    return run(OP, backend, tensors, value.shape[-2], on, check).transpose(1, 2)
