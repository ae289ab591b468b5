"""The source's attention maps in the target's place: of which videos, columns and pixels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from pipelines import tokens_of

from stem.attention.layers.hooks import Operands, Site
from stem.attention.layers.processor import attend_densely
from stem.editing.maps.map_fusion import MapFusion
from stem.editing.maps.prompts import refined_columns
from stem.editing.regions.masks import layer_size


def layer(groups: int, tokens: int, keys: int, biased: bool) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(3, groups, *shape, generator=generator)

    bias = drawn(1, keys)[:1].expand(3, -1, -1, -1) if biased else None
    return Operands(drawn(2, tokens, 4), drawn(2, keys, 4), drawn(2, keys, 5), bias)


def weights(operands: Operands, video: int) -> torch.Tensor:
    logits = operands.query[video] @ operands.key[video].mT / 2
    if operands.bias is not None:
        logits = logits + operands.bias[video].unsqueeze(-2)
    return logits.softmax(-1)


def attend(operands: Operands) -> torch.Tensor:
    if operands.bias is None:
        return attend_densely(operands)
    return torch.stack([weights(operands, v) @ operands.value[v] for v in range(len(operands.key))])


@pytest.mark.parametrize(("groups", "biased"), [(2, False), (1, False), (1, True)])
@pytest.mark.parametrize("masked", ["no", "tensor", "function"])
def test_maps_are_fused_for_the_last_video_alone(groups: int, biased: bool, masked: str) -> None:
    frames, columns = [1, 3], refined_columns(tokens_of("a b"), tokens_of("a c"))
    site = Site("layer", Attention(8), frames, None)
    hook = MapFusion(columns, (5, 4))
    operands = layer(groups, 12 // groups, 7, biased)
    share = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1))
    if masked == "tensor":
        share = torch.rand(4, 5, 4, generator=torch.Generator().manual_seed(1))
        hook.mask = share
        share = torch.nn.functional.adaptive_avg_pool2d(share, (3, 2))
    elif masked == "function":
        hook.mask = lambda size: share if size == (3, 2) else torch.empty(0)
    assert hook.operands(site, operands) is operands
    assert torch.equal(hook.attend(site, operands, attend), attend(operands))
    hook.self_on = True
    fused = hook.attend(site, hook.operands(site, operands), attend)
    m = torch.zeros(()) if masked == "no" else share[frames].reshape(groups, 1, -1, 1)
    maps = m * weights(operands, 2) + (1 - m) * weights(operands, 0)
    torch.testing.assert_close(fused[2], maps @ operands.value[2])
    torch.testing.assert_close(fused[:2], attend(operands)[:2])
    alone = operands.of(slice(0, 1))
    assert torch.equal(hook.attend(site, hook.operands(site, alone), attend), attend(alone))


def test_text_maps_take_shares_by_word_and_the_equalizer() -> None:
    columns = refined_columns(tokens_of("a b", 4), tokens_of("a c", 4))
    site = SimpleNamespace(frames=range(2))
    factors = torch.tensor([1.0, 1.0, 10.0, 2.0])
    hook = MapFusion(columns, (2, 2), equalizer=factors)
    maps = torch.rand(3, 2, 2, 4, 4)
    assert hook.text_maps(site, maps) is maps
    hook.cross = torch.tensor([1.0, 0.5, 1.0, 0.0])
    source, target = maps[0], maps[2]
    expected = torch.stack(
        [
            source[..., 0],
            0.5 * source[..., 1] + 0.5 * target[..., 1],
            10 * target[..., 2],  # a word of the target alone
            target[..., 3],
        ],
        dim=-1,
    )
    fused = hook.text_maps(site, maps)
    torch.testing.assert_close(fused[2], expected)
    assert torch.equal(fused[:2], maps[:2])


def test_sizes_of_layers_halve_rounding_up() -> None:
    assert [layer_size(tokens, 9, 6) for tokens in (54, 15, 6, 2)] == [
        (9, 6),
        (5, 3),
        (3, 2),
        (2, 1),
    ]
    with pytest.raises(ValueError, match=r"20 tokens a frame.*9x6"):
        layer_size(20, 9, 6)
