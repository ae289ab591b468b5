"""The processor in a video transformer's self-attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stem_kernels.video import video_attention

from .dense_heads import exact_attention, with_dense_heads
from .family import Projected, Rotary
from .state import VideoState


class VideoProcessor:
    """Takes the place of the model's own processor in the self-attention of one block.

    Args:
        name: Name of the attention in the model.
        block: Number of the block.
        own: Processor that it stands in for, which runs where a layer is dense.
        state: State that the layers of the model share.
    """

    def __init__(self, name: str, block: int, own: Callable[..., Any], state: VideoState) -> None:
        self.name = name
        self.block = block
        self.own = own
        self.state = state

    @property
    def _attention_backend(self) -> Any:
        """diffusers' backend of dense layers; `set_attention_backend` looks for this name."""
        return self.own._attention_backend  # type: ignore[attr-defined]

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.own._attention_backend = backend  # type: ignore[attr-defined]

    # Named as in most classes: `Attention.forward` hands on what a signature names.
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        state = self.state
        if state.grid is None:
            raise ValueError(
                f"{self.name} was called by itself; call the model, which knows the video's size, "
                "or disable this attention"
            )
        if state.dense(self.block) is not None:
            return self.own(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        if hidden_states.shape[1] != state.num_tokens:
            raise ValueError(
                f"{self.name} got {hidden_states.shape[1]} tokens and the model's call was for "
                f"{state.num_tokens} (frames, height, width: {state.grid}); tokens beside those of "
                "the video cannot be served. Disable this attention for such calls"
            )
        family = state.family
        video, text = family.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        mask = self._text_mask(attention_mask, text, hidden_states.shape[1])
        dtype = _dtype(video.value)
        video = Projected(*(part.to(dtype) for part in video))
        text = None if text is None else Projected(*(part.to(dtype) for part in text))
        attended = video_attention(
            *video,
            state.grid,
            num_bases=state.num_bases,
            window=state.config.window,
            text=None if text is None else (text.key, text.value),
            text_mask=mask,
            correction=state.config.correction,
            num_iters=state.config.num_iters,
            sample_per_base=state.config.sample_per_base,
            backend=state.config.backend,
        )
        if state.config.dense_heads:
            attended, chosen = with_dense_heads(
                attended, video, text, mask, state.config.dense_heads
            )
            state.note_heads(self.block, chosen)
        of_text = None
        if text is not None:  # its few queries take exact attention
            of_text = _joined(exact_attention(text.query, video, text, mask))
        return family.output(attn, _joined(attended), of_text)

    def _text_mask(
        self, mask: torch.Tensor | None, text: Projected | None, num_tokens: int
    ) -> torch.Tensor | None:
        """bool [B, T] of a mask [B, 1, 1, n + T], in which all tokens of the video count."""
        if mask is None:
            return None
        if text is None or mask.dtype != torch.bool or tuple(mask.shape[1:3]) != (1, 1):
            raise ValueError(
                f"{self.name} got an attention_mask of shape {list(mask.shape)}; bases cannot mask "
                "tokens of the video. Disable this attention for such calls"
            )
        return mask[:, 0, 0, num_tokens:]


def _joined(attended: torch.Tensor) -> torch.Tensor:
    """[B, h, n, d] -> [B, n, h d]"""
    return attended.transpose(1, 2).flatten(2)


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which SDPA would compute it: autocast's where that is on."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
