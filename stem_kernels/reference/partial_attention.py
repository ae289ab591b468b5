"""`partial_attention` in plain torch, one chunk of keys after the other."""

from __future__ import annotations

import torch

from .chunks import compute_dtype, groups, token_chunks


def partial_attention_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, m, d], key [B, h, n, d], value [B, h, n, e].

    Returns the output [B, h, m, e] and the logsumexp [B, h, m], in float32 or float64.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(compute_dtype(query)) * scale
        found = [_of_group(query[group], key[group], value[group]) for group in groups(key)]
    outputs, sums = (
        torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*found, strict=True)
    )
    return outputs.unflatten(0, query.shape[:2]), sums.unflatten(0, query.shape[:2])


def _of_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    peak = query.new_full((*query.shape[:-1], 1), float("-inf"))
    mass = torch.zeros_like(peak)
    total = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    for part in token_chunks(key, max(1, query.shape[-2])):
        logits = query @ key[..., part, :].to(query.dtype).mT
        # The shift cancels out, so it needs no gradient, and logits can be overwritten.
        risen = torch.maximum(peak, logits.detach().amax(-1, keepdim=True))
        shrunk = (peak - risen).exp()
        weights = logits.sub_(risen).exp_()
        mass = mass * shrunk + weights.sum(-1, keepdim=True)
        total = total * shrunk + weights @ value[..., part, :].to(query.dtype)
        peak = risen
    return total / mass, (peak + mass.log()).squeeze(-1)
