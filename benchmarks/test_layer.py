"""One self-attention of SD 1.x's shape, projections included: STEM against dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .layers import CHECKED, HEADS, LAYER_KINDS, expected, layer, set_attention

CHANNELS, FRAMES = 320, 4


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layer(benchmark: Any, kind: str, side: int) -> None:
    benchmark.group = f"self-attention, N={FRAMES}, {side}x{side}, C={CHANNELS}, h={HEADS}"
    attention = layer(CHANNELS, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(FRAMES, side * side, CHANNELS, generator=generator)
    set_attention(attention, LAYER_KINDS[kind])
    with torch.no_grad():
        right = expected(kind, attention, tokens)
        out = benchmark.pedantic(lambda: attention(tokens), rounds=5, warmup_rounds=1)
    error = float((out[:1, :CHECKED] - right).norm() / right.norm())
    benchmark.extra_info["relative_error"] = error
    assert error < 1e-4
