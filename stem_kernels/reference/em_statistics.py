"""`em_statistics` in plain torch, chunked so that [n, K] never exists for all n."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..shared.bases import directions_of
from ..shared.outputs import compute_dtype, statistics_output
from ..shared.tangents import forward_mode
from .chunks import groups, token_chunks, token_runs
from .derivatives import differentiable_gradients

# A weight of e^-80 counts for nothing beside the largest, which is at least 1 / K, but below e^-87
# torch's vectorised exp leaves its fast path: with tau = 0.01 that doubles the softmax's time.
NEGLIGIBLE = 80.0


def em_statistics_torch(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, h, n, D], bases [B, h, K, D], payload [B, h, n, E] or None.

    Returns sums, mass and payload sums (E = 0 without a payload), in float32 or float64.
    """
    if not forward_mode():
        return _operator(features, bases, payload, temperature, normalize)
    return _of_operators(features, bases, payload, temperature, normalize)


def _of_operators(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of torch's own operators, because tangents do not pass through the one below."""
    values = features[..., :0] if payload is None else payload
    compute = compute_dtype(features)
    weights = directions_of(bases.to(compute), normalize).mT / temperature
    found = list(_zeros(features, bases, values))
    with torch.autocast(features.device.type, enabled=False):
        for part in token_chunks(features, bases.shape[-2]):
            tokens, chunk = (tensor[..., part, :].to(compute) for tensor in (features, values))
            added = _of_chunk(tokens, weights, chunk)
            found = [total + of_chunk for total, of_chunk in zip(found, added, strict=True)]
    sums, mass, payload_sums = found
    return sums, mass, payload_sums


def _of_chunk(
    tokens: torch.Tensor, weights: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The statistics of some tokens; weights [..., D, K] are directions over the temperature."""
    responsibilities = torch.softmax(torch.matmul(tokens, weights), dim=-1)
    return (
        torch.matmul(responsibilities.mT, tokens),
        responsibilities.sum(-2),
        torch.matmul(responsibilities.mT, values),
    )


def em_statistics_eager(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`em_statistics_torch` as a function of its own, which tangents do not pass through."""
    compute = compute_dtype(features)
    values = features[..., :0] if payload is None else payload
    directions = directions_of(bases.to(compute), normalize).mT / temperature
    outputs = _zeros(features, bases, values)
    for group in groups(features):
        weights = directions[group].flatten(0, 1)
        logits = responsibilities = weights.new_empty(0)
        for run in token_runs(features[group], bases.shape[-2]):
            # x^T z, not z^T x: BLAS is a quarter faster with the long side of z last.
            sums, payload_sums = (
                weights.new_zeros((weights.shape[0], tensor.shape[-1], weights.shape[-1]))
                for tensor in (features, values)
            )
            mass = weights.new_zeros((weights.shape[0], weights.shape[-1]))
            for _, tokens, chunk in _chunks(features[group], values[group], run):
                shape = (*tokens.shape[:-1], weights.shape[-1])
                if logits.shape != shape:
                    logits, responsibilities = weights.new_empty(2, *shape).unbind()
                torch.bmm(tokens, weights, out=logits)
                floor = torch.amax(logits, dim=-1, keepdim=True) - NEGLIGIBLE
                torch.maximum(logits, floor, out=logits)
                torch.softmax(logits, dim=-1, out=responsibilities)
                sums.baddbmm_(tokens.mT, responsibilities)
                mass += responsibilities.sum(-2)
                if payload is not None:
                    payload_sums.baddbmm_(chunk.mT, responsibilities)
            for output, of_run in zip(outputs, (sums.mT, mass, payload_sums.mT), strict=True):
                output[group] += of_run.view_as(output[group])
    return outputs


# What makes no graph and needs no gradient calls the function itself: an operator's first call
# imports torch's compiler, which takes seconds.
_operator = torch.library.custom_op(
    "stem_kernels::em_statistics_torch", em_statistics_eager, mutates_args=()
)
_operator.register_fake(statistics_output)


def _zeros(
    features: torch.Tensor, bases: torch.Tensor, payload: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    compute = compute_dtype(features)
    lead = (*features.shape[:2], bases.shape[-2])
    return (
        features.new_zeros((*lead, features.shape[-1]), dtype=compute),
        features.new_zeros(lead, dtype=compute),
        features.new_zeros((*lead, payload.shape[-1]), dtype=compute),
    )


def _chunks(
    features: torch.Tensor, payload: torch.Tensor, parts: Iterable[slice]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    compute = compute_dtype(features)
    for part in parts:
        yield (
            part,
            features[..., part, :].flatten(0, 1).to(compute),
            payload[..., part, :].flatten(0, 1).to(compute),
        )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, bases, payload, ctx.temperature, ctx.normalize = inputs
    ctx.save_for_backward(features, bases, payload)


def _backward(ctx, grad_sums, grad_mass, grad_payload_sums):  # type: ignore[no-untyped-def]
    """Recomputes each chunk, so the backward pass holds no responsibilities either."""
    if torch.is_grad_enabled():  # the gradients are to be differentiated again
        found = differentiable_gradients(
            lambda *given: _of_operators(*given, ctx.temperature, ctx.normalize),
            ctx.saved_tensors,
            (grad_sums, grad_mass, grad_payload_sums),
        )
        return *found, None, None
    features, bases, payload = ctx.saved_tensors
    values = features[..., :0] if payload is None else payload
    compute = compute_dtype(features)
    grad_features = torch.empty_like(features)
    grad_values = torch.empty_like(values)
    with torch.enable_grad():
        leaf = bases.detach().to(compute).requires_grad_()
        directions = directions_of(leaf, ctx.normalize).mT / ctx.temperature
    grad_directions = torch.zeros_like(directions)
    for group in groups(features):
        grads_out = [g[group].flatten(0, 1) for g in (grad_sums, grad_mass, grad_payload_sums)]
        weights = directions[group].flatten(0, 1)
        parts = token_chunks(features[group], bases.shape[-2])
        for part, tokens, chunk in _chunks(features[group], values[group], parts):
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (tokens, weights, chunk)]
                outputs = _of_chunk(*inputs)
            grads = torch.autograd.grad(outputs, inputs, grads_out)
            grad_tokens, grad_chunk = grad_features[group], grad_values[group]
            grad_tokens[..., part, :] = grads[0].view_as(grad_tokens[..., part, :])
            grad_chunk[..., part, :] = grads[2].view_as(grad_chunk[..., part, :])
            grad_directions[group] += grads[1].view_as(grad_directions[group])
    (grad_bases,) = torch.autograd.grad(directions, leaf, grad_directions)
    return (
        grad_features,
        grad_bases.to(bases.dtype),
        None if payload is None else grad_values,
        None,
        None,
    )


_operator.register_autograd(_backward, setup_context=_setup_context)
