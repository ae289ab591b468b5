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
from stem_kernels import initial_bases
from stem_kernels.testing import eager_basis_attention, eager_soft_em

CHANNELS, HEADS, FRAMES = 320, 8, 4
CHECKED = 64


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


def expected(kind: str, attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """The output of the first tokens of the first frame, by eager formulas."""
    seen = tokens[:1] if kind == "per-frame" else tokens.flatten(0, 1).unsqueeze(0)
    if kind.startswith("stem"):
        bases = initial_bases(seen, 256)
        seen = eager_soft_em(seen, bases, num_iters=int(kind.removeprefix("stem R=")))
    query, key, value = (
        project(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for project, rows in (
            (attention.to_q, tokens[:1, :CHECKED]),
            (attention.to_k, seen),
            (attention.to_v, seen),
        )
    )
    mixed = eager_basis_attention(query, key, value)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))[0]


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
        right = expected(kind, attention, tokens)
    error = float((out[0, :CHECKED] - right).norm() / right.norm())
    benchmark.extra_info["relative_error"] = error
    assert error < 1e-4
