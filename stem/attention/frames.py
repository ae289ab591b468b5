"""Dense attention across frames: to a few of them (sparse-causal), or to all (inflated)."""

from __future__ import annotations

import psutil
import torch
from diffusers.models.attention_processor import Attention
from torch.nn.functional import scaled_dot_product_attention

from ..config import SparseCausalConfig
from .processor import RowLayout, VideoAttentionProcessor, project_keys_and_values


class SparseCausalProcessor(VideoAttentionProcessor):
    """Each frame attends to the frames that `SparseCausalConfig.frames` names."""

    def __init__(self, name: str, layout: RowLayout, config: SparseCausalConfig) -> None:
        super().__init__(name, layout)
        self.seen = config.frames

    def attend(self, attn: Attention, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        videos, frames, num_tokens, _ = tokens.shape
        key, value = project_keys_and_values(attn, tokens, videos)
        seen = seen_frames(self.seen, frames).to(tokens.device)

        # [videos, h, frames * S, d] -> [videos * frames, h, len(seen) * S, d]
        def gathered(per_video: torch.Tensor) -> torch.Tensor:
            per_frame = per_video.unflatten(2, (frames, num_tokens))
            chosen = per_frame[:, :, seen].flatten(3, 4)
            return chosen.transpose(1, 2).flatten(0, 1)

        per_frame_query = query.unflatten(2, (frames, num_tokens)).transpose(1, 2).flatten(0, 1)
        attended = scaled_dot_product_attention(per_frame_query, gathered(key), gathered(value))
        return attended.unflatten(0, (videos, frames)).transpose(1, 2).flatten(2, 3)


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

    def attend(self, attn: Attention, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        key, value = project_keys_and_values(attn, tokens, tokens.shape[0])
        if not torch.compiler.is_compiling():
            check_memory(self.name, query, key, value)
        return scaled_dot_product_attention(query, key, value)


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


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return psutil.virtual_memory().available
