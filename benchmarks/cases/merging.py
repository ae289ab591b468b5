"""Token merging (Bolya and Hoffman, arXiv 2303.17604), by its authors' package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tomesd.merge import bipartite_soft_matching_random2d

from stem.attention.families import self_attentions

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

RATIO = 0.5
STRIDE = 2


class MergedAttention:
    """Per-frame attention in which RATIO of the tokens of each frame are merged into others.

    Args:
        processor: Processor of the attention between merging and its reversal.
        least: Number of tokens of a frame below which nothing is merged.
    """

    def __init__(self, processor: Any, least: int) -> None:
        self.processor = processor
        self.least = least

    def __call__(self, attn: Attention, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count = tokens.shape[1]
        if count < self.least:
            return self.processor(attn, tokens, *args, **kwargs)
        side = math.isqrt(count)
        generator = torch.Generator(tokens.device).manual_seed(0)
        merge, unmerge = bipartite_soft_matching_random2d(
            tokens, side, side, STRIDE, STRIDE, int(RATIO * count), generator=generator
        )
        return unmerge(self.processor(attn, merge(tokens), *args, **kwargs))


@contextmanager
def merging(unet: Any, least: int) -> Iterator[None]:
    """A UNet whose self-attentions with at least so many tokens a frame merge them."""
    layers = self_attentions(unet)
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.set_processor(MergedAttention(layer.processor, least))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])
