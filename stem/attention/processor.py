"""What every video self-attention shares: diffusers' steps around the attention itself."""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ..profiling import nvtx_range
from .exchange import Lockstep


class RowLayout:
    """Which rows of a batch are one video.

    Args:
        num_frames: Number of consecutive rows that are one video; None where nobody said.
        pipeline: Pipeline of the UNet, which knows whether a batch holds guidance branches; None
            where only the UNet is known.

    Attributes:
        exchange: Exchange in which the running chunk meets the others of its video; None while
            whole videos go through the UNet.
    """

    def __init__(self, num_frames: int | None, pipeline: Any = None) -> None:
        self.num_frames = num_frames
        self.exchange: Lockstep | None = None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        # A distilled UNet is told the scale and sees one branch.
        unet = getattr(pipeline, "unet", None)
        self._scale_embedded = unet is not None and unet.config.time_cond_proj_dim is not None

    def frames(self, rows: int) -> int:
        """The number of frames of each video in a batch of so many rows.

        Raises:
            ValueError: the rows do not divide into videos, or nothing tells what they are.
        """
        if self.exchange is not None:
            return len(self.exchange.running)
        branches = self._guidance_branches()
        if self.num_frames is not None:
            if rows % (branches * self.num_frames):
                raise ValueError(
                    f"a batch of {rows} rows ({branches} guidance branch{'es' * (branches > 1)} "
                    f"known) does not divide into videos of num_frames={self.num_frames} frames; "
                    "num_frames must be the frames of one video, and every video and guidance "
                    "branch of the batch must have as many. For direct calls of a UNet enable it "
                    "on pipeline.unet, which knows nothing of guidance"
                )
            return self.num_frames
        if rows in (1, branches):
            return 1
        raise ValueError(
            f"a batch of {rows} rows ({branches} guidance branch{'es' * (branches > 1)} known) "
            "may be frames of one video or separate images, and nothing says which: enable with "
            "num_frames, the number of rows that are one video (num_frames=1 for images)"
        )

    @contextlib.contextmanager
    def exchanging(self, exchange: Lockstep) -> Iterator[None]:
        """Rows are those of the exchange's running chunk for the length of a `with` block."""
        before, self.exchange = self.exchange, exchange
        try:
            yield
        finally:
            self.exchange = before

    def _guidance_branches(self) -> int:
        # As the pipelines' own `do_classifier_free_guidance`, which torch.compile cannot trace from
        # inside their UNet.
        pipeline = None if self._pipeline is None else self._pipeline()
        scale = getattr(pipeline, "guidance_scale", None)
        return 2 if scale is not None and scale > 1 and not self._scale_embedded else 1


class VideoAttentionProcessor(ABC):
    """Takes the place of diffusers' `AttnProcessor2_0` in one self-attention.

    `__call__` is AttnProcessor2_0's steps in its order; only `attend` differs.

    Args:
        name: Name of the attention in the UNet.
        layout: Layout of the rows of a batch, shared by the processors of a UNet.
    """

    def __init__(self, name: str, layout: RowLayout) -> None:
        self.name = name
        self.layout = layout

    @abstractmethod
    def attend(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        """The attention itself.

        Args:
            attn: Attention module, for its projections.
            tokens: Normalised input of the module, [videos, frames, S, C].

        Returns:
            [videos, h, frames * S, d] of the queries' dtype, any strides.
        """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.name} is a self-attention; it takes no encoder_hidden_states")
        if attention_mask is not None:
            raise ValueError(
                f"{self.name} got an attention_mask of shape {list(attention_mask.shape)}; "
                "attention over a whole video cannot mask single tokens. Call the UNet without "
                "attention_mask, or disable this attention first"
            )
        with nvtx_range(self.name):
            return self._forward(attn, hidden_states, temb)

    def _forward(
        self, attn: Attention, hidden_states: torch.Tensor, temb: torch.Tensor | None
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        batch, num_tokens, channels = hidden_states.shape
        frames = self.layout.frames(batch)
        tokens = hidden_states.reshape(batch // frames, frames, num_tokens, channels)
        attended = self.attend(attn, tokens)
        hidden_states = attended.transpose(1, 2).reshape(batch, num_tokens, -1)

        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def split_heads(attn: Attention, projected: torch.Tensor, videos: int) -> torch.Tensor:
    """[rows, S, h * d] -> [videos, h, rows * S / videos, d], a view of the same memory."""
    return projected.reshape(videos, -1, attn.heads, projected.shape[-1] // attn.heads).transpose(
        1, 2
    )


def project_queries(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """Queries [videos, h, frames * S, d] of tokens [videos, frames, S, C].

    They are wanted after chunks have met: computed before, those of all frames would wait.
    """
    query = split_heads(attn, attn.to_q(tokens), tokens.shape[0])
    return query if attn.norm_q is None else attn.norm_q(query)


def project_keys_and_values(
    attn: Attention, tokens: torch.Tensor, videos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [videos, h, n, d] of tokens [..., C] (see `split_heads`)."""
    key = split_heads(attn, attn.to_k(tokens), videos)
    value = split_heads(attn, attn.to_v(tokens), videos)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return key, value
