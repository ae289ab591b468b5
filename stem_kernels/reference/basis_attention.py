"""`basis_attention` in plain torch, chunked so that [n, K] never exists for all n."""

from __future__ import annotations

import torch

from ..shared.outputs import attention_output, compute_dtype
from ..shared.tangents import forward_mode
from .chunks import groups, token_chunks
from .derivatives import differentiable_gradients


def _chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    logits = torch.matmul(query, key.mT * scale) + bias.unsqueeze(-2)
    return torch.matmul(torch.softmax(logits, dim=-1), value)


def _for_every_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    compute = compute_dtype(query)
    lead = (*query.shape[:2], key.shape[-2])
    bias = query.new_zeros(()) if bias is None else bias
    return (
        key.to(compute).expand(*lead, key.shape[-1]),
        value.to(compute).expand(*lead, value.shape[-1]),
        bias.to(compute).expand(lead),
    )


def basis_attention_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query [B, h, n, d], key [B or 1, h, K, d], value [B or 1, h, K, e], bias [.., .., K].

    Returns [B, n, h, e] of the query's dtype.
    """
    if not forward_mode():
        return _operator(query, key, value, bias, scale)
    return _of_operators(query, key, value, bias, scale)


def _of_operators(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The same of torch's own operators, because tangents do not pass through the one below."""
    key, value, bias = _for_every_head(query, key, value, bias)
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            _chunk_attention(query[..., part, :].to(key.dtype), key, value, bias, scale)
            for part in token_chunks(query, key.shape[-2])
        ]
    parts = parts or [attention_output(query, key, value).transpose(1, 2)]
    return torch.cat(parts, -2).to(query.dtype).transpose(1, 2).contiguous()


def basis_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`basis_attention_torch` as a function of its own, which tangents do not pass through."""
    key, value, bias = _for_every_head(query, key, value, bias)
    out = attention_output(query, key, value)
    by_head = out.transpose(1, 2)
    with torch.autocast(query.device.type, enabled=False):
        for group in groups(query):
            for part in token_chunks(query[group], key.shape[-2]):
                tokens = query[group][..., part, :].to(key.dtype)
                result = _chunk_attention(tokens, key[group], value[group], bias[group], scale)
                by_head[group][..., part, :] = result.to(query.dtype)
    return out


# What makes no graph and needs no gradient calls the function itself: an operator's first call
# imports torch's compiler, which takes seconds.
_operator = torch.library.custom_op(
    "stem_kernels::basis_attention_torch", basis_attention_eager, mutates_args=()
)
_operator.register_fake(attention_output)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, bias)


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    """Recomputes each chunk, so the backward pass holds no attention weights either."""
    if torch.is_grad_enabled():  # the gradients are to be differentiated again
        found = differentiable_gradients(
            lambda *given: (_of_operators(*given, ctx.scale),), ctx.saved_tensors, (grad_out,)
        )
        return *found, None
    query, *given = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        bases = _for_every_head(query.detach(), *leaves)
    grad_query = torch.empty_like(query)
    grad_bases = [torch.zeros_like(tensor) for tensor in bases]
    grad_by_head = grad_out.transpose(1, 2)
    for group in groups(query):
        for part in token_chunks(query[group], bases[0].shape[-2]):
            with torch.enable_grad():
                tokens = query[group][..., part, :].to(bases[0].dtype)
                inputs = [t.detach().requires_grad_() for t in (tokens, *(b[group] for b in bases))]
                result = _chunk_attention(*inputs, ctx.scale)
            grad_chunk = grad_by_head[group][..., part, :].to(result.dtype)
            grads = torch.autograd.grad(result, inputs, grad_chunk)
            grad_query[group][..., part, :] = grads[0].to(query.dtype)
            for total, grad in zip(grad_bases, grads[1:], strict=True):
                total[group] += grad
    present = [leaf for leaf in leaves if leaf is not None]
    outputs = [basis for basis, leaf in zip(bases, leaves, strict=True) if leaf is not None]
    totals = [grad for grad, leaf in zip(grad_bases, leaves, strict=True) if leaf is not None]
    reduced = iter(torch.autograd.grad(outputs, present, totals))
    return grad_query, *(None if leaf is None else next(reduced) for leaf in leaves), None


_operator.register_autograd(_backward, setup_context=_setup_context)


def add_correction(
    out: torch.Tensor, query: torch.Tensor, correction: torch.Tensor, query_mean: torch.Tensor
) -> None:
    """Add it in place to `out` [B, n, h, e], in float32 (float64 for float64 queries)."""
    compute = compute_dtype(query)
    matrix, constant = correction.to(compute).split([query.shape[-1], 1], dim=-2)
    mean = query_mean.to(compute).unsqueeze(-2)
    with torch.autocast(query.device.type, enabled=False):
        for part in token_chunks(query, sum(correction.shape[-2:])):
            # Subtracted first: in half precision the mean times E may hide what differs from it.
            added = (query[..., part, :].to(compute) - mean) @ matrix + constant
            out[:, part].add_(added.transpose(1, 2))
