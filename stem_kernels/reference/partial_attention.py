"""`partial_attention` in plain torch, one chunk of keys after the other."""

from __future__ import annotations

import math

import torch

from ..shared.outputs import partial_output
from .chunks import groups, token_chunks


def partial_attention_eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, m, d], key [B, h, n, d], value [B, h, n, e].

    Returns the output [B, h, m, e] and the logsumexp [B, h, m], in float32 or float64.
    """
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
    peak = query.new_full((*query.shape[:-1], 1), float("-inf"))
    mass = torch.zeros_like(peak)
    total = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    for part in _key_chunks(query, key):
        logits = query @ key[..., part, :].to(query.dtype).mT
        risen = torch.maximum(peak, logits.amax(-1, keepdim=True))
        shrunk = (peak - risen).exp2()
        weights = logits.sub_(risen).exp2_()
        mass = mass * shrunk + weights.sum(-1, keepdim=True)
        total = total * shrunk + weights @ value[..., part, :].to(query.dtype)
        peak = risen
    return total / mass, ((peak + mass.log2()) * math.log(2)).squeeze(-1)


def _key_chunks(query: torch.Tensor, key: torch.Tensor) -> list[slice]:
    return list(token_chunks(key, max(1, query.shape[-2])))


# What makes no graph and needs no gradient calls the function itself: an operator's first call
# imports torch's compiler, which takes seconds.
partial_attention_torch = torch.library.custom_op(
    "stem_kernels::partial_attention_torch", partial_attention_eager, mutates_args=()
)
partial_attention_torch.register_fake(partial_output)


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
        for part in _key_chunks(scaled, key[group]):
            keys, values = (tensor[group][..., part, :].to(output.dtype) for tensor in (key, value))
            weights = (scaled @ keys.mT - logsumexp[group].unsqueeze(-1)).exp()
            of_logits = weights * (grads @ values.mT - shift[group])
            grad_query[group] += of_logits @ keys * ctx.scale
            grad_key[group][..., part, :] = (of_logits.mT @ scaled).to(key.dtype)
            grad_value[group][..., part, :] = (weights.mT @ grads).to(value.dtype)
    return grad_query.to(query.dtype), grad_key, grad_value, None


partial_attention_torch.register_autograd(_backward, setup_context=_setup_context)
