"""Plug-and-play's injection: the source's queries, keys and features in place of the others'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ...attention import Hook
from ...attention.families import self_attentions, unet_of
from ...attention.layers.hooks import Operands, Site


class AttentionInjection(Hook):
    """Queries and keys of the first video replace the others'.

    Args:
        unet: UNet whose decoder's self-attentions they are injected into: all but the first one
            of the first decoder block that has attention.

    Attributes:
        active: Whether anything is replaced.

    Source: arXiv 2211.12572.
    """

    def __init__(self, unet: Any) -> None:
        self.active = False
        first = first_block_with_attention(unet)
        self._names = {
            name
            for index in range(first, len(unet.up_blocks))
            for name in _self_attentions(unet, index)
        }
        self._names.remove(_self_attentions(unet, first)[0])

    def operands(self, site: Site, operands: Operands) -> Operands:
        if not self.active or site.name not in self._names:
            return operands
        return Operands(
            operands.query[:1].expand_as(operands.query),
            operands.key[:1].expand_as(operands.key),
            operands.value,
            operands.bias,
        )


class FeatureInjection:
    """Features of the first video replace the others': after conv2 of the second resnet of the
    first decoder block with attention, before its shortcut is added.

    Args:
        pipeline: Pipeline with the UNet.
        branches: Number of videos in a batch, the source's first.

    Attributes:
        active: Whether anything is replaced.

    Source: arXiv 2211.12572.
    """

    def __init__(self, pipeline: Any, branches: int) -> None:
        self.active = False
        self._branches = branches
        unet = unet_of(pipeline)
        block = unet.up_blocks[first_block_with_attention(unet)]
        self._conv = block.resnets[1].conv2

    @contextlib.contextmanager
    def injecting(self) -> Iterator[None]:
        """The injection is in the UNet for the length of a `with` block."""
        hook = self._conv.register_forward_hook(self._inject)
        try:
            yield
        finally:
            hook.remove()

    def _inject(self, module: torch.nn.Module, given: Any, output: torch.Tensor) -> Any:
        if not self.active:
            return None
        source = output.unflatten(0, (self._branches, -1))[:1]
        return source.expand(self._branches, *source.shape[1:]).flatten(0, 1)


def first_block_with_attention(unet: Any) -> int:
    """The number of the first decoder block with attention: 1 in Stable Diffusion.

    Raises:
        ValueError: no decoder block has attention.
    """
    for index in range(len(unet.up_blocks)):
        if _self_attentions(unet, index):
            return index
    raise ValueError(
        "no decoder block of this UNet has self-attention to inject into; use another method"
    )


def _self_attentions(unet: Any, block: int) -> list[str]:
    """The names of the self-attentions of a decoder block, in the order of its modules."""
    return [name for name in self_attentions(unet) if name.startswith(f"up_blocks.{block}.")]
