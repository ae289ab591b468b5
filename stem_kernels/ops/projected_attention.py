"""A self-attention to a few bases with the projections before and after it."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ..backends import BackendError, Tensors, select
from ..shared import forms
from ..verification import attention, run
from ..verification.comparison import Comparison
from .basis_attention import ROUNDING_ATOL, check_correction, fitting_bias, on_backend
from .checks import check_floating, check_same_dtype

OP = "projected_attention"


def projected_attention(
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    *,
    query_bias: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    query_mean: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""What a self-attention layer makes of its tokens where these attend to bases.

    This is equivalent to:

        query = linear(tokens, query_weight, query_bias).unflatten(-1, (h, d)).transpose(1, 2)
        attended = basis_attention(query, key, value, scale=scale, bias=bias, ...)
        return linear(attended.transpose(1, 2).flatten(2), output_weight, output_bias)

    The extension has one kernel of it for CPUs: queries and attended values of some tokens stay in
    the cache. Other backends take these three steps.

    Args:
        tokens: Tokens [B, n, C], any strides; n may be 0.
        query_weight: Weight [h d, C] of the projection to the queries of all heads.
        key: Keys [B or 1, h, K, d].
        value: Values [B or 1, h, K, e].
        output_weight: Weight [E, h e] of the projection of all heads' attended values.
        query_bias: Bias [h d] of the queries, or None.
        output_bias: Bias [E] of the outputs, or None.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        bias: Bias of the logits, [h, K] or [B or 1, h or 1, K], or None.
        correction: Correction [B or 1, h, d + 1, e], or None.
        query_mean: Mean query [B or 1, h, d] of the correction.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        [B, n, E] of the tokens' dtype. Each token's numbers depend on it and the bases alone with
        "cuda" on a CPU, whatever tokens are beside it.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; tokens, weights, their biases, keys and
            values have one dtype.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856, STEM self-attention.
    """
    weights = {
        "tokens": tokens, "query_weight": query_weight, "key": key, "value": value,
        "output_weight": output_weight, "query_bias": query_bias, "output_bias": output_bias,
    }  # fmt: skip
    check_floating(OP, **weights, bias=bias)
    check_same_dtype(OP, **{name: part for name, part in weights.items() if part is not None})
    _check_shapes(weights)
    batch, num_bases = tokens.shape[0], key.shape[-2]
    bias = fitting_bias(OP, bias, key.expand(batch, -1, -1, -1), num_bases)
    check_correction(OP, batch, key, value, correction, query_mean)
    scale = key.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = _asked(weights, bias, correction, query_mean)
    given = (
        tokens, query_weight, query_bias, key, value, output_weight, output_bias, bias, correction,
        query_mean, scale,
    )  # fmt: skip

    def on(chosen: str) -> torch.Tensor:
        if chosen == "cuda" and tokens.device.type == "cpu":
            from ..cuda.projected_attention import projected_attention_cuda

            return projected_attention_cuda(*given)
        return _in_steps(chosen, *given)

    def check(out: torch.Tensor, _: str) -> list[Comparison] | None:
        return attention.projected_attention(out, *given, ROUNDING_ATOL)

    return run(OP, backend, tensors, num_bases, on, check)


def is_fused(
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    *,
    query_bias: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    query_mean: torch.Tensor | None = None,
    backend: str = "auto",
) -> bool:
    """Whether `projected_attention` of these is one kernel; arguments as there.

    False, too, where the backend cannot run the call, or its kernel was found wrong.
    """
    if tokens.device.type != "cpu" or "cuda" in forms.passed_over(OP):
        return False
    given = {
        "tokens": tokens, "query_weight": query_weight, "key": key, "value": value,
        "output_weight": output_weight, "query_bias": query_bias, "output_bias": output_bias,
    }  # fmt: skip
    try:
        chosen = select(OP, backend, _asked(given, bias, correction, query_mean), key.shape[-2])
    except BackendError:
        return False
    return chosen == "cuda"


def _asked(
    weights: Tensors,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
) -> Tensors:
    """What backends are asked about; the queries are as wide as the keys."""
    return {
        **weights, "query": weights["key"], "bias": bias, "correction": correction,
        "query_mean": query_mean,
    }  # fmt: skip


def _in_steps(
    chosen: str,
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        query = linear(tokens, query_weight, query_bias)
        query = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
        attended = on_backend(chosen, query, key, value, bias, correction, query_mean, scale)
        return linear(attended.flatten(2), output_weight, output_bias)


def _check_shapes(given: Tensors) -> None:
    present = {name: part for name, part in given.items() if part is not None}
    names = ("tokens", "query_weight", "key", "value", "output_weight")
    tokens, query_weight, key, value, output_weight = (present[name] for name in names)
    fits = tokens.ndim == 3 and key.ndim == value.ndim == 4
    fits = fits and query_weight.ndim == output_weight.ndim == 2
    if fits:
        heads, num_bases, dim = key.shape[1:]
        batches = (1, tokens.shape[0])
        fits = (
            value.shape[1:3] == key.shape[1:3]
            and key.shape[0] in batches
            and value.shape[0] in batches
            and min(heads, num_bases, dim, tokens.shape[2], output_weight.shape[0]) >= 1
            and query_weight.shape == (heads * dim, tokens.shape[2])
            and output_weight.shape[1] == heads * value.shape[-1]
            and all(
                present[f"{name}_bias"].shape == present[f"{name}_weight"].shape[:1]
                for name in ("query", "output")
                if f"{name}_bias" in present
            )
        )
    if not fits:
        shapes = (f"{name} {list(part.shape)}" for name, part in present.items())
        raise ValueError(
            f"{OP}: tokens must be [B, n, C], query_weight [h d, C], key [B or 1, h, K, d], value "
            "[B or 1, h, K, e], output_weight [E, h e], query_bias [h d] and output_bias [E], all "
            f"sizes but B, n and e at least 1; they are {', '.join(shapes)}"
        )
