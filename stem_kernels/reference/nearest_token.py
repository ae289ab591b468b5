"""`nearest_token` in plain torch, in tiles, so that [n, m] never exists."""

from __future__ import annotations

import torch

from ..shared.cosine import inverse_norms
from .chunks import GPU_LOGITS, compute_dtype

# A tile of products, 1 MiB of float32, is still in a core's cache when its maxima are looked for.
# A GPU wants larger launches.
KEYS = 1024
CPU_QUERIES = 256
GPU_QUERIES = GPU_LOGITS // KEYS


@torch.library.custom_op("stem_kernels::nearest_token_torch", mutates_args=())
def nearest_token_torch(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query [B, n, d], keys [B, m, d] -> int32 [B, n]."""
    compute = compute_dtype(query)
    found = _empty_output(query)
    rows = CPU_QUERIES if query.device.type == "cpu" else GPU_QUERIES
    with torch.autocast(query.device.type, enabled=False):
        directions = keys.to(compute) * inverse_norms(keys).unsqueeze(-1)
        for batch in range(query.shape[0]):
            parts = directions[batch].split(KEYS)
            for tokens, result in zip(
                query[batch].split(rows), found[batch].split(rows), strict=True
            ):
                if len(tokens):
                    result.copy_(_nearest(tokens.to(compute), parts))
    return found


def _nearest(query: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    best = query.new_full((len(query),), float("-inf"))
    found = torch.zeros_like(best, dtype=torch.int64)
    tile = query.new_empty((len(query), len(parts[0])))
    for part, keys in enumerate(parts):
        products = tile[:, : len(keys)]
        torch.mm(query, keys.mT, out=products)
        largest, index = products.max(dim=-1)
        better = largest > best  # not >=: of equal ones the first counts
        found = torch.where(better, index + part * KEYS, found)
        best = torch.where(better, largest, best)
    return found


@nearest_token_torch.register_fake
def _(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return _empty_output(query)


def _empty_output(query: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.int32)
