"""What attention of a video must know of a transformer class of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Grid = tuple[int, int, int]
Rotary = tuple[torch.Tensor, torch.Tensor]


class Projected(NamedTuple):
    """Queries, keys and values, [B, h, n, d] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


Operands = tuple[Projected, Projected | None]
"""Of the video's tokens, and of the text's where both are in one attention."""


@dataclass(frozen=True)
class VideoFamily:
    """A class of diffusers whose self-attentions go over all tokens of a video.

    Args:
        name: Name of the class in diffusers.
        blocks: Names of the lists of its blocks, in the order in which they run.
        attention: Name of the self-attention in a block.
        arguments: Names of the first arguments of its forward, in order.
        grid: Function of the model's configuration and of a call's arguments by name: frames,
            height and width in tokens.
        project: Function of (attention, hidden states [B, n, C], those of the text [B, T, C] or
            None, rotary embedding): the operands, after the embedding.
        output: Function of (attention, attended values [B, n, h d] of the video, those of the
            text or None): what the class's own processor returns.
        flow: Whether it predicts the velocity of flow matching, noise minus data.
    """

    name: str
    blocks: tuple[str, ...]
    attention: str
    arguments: tuple[str, ...]
    grid: Callable[[Any, Mapping[str, Any]], Grid]
    project: Callable[[Any, torch.Tensor, torch.Tensor | None, Rotary | None], Operands]
    output: Callable[[Any, torch.Tensor, torch.Tensor | None], Any]
    flow: bool = True

    def attentions(self, model: torch.nn.Module) -> dict[str, Any]:
        """The self-attentions of a model by name, one for each block, in order."""
        return {
            f"{blocks}.{number}.{self.attention}": getattr(block, self.attention)
            for blocks in self.blocks
            for number, block in enumerate(getattr(model, blocks))
        }

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, as far as `arguments` names them."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


def split_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, n, h d] -> [B, h, n, d], a view."""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)


def project_out(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    """The output projection and its dropout."""
    projected: torch.Tensor = attn.to_out[1](attn.to_out[0](attended))
    return projected


def turned(tensor: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Pairs of channels [..., d] turned by angles whose cosines and sines are [..., d / 2]."""
    first, second = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = first * cosines - second * sines, first * sines + second * cosines
    return torch.stack(pairs, -1).flatten(-2).type_as(tensor)
