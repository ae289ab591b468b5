"""Dense attention across frames: to a few of them (sparse-causal), or to all (inflated)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...config import SparseCausalConfig
from ..waiting.memory import free_bytes
from ..waiting.parked import current_parking
from .exchange import Lockstep
from .hooks import Hooks, Operands
from .processor import VideoAttentionProcessor
from .projections import project_keys_and_values, project_queries
from .rows import RowLayout

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


KEYS_AT_ONCE = 16384
"""Tokens of the video that `attend_by_parts` reads before it gives up their memory."""


class SparseCausalProcessor(VideoAttentionProcessor):
    """Each frame attends to the frames that `SparseCausalConfig.frames` names."""

    def __init__(
        self, name: str, layout: RowLayout, hooks: Hooks, config: SparseCausalConfig
    ) -> None:
        super().__init__(name, layout, hooks)
        self.seen = config.frames

    def operands(self, attn: Attention, tokens: torch.Tensor) -> Operands:
        videos, frames, num_tokens, _ = tokens.shape
        key, value = (
            per_video.unflatten(2, (frames, num_tokens))
            for per_video in project_keys_and_values(attn, tokens, videos)
        )
        if self.layout.exchange is None:
            seen = seen_frames(self.seen, frames)
        else:
            key, value, seen = self._with_neighbours(self.layout.exchange, key, value)
        seen = seen.to(tokens.device)

        # [videos, h, frames, S, d] -> [videos, frames, h, len(seen) * S, d]
        def gathered(per_frame: torch.Tensor) -> torch.Tensor:
            return per_frame[:, :, seen].flatten(3, 4).transpose(1, 2)

        query = project_queries(attn, tokens).unflatten(2, (frames, num_tokens)).transpose(1, 2)
        return Operands(query, gathered(key), gathered(value))

    def _with_neighbours(
        self, exchange: Lockstep, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of what other chunks' frames see and of the running chunk's own frames,
        and where among them each of these finds what it sees."""
        seen = seen_frames(self.seen, exchange.num_frames)
        offered = []
        first = 0
        for frames in exchange.chunks:
            own = range(first, first + len(frames))
            others = torch.cat([seen[: own.start], seen[own.stop :]]).unique().tolist()
            offered.append([frame for frame in others if frame in own])
            first = own.stop
        mine = [frame - exchange.position for frame in offered[exchange.number]]
        keys, values = exchange.meet(
            (key[:, :, mine], value[:, :, mine]),
            lambda parts: tuple(torch.cat(column, dim=2) for column in zip(*parts, strict=True)),
            counts=[len(frames) for frames in offered],
            dim=2,
        )
        own = range(exchange.position, exchange.position + len(exchange.running))
        held = [frame for frames in offered for frame in frames]
        places = {frame: place for place, frame in enumerate([*held, *own])}
        found = [[places[frame] for frame in row] for row in seen[own.start : own.stop].tolist()]
        return (
            torch.cat([keys, key], dim=2),
            torch.cat([values, value], dim=2),
            torch.tensor(found),
        )


def seen_frames(seen: tuple[int | str, ...], frames: int) -> torch.Tensor:
    """int64 [frames, len(seen)]: the indices of the frames that each frame attends to."""
    own = torch.arange(frames)
    named = {"first": 0, "mid": frames // 2, "last": frames - 1}
    columns = [
        torch.full_like(own, named[frame])
        if isinstance(frame, str)
        else (own + frame).clamp(0, frames - 1)
        for frame in seen
    ]
    return torch.stack(columns, dim=1)


class InflatedProcessor(VideoAttentionProcessor):
    """Every token attends to every token of its video, through SDPA."""

    def operands(self, attn: Attention, tokens: torch.Tensor) -> Operands:
        return all_frame_operands(attn, tokens, self.layout.exchange)

    def attend(self, operands: Operands) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            query, key, value = (
                part.flatten(0, 1) for part in (operands.query, operands.key, operands.value)
            )
            check_memory(self.name, query, key, value)
            if key.device.type == "cpu" and not torch.is_grad_enabled():
                attended = attend_by_parts(query, key, value)
                return attended.unflatten(0, operands.query.shape[:2])
        return super().attend(operands)


def all_frame_operands(
    attn: Attention, tokens: torch.Tensor, exchange: Lockstep | None
) -> Operands:
    """Queries of the tokens in hand [videos, frames, S, C], keys and values of the whole video.

    Keys and values of a CPU lie in files where chunks wait in files.
    """
    key, value = project_keys_and_values(attn, tokens, tokens.shape[0])
    if exchange is not None:
        key, value = exchange.meet(
            (key, value),
            lambda parts: tuple(
                current_parking().joined(column, 2, waited=True)
                for column in zip(*parts, strict=True)
            ),
            counts=[len(frames) * tokens.shape[2] for frames in exchange.chunks],
            dim=2,
        )
    query = project_queries(attn, tokens)
    return Operands(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))


def attend_by_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention on a CPU to some tokens after others, whose memory is given up where it has a file.

    Outputs o_i of parts with the logsumexp l_i of their logits are sum_i exp(l_i - l) o_i, where
    l is the logsumexp of all l_i.

    Args:
        query: Queries [B, h, m, d].
        key: Keys [B, h, n, d].
        value: Values [B, h, n, d].

    Returns:
        [B, h, m, d] of the queries' dtype; of at most `KEYS_AT_ONCE` tokens, what SDPA returns.

    Source: arXiv 2205.14135, section 3.1.
    """
    if key.shape[2] <= KEYS_AT_ONCE:
        return scaled_dot_product_attention(query, key, value)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = zip(key.split(KEYS_AT_ONCE, 2), value.split(KEYS_AT_ONCE, 2), strict=True)
    output, total = attend(query, *next(parts))
    current_parking().leave()
    for keys, values in parts:
        part, logsumexp = attend(query, keys, values)
        together = torch.logaddexp(total, logsumexp)
        shares = ((each - together).exp().unsqueeze(-1) for each in (total, logsumexp))
        output = next(shares) * output + next(shares) * part
        total = together
        current_parking().leave()
    return output.to(query.dtype)


def check_memory(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise before an attention over all frames takes more memory than there is.

    Raises:
        MemoryError: with the bytes needed and the bytes free.
    """
    needed = query.numel() * query.element_size()
    if not _fused(query, key, value):
        # Without a fused kernel SDPA holds logits and weights, in float32 for half input.
        needed += 2 * 4 * query.shape[:3].numel() * key.shape[2]
    free = free_bytes(query.device)
    if needed > free:
        raise MemoryError(
            f"{name}: attention of {query.shape[2]:,} tokens to all {key.shape[2]:,} tokens of "
            f"the video needs {needed:,} bytes on {query.device}, and {free:,} are free. Take "
            "fewer or smaller frames, half precision, or another method (stem does not grow so)"
        )


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    if query.device.type != "cuda":
        return True
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(
        params
    ) or torch.backends.cuda.can_use_efficient_attention(params)
