"""One self-attention of SD 1.x's shape, projections included: STEM against dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from stem import InflatedConfig, StemConfig
from stem.attention.frames import InflatedProcessor
from stem.attention.processor import VideoAttentionProcessor
from stem.attention.stem import StemProcessor, StemState, bases_shape

CHANNELS, HEADS, FRAMES = 320, 8, 4


def layer() -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).eval()


def processor(kind: str, attention: Attention) -> VideoAttentionProcessor | AttnProcessor2_0:
    if kind == "per-frame":
        return AttnProcessor2_0()
    if kind == "all-frame":
        return InflatedProcessor("all-frame", InflatedConfig().num_frames)
    config = StemConfig(init="tokens", num_iters=int(kind.removeprefix("stem R=")))
    return StemProcessor(kind, 0, StemState(config, [bases_shape(attention, config)]))


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("kind", ["per-frame", "all-frame", "stem R=5", "stem R=1"])
def test_layer(benchmark: Any, kind: str, side: int) -> None:
    benchmark.group = f"self-attention, N={FRAMES}, {side}x{side}, C={CHANNELS}, h={HEADS}"
    attention = layer()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(FRAMES, side * side, CHANNELS, generator=generator)
    attention.set_processor(processor(kind, attention))
    with torch.no_grad():
        out = benchmark.pedantic(lambda: attention(tokens), rounds=5, warmup_rounds=1)
    assert out.shape == tokens.shape
    assert out.isfinite().all()
