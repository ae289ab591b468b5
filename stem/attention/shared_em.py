"""Soft EM over the tokens of all chunks of a video, one chunk in hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from stem_kernels import em_statistics, em_update
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.shared.bases import candidate_tokens
from stem_kernels.shared.spread import spread_tokens

from ..config import StemConfig
from .exchange import Lockstep, Tensors, in_order


def shared_em(
    exchange: Lockstep,
    config: StemConfig,
    features: torch.Tensor,
    payload: torch.Tensor | None,
    normals: torch.Tensor | None,
) -> SoftEM:
    """`initial_bases` and `soft_em` over the whole video, of which `features` are one chunk.

    Every chunk of the exchange calls this; they meet twice before the first iteration at most
    (once for tokens to start from) and once in each iteration.

    Args:
        exchange: Exchange in which the chunks meet.
        config: Configuration of the EM.
        features: Tokens [videos, (h,) n, D] of the running chunk, frame after frame.
        payload: Values [videos, (h,) n, E] that ride along, or None.
        normals: Standard normals [(h,) K, D] for `init="gaussian"`, or None.

    Returns:
        The bases of the whole video, the same for every chunk.
    """
    tokens = features.shape[-2] // len(exchange.running)
    total = tokens * exchange.num_frames
    if normals is None:
        start = gathered_tokens(exchange, features, spread_tokens(total, config.num_bases, CPU))
        bases = start.to(torch.promote_types(features.dtype, torch.float32))
    else:
        mean, std = _moments(exchange, features, total)
        bases = mean + std * normals
    candidates = None
    if config.empty == "reseed" and config.num_iters > 1:
        index = candidate_tokens(total, config.num_bases, CPU)
        candidates = gathered_tokens(exchange, features, index)
    found = SoftEM(bases, None, bases[..., 0])
    for iteration in range(config.num_iters):
        last = iteration == config.num_iters - 1
        empty = "mask" if last and config.empty == "reseed" else config.empty
        statistics = em_statistics(
            features,
            found.bases,
            temperature=config.temperature,
            payload=payload if last else None,
            backend=config.backend,
        )
        brought = tuple(tensor for tensor in statistics if tensor is not None)
        found = exchange.meet(brought, _m_step(config, found.bases, total, empty, candidates))
    return found


CPU = torch.device("cpu")


def _m_step(
    config: StemConfig,
    bases: torch.Tensor,
    num_tokens: int,
    empty: str,
    candidates: torch.Tensor | None,
) -> Callable[[list[Tensors]], SoftEM]:
    def merge(parts: list[Tensors]) -> SoftEM:
        sums, mass, *payload_sums = in_order(parts)
        return em_update(
            sums,
            mass,
            bases,
            num_tokens=num_tokens,
            empty=empty,
            payload_sums=payload_sums[0] if payload_sums else None,
            candidates=candidates,
            backend=config.backend,
        )

    return merge


def gathered_tokens(
    exchange: Lockstep, features: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Tokens of the whole video, by their numbers in it.

    Args:
        exchange: Exchange in which the chunks meet.
        features: Tokens [..., n, D] of the running chunk.
        index: Numbers of the tokens wanted, int64 [m] on the CPU, ascending.

    Returns:
        [..., m, D].
    """
    tokens = features.shape[-2] // len(exchange.running)
    edges, seen = [0], 0
    for frames in exchange.chunks:
        seen += len(frames) * tokens
        edges.append(int(torch.searchsorted(index, seen)))
    counts = [end - start for start, end in pairwise(edges)]
    start = edges[exchange.number]
    own = index[start : start + counts[exchange.number]] - exchange.position * tokens
    mine = features.index_select(-2, own.to(features.device))
    return exchange.meet(
        (mine,),
        lambda parts: torch.cat([part for (part,) in parts], dim=-2),
        counts=counts,
        dim=features.ndim - 2,
    )


def _moments(
    exchange: Lockstep, features: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation over all tokens, rounded as one batch's would be."""

    def total(parts: list[Tensors]) -> torch.Tensor:
        return in_order(parts)[0]

    # float64, in which torch too adds up the moments of float32 on a CPU.
    sums = exchange.meet((features.sum(-2, keepdim=True, dtype=torch.float64),), total)
    mean = sums / num_tokens
    squares = (features.double() - mean).square().sum(-2, keepdim=True)
    std = (exchange.meet((squares,), total) / max(1, num_tokens - 1)).sqrt()
    compute = torch.promote_types(features.dtype, torch.float32)
    return mean.to(features.dtype).to(compute), std.to(features.dtype).to(compute)
