"""FateZero: how two prompts' words map, whose maps are fused, and what an edit then gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from pipelines import make_pipeline

from stem.attention.hooks import Operands, Site
from stem.attention.processor import attend_densely
from stem.editing.map_fusion import MapFusion
from stem.editing.masks import layer_size
from stem.editing.prompts import (
    PromptTokens,
    alignment,
    changed_words,
    places_of,
    prompt_tokens,
    refined_columns,
    replaced_columns,
)


def tokens_of(text: str, length: int = 12) -> PromptTokens:
    """Tokens as if each letter were one: begin mark 0, end mark 1."""
    tokens, places = [0], []
    for word in text.split():
        places.append(tuple(range(len(tokens), len(tokens) + len(word))))
        tokens += map(ord, word)
    return PromptTokens(text, (*tokens, 1), tuple(places), length)


def test_replaced_words_map_in_order_or_evenly() -> None:
    source, target = tokens_of("a cat ox"), tokens_of("a dog cow")
    columns = replaced_columns(source, target)
    expected = torch.zeros(12, 12)
    expected[range(5), range(5)] = 1.0  # begin, "a", "cat" -> "dog"
    expected[5:7, 5:8] = 1 / 3  # "ox" -> "cow"
    expected[range(7, 11), range(8, 12)] = 1.0  # end mark and filling
    assert torch.equal(columns.matrix, expected)
    assert torch.equal(columns.share, torch.ones(12))

    back = replaced_columns(target, source)
    assert torch.equal(back.matrix[5:8, 5:7], torch.full((3, 2), 0.5))
    assert back.share.tolist() == [1.0] * 11 + [0.0]  # no filling is left for the last column
    maps, own = torch.rand(2, 12), torch.rand(2, 12)
    assert torch.equal(back(maps, own)[:, 11], own[:, 11])
    torch.testing.assert_close(back(maps, own)[:, :11].sum(1), maps.sum(1))
    with pytest.raises(ValueError, match=r"has 2 words and 'a b c' has 3; .*mapping='refine'"):
        replaced_columns(tokens_of("a b"), tokens_of("a b c"))


def test_refined_words_keep_their_own_columns_where_they_are_new() -> None:
    source, target = tokens_of("a ox ran", 13), tokens_of("a big ox ran", 13)
    assert alignment("axy", "abxz") == [0, None, 1, None]
    assert alignment("ab", "ba") == [1, None]  # ties: from the end, the target's item is left
    columns = refined_columns(source, target)
    assert columns.share.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    placed = columns.matrix.argmax(0)
    assert placed[columns.share > 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert refined_columns(target, source).share.tolist() == [1.0] * 10 + [0.0] * 3
    maps = torch.rand(3, 13)
    torch.testing.assert_close(refined_columns(source, source)(maps, -maps), maps)


def test_words_are_found_whatever_their_case_and_punctuation() -> None:
    prompt = "A duck's pond, a Lake; and a pond."
    assert places_of(["POND", "lake!"], prompt) == [2, 4, 7]
    assert places_of(["duck's pond"], prompt) == [1, 2, 7]
    with pytest.raises(ValueError, match=r"no 'sea', 'cat' among the words .* A, duck's, pond,"):
        places_of(["sea", "cat", "lake"], prompt)
    assert changed_words("a red ball and a red ring", "a blue ball, and a big red ring") == (
        [1],
        [1, 5],
    )


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_tokens_of_a_prompt_that_is_cut_off(shape: str) -> None:
    pipeline = make_pipeline(shape)
    found = prompt_tokens(pipeline, "A duck's T-shirt, big")
    assert found.first == 1
    assert [position for word in found.of_words for position in word] == list(range(1, found.end))
    assert all(found.of_words)
    long = prompt_tokens(pipeline, "duck " * 60 + "end")
    assert (long.end, len(long.tokens), long.length) == (76, 77, 77)
    kept = [position for word in long.of_words for position in word]
    assert kept == list(range(1, 76))
    with pytest.raises(ValueError, match=r"'end' in 'duck .* cut off, .* 77 tokens"):
        long.positions([60])
    assert refined_columns(found, long).matrix.shape == (77, 77)


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
