"""Heads of a video transformer that take exact attention: which they are, and what they give."""

from __future__ import annotations

import re

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers_of_video import call, make_transformer

import stem
from stem import VideoConfig
from stem.attention.video.dense_heads import exact_attention, with_dense_heads
from stem.attention.video.family import Projected


def test_the_head_that_is_furthest_off_is_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, exact = torch.randn(4, 2, 4, 90, 8, generator=generator)
    text = Projected(*torch.randn(3, 2, 4, 5, 8, generator=generator))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    video = Projected(query, key, value)
    exact = exact_attention(query, video, text, mask)
    seen = torch.cat([key, text.key], 2)[1, :, :93], torch.cat([value, text.value], 2)[1, :, :93]
    assert torch.allclose(exact[1], scaled_dot_product_attention(query[1], *seen), atol=1e-6)
    wrong = exact.clone()
    wrong[0, 2] *= 1.5
    wrong[0, 1] *= 1.1
    wrong[1, 0] *= 1.1
    wrong[1, 3] *= 0.4
    found, chosen = with_dense_heads(wrong, video, text, mask, 1)
    assert chosen.tolist() == [[2], [3]]
    assert torch.allclose(found[0, 2], exact[0, 2], atol=1e-6)
    assert torch.allclose(found[1, 3], exact[1, 3], atol=1e-6)
    untouched = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2)]
    assert all(torch.equal(found[place], wrong[place]) for place in untouched)
    two, chosen = with_dense_heads(wrong, video, text, mask, 2)
    assert chosen.tolist() == [[1, 2], [0, 3]]
    assert torch.allclose(two, exact, atol=1e-6)


def test_layers_say_which_heads_are_dense() -> None:
    model = make_transformer("wan")
    own, found = call(model, "wan"), {}
    for count in (0, 1):
        with stem.enabled(model, VideoConfig(tokens_per_base=8, dense_heads=count)) as handle:
            found[count] = float((call(model, "wan") - own).norm())
            said = handle.report()[0]
        assert (re.search(r", heads \d dense$", said) is not None) == bool(count)
    assert found[1] < found[0]
