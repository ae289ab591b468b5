"""`nearest_token` in plain torch, in tiles, so that [n, m] never exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shared.cosine import inverse_norms
from ..shared.outputs import compute_dtype, nearest_output
from .chunks import GPU_LOGITS

# A tile of products, 1 MiB of float32, is still in a core's cache when its maxima are looked for.
# A GPU wants larger launches.
KEYS = 1024
# On a CPU amax uses vectors and a search for a maximum's place does not. It is made in one group of
# a row only, which takes 0.09 ms a tile in place of 0.23 (on an EPYC).
GROUP = 32
CPU_QUERIES = 256
GPU_QUERIES = GPU_LOGITS // KEYS


@torch.library.custom_op("stem_kernels::nearest_token_torch", mutates_args=())
def nearest_token_torch(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query [B, n, d], keys [B, m, d] -> int32 [B, n]."""
    compute = compute_dtype(query)
    found = nearest_output(query)
    rows = CPU_QUERIES if query.device.type == "cpu" else GPU_QUERIES
    with torch.autocast(query.device.type, enabled=False):
        directions = keys.to(compute) * inverse_norms(keys).unsqueeze(-1)
        # A key with NaN or infinity must not be found, nor keep others from it: a maximum is NaN
        # where one number is. What is added to its products is -inf.
        finite = directions.isfinite().all(-1)
        directions.masked_fill_(~finite.unsqueeze(-1), 0.0)
        penalties = torch.zeros_like(finite, dtype=compute).masked_fill_(~finite, float("-inf"))
        for batch in range(query.shape[0]):
            parts = [
                part.split(KEYS, dim=-1)
                for part in (directions[batch].mT, penalties[batch].unsqueeze(0))
            ]
            for tokens, result in zip(
                query[batch].split(rows), found[batch].split(rows), strict=True
            ):
                if len(tokens):
                    result.copy_(_nearest(tokens.to(compute), list(zip(*parts, strict=True))))
    return found


def _nearest(
    query: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Parts of the keys' directions [d, KEYS at most], and what is added to products [1, KEYS]."""
    best = query.new_full((len(query),), float("-inf"))
    found = torch.zeros_like(best, dtype=torch.int64)
    tile = query.new_empty((len(query), -(-parts[0][0].shape[1] // GROUP) * GROUP))
    for part, (keys, penalties) in enumerate(parts):
        count = keys.shape[1]
        groups = -(-count // GROUP)
        torch.addmm(penalties, query, keys, out=tile[:, :count])
        tile[:, count : groups * GROUP] = float("-inf")
        largest, index = _first_largest(tile[:, : groups * GROUP].unflatten(1, (groups, GROUP)))
        better = largest > best  # not >=: of equal ones the first counts
        found = torch.where(better, index + part * KEYS, found)
        best = torch.where(better, largest, best)
    return found


def _first_largest(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [n, groups, GROUP] the largest of each row, [n], and the first place in the row."""
    largest, group = products.amax(-1).max(-1)
    chosen = group[:, None, None].expand(-1, 1, GROUP)
    return largest, group * GROUP + products.gather(1, chosen).squeeze(1).argmax(-1)


nearest_token_torch.register_fake(nearest_output)
