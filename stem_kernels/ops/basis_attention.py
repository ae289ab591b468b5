"""Attention of every token to a few bases."""

from __future__ import annotations

import torch

from ..reference.basis_attention import add_correction, basis_attention_torch
from ..verification import attention, run
from ..verification.comparison import Comparison
from .checks import check_floating, check_same_dtype, check_width

OP = "basis_attention"

ROUNDING_ATOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Part of the parity bound: the output's own rounding, relative to the largest |reference|."""


def basis_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    query_mean: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention to bases: $\mathrm{softmax}_k(\text{scale}\, q_n \cdot k_k + b_k)\, v$.

    This is equivalent to the following, but never holds the weights `[B, h, n, K]`:

        weights = torch.softmax(query @ key.mT * scale + bias.unsqueeze(-2), dim=-1)
        return weights @ value

    If the bases are calibrated (see `ops.calibration`), $[q_n - \bar q, 1]\, E$ is added to the
    output before it is rounded and written. This takes 2 d e FLOPs a token; the attention takes 2 K
    (d + e).

    Args:
        query: Queries [B, h, n, d], any strides (a head-interleaved view costs no
            copy); n may be 0, and d is at least 1.
        key: Keys [B, h, K, d], or [1, h, K, d] to serve the whole batch.
        value: Values [B, h, K, e], or [1, h, K, e].
        scale: Factor of the logits; 1 / sqrt(d) if None.
        bias: Bias of the logits, floating, [h, K], [1, h, K] or [B, h, K], where h may be 1.
            -inf excludes a base; a head whose bases are all excluded gives NaN, as in
            `torch.nn.functional.scaled_dot_product_attention`. "triton" may take a finite bias
            beyond 1e37 for infinite: to tell them apart costs registers in its inner loops.
        correction: Correction E [B or 1, h, d + 1, e] of calibrated bases, floating, or None.
        query_mean: Mean query [B or 1, h, d] of the correction, floating; it is given together with
            `correction`.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        [B, h, n, e] of the query's dtype; a view of memory laid out as [B, n, h, e], so that
        merging the heads afterwards costs no copy. Logits, softmax and sums are float32.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856, STEM self-attention.
    """
    check_floating(OP, query=query, key=key, value=value, bias=bias)
    check_same_dtype(OP, query=query, key=key, value=value)
    check_bases(OP, query, key, value)
    num_bases, dim = key.shape[-2:]
    bias = fitting_bias(OP, bias, query, num_bases)
    check_correction(OP, query.shape[0], key, value, correction, query_mean)
    tensors = {
        "query": query, "key": key, "value": value, "bias": bias,
        "correction": correction, "query_mean": query_mean,
    }  # fmt: skip
    scale = dim**-0.5 if scale is None else float(scale)
    arguments = (query, key, value, bias, correction, query_mean, scale)

    def check(out: torch.Tensor, _: str) -> list[Comparison] | None:
        return attention.basis_attention(out, *arguments, ROUNDING_ATOL)

    def on(chosen: str) -> torch.Tensor:
        return on_backend(chosen, *arguments)

    out = run(OP, backend, tensors, num_bases, on, check)
    return out.transpose(1, 2)


def on_backend(
    chosen: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[B, n, h, e] by one backend."""
    if chosen == "triton":
        from ..triton.attention.basis import basis_attention_triton

        return basis_attention_triton(query, key, value, bias, correction, query_mean, scale)
    if chosen == "cuda":
        from ..cuda.basis_attention import basis_attention_cuda

        return basis_attention_cuda(query, key, value, bias, correction, query_mean, scale)
    assert chosen == "torch"
    out = basis_attention_torch(query, key, value, bias, scale)
    if correction is not None and query_mean is not None:
        add_correction(out, query, correction, query_mean)
    return out


def check_correction(
    op: str,
    batch: int,
    key: torch.Tensor,
    value: torch.Tensor,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
) -> None:
    """Raise the error that a caller should see where these are no correction of the bases."""
    if correction is None and query_mean is None:
        return
    if correction is None or query_mean is None:
        lacking = "correction" if correction is None else "query_mean"
        raise ValueError(f"{op}: {lacking} is None; correction and query_mean go together")
    check_floating(op, key=key, correction=correction, query_mean=query_mean)
    heads, dim = key.shape[1], key.shape[-1]
    shapes = {
        "correction": (correction, (heads, dim + 1, value.shape[-1])),
        "query_mean": (query_mean, (heads, dim)),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape[1:]) != shape or tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"{op}: {name} is {list(tensor.shape)}; it must be "
                f"[{batch} or 1, {', '.join(map(str, shape))}]"
            )


def check_bases(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    names: tuple[str, str] = ("query", "key"),
) -> None:
    """Raise the error that a caller should see where the bases do not fit the queries.

    `names` are the arguments' names of `query` and `key`.
    """
    if query.ndim != 4:
        raise ValueError(f"{op}: {names[0]} must be [B, h, n, d], not {list(query.shape)}")
    check_width(op, names[0], query)
    batch, heads, _, dim = query.shape
    shapes = key.shape, value.shape
    for name, shape in zip((names[1], "value"), shapes, strict=True):
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] != heads:
            raise ValueError(
                f"{op}: {names[0]} is {list(query.shape)}, so {name} must be [{batch} or 1, "
                f"{heads}, K, ...], not {list(shape)}"
            )
    of_keys, of_values = shapes
    if of_keys[-1] != dim or of_keys[:-1] != of_values[:-1] or of_keys[-2] == 0:
        raise ValueError(
            f"{op}: {names[1]} {list(key.shape)} and value {list(value.shape)} must agree on all "
            f"but the last size, have at least one base, and {names[1]} must have d = {dim}, "
            f"that of {names[0]}"
        )


def fitting_bias(
    op: str, bias: torch.Tensor | None, query: torch.Tensor, num_bases: int
) -> torch.Tensor | None:
    """The bias as [B or 1, h or 1, K]; an error where it does not fit queries [B, h, ...]."""
    if bias is None:
        return None
    batch, heads = query.shape[:2]
    full = bias.unsqueeze(0) if bias.ndim == 2 else bias
    fits = (
        full.ndim == 3
        and full.shape[0] in (1, batch)
        and full.shape[1] in (1, heads)
        and full.shape[2] == num_bases
    )
    if not fits:
        raise ValueError(
            f"{op}: bias is {list(bias.shape)}; it must be [h, K] or [B, h, K] with "
            f"B = {batch} or 1, h = {heads} or 1, K = {num_bases}"
        )
    return full
