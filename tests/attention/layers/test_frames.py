"""Sparse-causal and all-frame attention, against attention written out frame by frame."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch
from pipelines import make_unet
from torch.nn.functional import scaled_dot_product_attention

import stem
from stem import InflatedConfig, SparseCausalConfig
from stem.attention.families import self_attentions
from stem.attention.layers import frames
from stem.attention.layers.frames import seen_frames
from stem_kernels.testing import max_error

FRAMES = 5


def written_out(attention: torch.nn.Module, tokens: torch.Tensor, seen: list[list[int]]):  # type: ignore[no-untyped-def]
    """Each frame's attention to the frames in `seen`, one at a time."""
    outputs = []
    for frame, others in enumerate(seen):
        q = attention.to_q(tokens[frame])
        k, v = (f(tokens[others].flatten(0, 1)) for f in (attention.to_k, attention.to_v))
        q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for x in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        outputs.append(attention.to_out[0](mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        (SparseCausalConfig(), [[0, 0], [0, 0], [1, 0], [2, 0], [3, 0]]),
        (SparseCausalConfig(frames=("mid",)), [[2]] * FRAMES),
        (SparseCausalConfig(frames=(1, "last")), [[1, 4], [2, 4], [3, 4], [4, 4], [4, 4]]),
        (InflatedConfig(), [list(range(FRAMES))] * FRAMES),
    ],
    ids=["previous-first", "mid", "next-last", "all"],
)
def test_frames_seen(config: SparseCausalConfig | InflatedConfig, seen: list[list[int]]) -> None:
    unet = make_unet()
    attention = next(iter(self_attentions(unet).values()))
    videos = torch.randn(2 * FRAMES, 12, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([written_out(attention, v, seen) for v in videos.split(FRAMES)])
        config = type(config)(**{**vars(config), "num_frames": FRAMES})
        with stem.enabled(unet, config):
            found = attention(videos)
    assert max_error(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_frames_by_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=dtype) for length in (20, 70, 70)
    )
    key[:, :, :16] *= 30  # most of the weight is in one part
    logits = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    expected = logits.softmax(-1) @ value.double()
    monkeypatch.setattr(frames, "KEYS_AT_ONCE", 16)
    found = frames.attend_by_parts(query, key, value)
    assert found.dtype == dtype
    plain = scaled_dot_product_attention(query, key, value)
    # The sums of parts are weighed by logarithms, which are rounded by as much as they are large.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = float(logits.abs().max()) * eps
    assert max_error(found, expected) < 2 * max_error(plain, expected) + rounding


def test_offsets_are_clamped() -> None:
    assert seen_frames((-9, 9), 3).tolist() == [[0, 2]] * 3


def test_narrow_layers_keep_their_attention() -> None:
    unet = make_unet()
    before = dict(unet.attn_processors)
    with stem.enabled(unet, SparseCausalConfig(frames=("mid",), min_channels=64)):
        for name, attention in self_attentions(unet).items():
            replaced = attention.processor is not before[f"{name}.processor"]
            assert replaced is (attention.query_dim >= 64)


def test_all_frames_that_do_not_fit_say_how_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    attention = next(iter(self_attentions(unet).values()))
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1000))
    with (
        stem.enabled(unet, InflatedConfig(num_frames=5)),
        pytest.raises(MemoryError, match="needs 30,720 bytes on cpu, and 1,000 are free"),
    ):
        attention(torch.randn(5, 48, 32))
