"""What every video self-attention shares: diffusers' steps around the attention itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...profiling import nvtx_range
from .hooks import Hooks, Operands, Seen
from .projections import join_heads, project_keys_and_values, project_queries
from .rows import RowLayout

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


TOKENS_AT_ONCE = 4096
"""Tokens of a part on a CPU: enough for products at full speed."""


class VideoAttentionProcessor(ABC):
    """Takes the place of diffusers' `AttnProcessor2_0` in one self-attention.

    `__call__` is AttnProcessor2_0's steps in its order; only `attend` differs.

    Args:
        name: Name of the attention in the UNet.
        layout: Layout of the rows of a batch, shared by the processors of a UNet.
        hooks: Hooks that are called in it, shared likewise.
    """

    def __init__(self, name: str, layout: RowLayout, hooks: Hooks) -> None:
        self.name = name
        self.layout = layout
        self.hooks = hooks

    @abstractmethod
    def operands(self, attn: Attention, tokens: torch.Tensor) -> Operands:
        """What the attention is computed from.

        Args:
            attn: Attention module, for its projections.
            tokens: Normalised input of the module, [videos, frames, S, C].
        """

    def attend(self, operands: Operands) -> torch.Tensor:
        """The attention itself: [videos, groups, h, n, d] of the queries' dtype, any strides."""
        return attend_densely(operands)

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
        if torch.compiler.is_compiling() and self.layout.exchange is None:
            # Without the name, which would be one graph a layer in place of one a kind of block.
            return self._forward(attn, hidden_states, temb)
        return self._uncompiled(attn, hidden_states, temb)

    @torch.compiler.disable(
        reason="chunks of a video take turns in their attention, which no graph can hold; "
        "compile without fullgraph, or run all frames at once (chunk=None)"
    )
    def _uncompiled(
        self, attn: Attention, hidden_states: torch.Tensor, temb: torch.Tensor | None
    ) -> torch.Tensor:
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
        hidden_states = self._attended(attn, tokens).reshape(batch, num_tokens, -1)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        # Divided by 1, as in Stable Diffusion, the output would only be read and written again.
        factor = attn.rescale_output_factor
        return hidden_states if factor == 1 else hidden_states / factor

    def _attended(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        """What takes the place of the tokens, after the output projection."""
        if not self.hooks:
            return self.unwatched(attn, tokens)
        site = self.layout.site(self.name, attn, tokens.shape[1])
        for hook in self.hooks.having("before"):
            given = hook.before(site, tokens)
            if given is not None:
                return given
        if self.hooks.having("operands") or self.hooks.having("attend"):
            attended = self.hooks.attend(site, self.operands(attn, tokens), self.attend)
            output = self._projected(attn, attended, tokens.shape)
        else:
            output = self.unwatched(attn, tokens)
        for hook in self.hooks.having("after"):
            hook.after(site, tokens, output)
        return output

    def unwatched(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        """What takes the place of the tokens where no hook wants to see how it is made."""
        attended = self.attend(self.operands(attn, tokens))
        return self._projected(attn, attended, tokens.shape)

    def in_parts(self, attn: Attention, tokens: torch.Tensor, seen: Seen) -> torch.Tensor:
        """As `unwatched` where all frames see the same: on a CPU some of them at a time.

        Queries and outputs of few frames stay in the cache; those of all are fresh memory, whose
        pages can take as long as a projection.

        Args:
            attn: Attention module, for its projections.
            tokens: Normalised input of the module, [videos, frames, S, C].
            seen: What all tokens attend to.
        """
        videos, frames, num_tokens, _ = tokens.shape
        whole = tokens.device.type != "cpu" or torch.is_grad_enabled()
        at_once = frames if whole else max(1, TOKENS_AT_ONCE // (videos * num_tokens))
        output: torch.Tensor | None = None
        for start in range(0, frames, at_once):
            part = tokens[:, start : start + at_once]
            attended = self.attend(seen.by(project_queries(attn, part).unsqueeze(1)))
            projected = self._projected(attn, attended, part.shape)
            if part.shape[1] == frames:
                return projected
            if output is None:
                output = projected.new_empty((videos, frames, *projected.shape[2:]))
            output[:, start : start + at_once] = projected
        assert output is not None
        return output

    def _projected(
        self, attn: Attention, attended: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        project, dropout = attn.to_out
        projected: torch.Tensor = dropout(project(join_heads(attended, shape)))
        return projected


class PerFrameProcessor(VideoAttentionProcessor):
    """Each frame attends to itself, as in the UNet's own attention, where hooks want to look."""

    def operands(self, attn: Attention, tokens: torch.Tensor) -> Operands:
        videos, frames, num_tokens, _ = tokens.shape
        key, value = project_keys_and_values(attn, tokens, videos)
        query, key, value = (
            per_video.unflatten(2, (frames, num_tokens)).transpose(1, 2)
            for per_video in (project_queries(attn, tokens), key, value)
        )
        return Operands(query, key, value)


class TextAttentionProcessor:
    """Shows hooks the maps of a cross-attention; without such hooks the UNet's own runs.

    Args:
        name: Name of the attention in the UNet.
        layout: Layout of the rows of a batch.
        hooks: Hooks that are called.

    Attributes:
        own: Processor that this one stands in for, once it is put in.
    """

    own: Callable[..., torch.Tensor]

    def __init__(self, name: str, layout: RowLayout, hooks: Hooks) -> None:
        self.name = name
        self.layout = layout
        self.hooks = hooks

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        asked = self.hooks.having("text_maps")
        if not asked:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError(
                f"{self.name} is a cross-attention whose maps are looked at; it takes "
                "encoder_hidden_states, and no mask"
            )
        residual = hidden_states
        rows, num_tokens, _ = hidden_states.shape
        frames = self.layout.frames(rows)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = project_keys_and_values(attn, encoder_hidden_states, rows)
        query = project_queries(attn, hidden_states.unsqueeze(1))
        logits = query @ key.transpose(-1, -2) * attn.scale
        maps = logits.softmax(-1, dtype=torch.float32).unflatten(0, (rows // frames, frames))
        site = self.layout.site(self.name, attn, frames)
        for hook in asked:
            maps = hook.text_maps(site, maps)
        attended = maps.flatten(0, 1).to(value.dtype) @ value
        output = attended.transpose(1, 2).reshape(rows, num_tokens, -1)
        project, dropout = attn.to_out
        output = dropout(project(output))
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def attend_densely(operands: Operands) -> torch.Tensor:
    """Attention without a bias, by SDPA: [videos, groups, h, n, d]."""
    query, key, value = (
        part.flatten(0, 1) for part in (operands.query, operands.key, operands.value)
    )
    attended = scaled_dot_product_attention(query, key, value)
    return attended.unflatten(0, operands.query.shape[:2])
