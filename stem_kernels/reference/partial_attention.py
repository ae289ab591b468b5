"""`partial_attention` in plain torch, one chunk of keys after the other."""

from __future__ import annotations

import math

import torch

from ..shared.outputs import compute_dtype, partial_output
from ..shared.tangents import forward_mode
from .chunks import groups, token_chunks, token_runs


def partial_attention_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, m, d], key [B, h, n, d], value [B, h, n, e].

    Returns the output [B, h, m, e] and the logsumexp [B, h, m], in float32 or float64.
    """
    if not forward_mode():
        return _operator(query, key, value, scale)
    # Of torch's own operators, because tangents do not pass through the one below.
    with torch.autocast(query.device.type, enabled=False):
        return _of_group(query.to(compute_dtype(query)) * (scale / math.log(2)), key, value)


def partial_attention_eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial_attention_torch` as a function of its own, which tangents do not pass through."""
    output, logsumexp = partial_output(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        for group in groups(key):
            scaled = query[group].to(output.dtype) * (scale / math.log(2))
            output[group], logsumexp[group] = _of_group(scaled, key[group], value[group])
    return output, logsumexp


def _of_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """With powers of two, of logits scaled for that: exp2 takes a third of exp's time on a CPU."""
    state = nothing = (
        query.new_full((*query.shape[:-1], 1), float("-inf")),
        query.new_zeros((*query.shape[:-1], 1)),
        query.new_zeros((*query.shape[:-1], value.shape[-1])),
    )
    for run in token_runs(key, max(1, query.shape[-2])):
        of_run = nothing
        for part in run:
            logits = query @ key[..., part, :].to(query.dtype).mT
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(_shift(peak)).exp2_()
            values = weights @ value[..., part, :].to(query.dtype)
            of_run = _joined(of_run, (peak, weights.sum(-1, keepdim=True), values))
        state = _joined(state, of_run)
    peak, mass, total = state
    return total / mass, ((peak + mass.log2()) * math.log(2)).squeeze(-1)


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of some keys: largest logit [..., m, 1], sums of weights [..., m, 1], and of weighted values."""


def _joined(one: State, other: State) -> State:
    peak = torch.maximum(one[0], other[0])
    ours, theirs = ((state[0] - _shift(peak)).exp2() for state in (one, other))
    mass, total = (one[i] * ours + other[i] * theirs for i in (1, 2))
    return peak, mass, total


def _shift(peak: torch.Tensor) -> torch.Tensor:
    """What is taken from logits; -inf - -inf is NaN, and later keys may have other logits."""
    return peak.masked_fill(peak == float("-inf"), 0.0)


# What makes no graph and needs no gradient calls the function itself: an operator's first call
# imports torch's compiler, which takes seconds.
_operator = torch.library.custom_op(
    "stem_kernels::partial_attention_torch", partial_attention_eager, mutates_args=()
)
_operator.register_fake(partial_output)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, grad_output, grad_logsumexp):  # type: ignore[no-untyped-def]
    """Makes each chunk's weights again, so the backward pass holds no more of them either."""
    query, key, value, output, logsumexp = ctx.saved_tensors
    grad_query = torch.zeros_like(query, dtype=output.dtype)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    # [B, h, m, 1]: what every weight's gradient is above that of its logit, divided by the weight.
    shift = ((grad_output * output).sum(-1) - grad_logsumexp).unsqueeze(-1)
    for group in groups(key):
        scaled, grads = query[group].to(output.dtype) * ctx.scale, grad_output[group]
        for part in token_chunks(key[group], max(1, query.shape[-2])):
            keys, values = (tensor[group][..., part, :].to(output.dtype) for tensor in (key, value))
            weights = (scaled @ keys.mT - logsumexp[group].unsqueeze(-1)).exp()
            of_logits = weights * (grads @ values.mT - shift[group])
            grad_query[group] += of_logits @ keys * ctx.scale
            grad_key[group][..., part, :] = (of_logits.mT @ scaled).to(key.dtype)
            grad_value[group][..., part, :] = (weights.mT @ grads).to(value.dtype)
    return grad_query.to(query.dtype), grad_key, grad_value, None


_operator.register_autograd(_backward, setup_context=_setup_context)
