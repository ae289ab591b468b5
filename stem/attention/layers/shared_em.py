"""Soft EM over the tokens of all chunks of a video, one chunk in hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import torch

from stem_kernels import em_statistics, em_update
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.shared.bases import num_candidates
from stem_kernels.shared.spread import spread_tokens

from ...config import StemConfig
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
        start = _gathered(exchange, features, config.num_bases, False, lambda tokens: tokens)
        bases = start.to(torch.promote_types(features.dtype, torch.float32))
    else:
        mean, std = _moments(exchange, features, total)
        bases = mean + std * normals
    candidates = None
    if config.empty == "reseed" and config.num_iters > 1:
        count = num_candidates(total, config.num_bases)
        candidates = _gathered(exchange, features, count, False, lambda tokens: tokens)
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


def _gathered(
    exchange: Lockstep,
    features: torch.Tensor,
    count: int,
    other: bool,
    made: Callable[[torch.Tensor], Found],
) -> Found:
    """What is made of tokens spread over the whole video, once for all chunks of this process.

    Args:
        exchange: Exchange in which the chunks meet.
        features: Tokens [..., n, D] of the running chunk.
        count: Number m of tokens.
        other: Whether they are others than those that EM starts from.
        made: Function of the tokens [..., m, D].
    """
    places = _places_of(exchange, features, count, other)
    return exchange.meet(
        (features.index_select(-2, places.own(exchange)),),
        lambda parts: made(torch.cat([part for (part,) in parts], dim=-2)),
        counts=[end - start for start, end in pairwise(places.edges)],
        dim=features.ndim - 2,
    )


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
        whole = count >= features.shape[1]
        return made(features if whole else spread_over(features, count, None, other=other))
    total = features.shape[1] // len(exchange.running) * exchange.num_frames
    sample: _Sample[Found] = _gathered(exchange, features, min(total, count), other, _Sample)
    return exchange.share(sample.find(made))


def spread_over(
    features: torch.Tensor, count: int, exchange: Lockstep | None, *, other: bool = False
) -> torch.Tensor:
    """Those of a video's `spread_tokens` that are at hand: [videos, m, C].

    Args:
        features: Tokens [videos, n, C], of the running chunk where there is an exchange.
        count: Number of tokens of the whole video.
        exchange: Exchange in which the chunks meet; None: the tokens are whole videos'.
        other: Whether they are others than those that EM starts from.
    """
    if exchange is not None:
        return features.index_select(1, _places_of(exchange, features, count, other).own(exchange))
    if torch.compiler.is_compiling():
        index = spread_tokens(features.shape[1], count, features.device, other=other)
    else:
        index = _places((features.shape[1],), count, other, features.device).index
    return features.index_select(1, index)


@dataclass(frozen=True)
class _Places:
    """Tokens that stand for a video.

    Args:
        index: Numbers of the tokens in the video, int64 [m], ascending.
        edges: Where in it the tokens of each chunk begin, and the end of the last.
        begins: Numbers of the chunks' first tokens.
    """

    index: torch.Tensor
    edges: Sequence[int]
    begins: Sequence[int]

    def own(self, exchange: Lockstep) -> torch.Tensor:
        """The tokens that are in the running chunk, by their numbers in it."""
        chunk = exchange.number
        return self.index[self.edges[chunk] : self.edges[chunk + 1]] - self.begins[chunk]


def _places_of(exchange: Lockstep, features: torch.Tensor, count: int, other: bool) -> _Places:
    tokens = features.shape[-2] // len(exchange.running)
    lengths = tuple(len(frames) * tokens for frames in exchange.chunks)
    return _places(lengths, count, other, features.device)


MOST_KNOWN = 64
_known: dict[tuple[tuple[int, ...], int, bool, torch.device], _Places] = {}


def _places(lengths: tuple[int, ...], count: int, other: bool, device: torch.device) -> _Places:
    """`spread_tokens` of chunks of so many tokens, found once: on a GPU by eight small kernels."""
    key = (lengths, count, other, device)
    if key in _known:
        return _known[key]
    *begins, total = accumulate(lengths, initial=0)
    with torch.inference_mode(False):
        index = spread_tokens(total, count, device, other=other)
        edges = [0, count]
        if begins != [0]:
            on_cpu = spread_tokens(total, count, torch.device("cpu"), other=other)
            edges = torch.searchsorted(on_cpu, torch.tensor([*begins, total])).tolist()
    found = _Places(index, edges, begins)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(index) is torch.Tensor and not capturing:  # no fake one, and filled
        while len(_known) >= MOST_KNOWN:
            _known.pop(next(iter(_known)))
        _known[key] = found
    return found


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
