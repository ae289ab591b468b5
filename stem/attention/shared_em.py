"""Soft EM over the tokens of all chunks of a video, one chunk in hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from stem_kernels import em_statistics, em_update
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.shared.bases import candidate_tokens
from stem_kernels.shared.spread import spread_tokens

from ..config import StemConfig
from .exchange import Lockstep, Tensors, in_order

Found = TypeVar("Found")


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
        payload: Values [videos, (h,) n, E], averaged by the same weights, or None.
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
    """Tokens [..., m, D] of the whole video, by their numbers in it; arguments as `gathered`."""
    return gathered(exchange, features, index, lambda tokens: tokens)


def gathered(
    exchange: Lockstep,
    features: torch.Tensor,
    index: torch.Tensor,
    made: Callable[[torch.Tensor], Found],
) -> Found:
    """What is made of tokens of the whole video; every chunk of this process takes the same.

    Args:
        exchange: Exchange in which the chunks meet.
        features: Tokens [..., n, D] of the running chunk.
        index: Numbers of the tokens wanted, int64 [m] on the CPU, ascending.
        made: Function of the tokens [..., m, D], called once.
    """
    tokens = features.shape[-2] // len(exchange.running)
    edges = _edges(exchange, index, tokens)
    counts = [end - start for start, end in pairwise(edges)]
    own = own_tokens(exchange, index, tokens)
    mine = features.index_select(-2, own.to(features.device))
    return exchange.meet(
        (mine,),
        lambda parts: made(torch.cat([part for (part,) in parts], dim=-2)),
        counts=counts,
        dim=features.ndim - 2,
    )


def own_tokens(exchange: Lockstep, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which of some tokens of the whole video are the running chunk's, by their numbers in it.

    Args:
        exchange: Exchange in which the chunks meet.
        index: Numbers of the tokens in the video, int64 [m] on the CPU, ascending.
        tokens: Number of tokens a frame.
    """
    start, end = _edges(exchange, index, tokens)[exchange.number :][:2]
    return index[start:end] - exchange.position * tokens


def _edges(exchange: Lockstep, index: torch.Tensor, tokens: int) -> list[int]:
    """Where in an ascending index the tokens of each chunk begin, and the end of the last."""
    ends = torch.tensor([len(frames) * tokens for frames in exchange.chunks]).cumsum(0)
    return [0, *torch.searchsorted(index, ends).tolist()]


class _Sample(Generic[Found]):
    """Tokens of the whole video, and what is made of them by the first chunk that goes on.

    Not where they are gathered: what a chunk has entered, such as autocast, holds in it alone.

    Args:
        tokens: Tokens [videos, m, C].
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens: torch.Tensor | None = tokens
        self._found: Found | None = None

    def find(self, made: Callable[[torch.Tensor], Found]) -> Found:
        """What is made of the tokens; later chunks take what the first one found."""
        if self._tokens is not None:
            self._found = made(self._tokens)
            self._tokens = None
        assert self._found is not None
        return self._found


def of_spread_tokens(
    features: torch.Tensor,
    count: int,
    exchange: Lockstep | None,
    made: Callable[[torch.Tensor], Found],
    *,
    other: bool = False,
) -> Found:
    """What is made of some of a video's tokens, spread evenly over it, whatever its chunks.

    Args:
        features: Tokens [videos, n, C], of the running chunk where there is an exchange.
        count: Number of tokens wanted at most.
        exchange: Exchange in which the chunks meet, once; None: the tokens are whole videos'.
        made: Function of the tokens [videos, m, C], called once in this process; it meets nobody.
        other: Whether they are others than those that EM starts from, see `spread_tokens`.
    """
    if exchange is None:
        total = features.shape[1]
        if count >= total:
            return made(features)
        return made(features.index_select(1, _places(total, count, other, features.device)))
    total = features.shape[1] // len(exchange.running) * exchange.num_frames
    index = spread_tokens(total, min(total, count), CPU, other=other)
    sample: _Sample[Found] = gathered(exchange, features, index, _Sample)
    return sample.find(made)


_known: dict[tuple[int, int, bool, torch.device], torch.Tensor] = {}


def _places(num_tokens: int, count: int, other: bool, device: torch.device) -> torch.Tensor:
    """`spread_tokens`, made once for each number of tokens: it takes eight small kernels."""
    key = (num_tokens, count, other, device)
    if torch.compiler.is_compiling():
        return spread_tokens(num_tokens, count, device, other=other)
    if key not in _known:
        with torch.inference_mode(False):
            found = spread_tokens(num_tokens, count, device, other=other)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if type(found) is not torch.Tensor or capturing:  # a fake one, or not yet filled
            return found
        _known[key] = found
    return _known[key]


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
