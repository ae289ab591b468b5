"""Attention on and off: what is changed in a UNet, and that all comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from pipelines import SHAPES, SMALL, call, make_unet

import stem
from stem import InflatedConfig, SparseCausalConfig, StemConfig
from stem.attention.families import self_attentions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", ["feature", "key"])
def test_every_self_attention_changes_and_comes_back(shape: str, space: str) -> None:
    unet = make_unet(shape)
    before, processors = call(unet, shape), dict(unet.attn_processors)
    handle = stem.enable(unet, StemConfig(num_bases=8, num_frames=4, space=space))
    inside = call(unet, shape)
    assert inside.isfinite().all()
    assert not torch.equal(inside, before)
    for name, attention in unet.named_modules():
        if name.endswith(".attn1"):
            assert type(attention.processor).__name__ == "StemProcessor"
        if name.endswith(".attn2"):
            assert isinstance(attention.processor, AttnProcessor2_0)
    handle.disable()
    assert torch.equal(call(unet, shape), before)
    assert all(unet.attn_processors[name] is old for name, old in processors.items())
    assert not unet._forward_pre_hooks


def _exception_inside(unet: Any) -> None:
    def fails_inside() -> None:
        with stem.enabled(unet, SMALL):
            call(unet)
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()


def _failing_forward(unet: Any) -> None:
    with (
        pytest.raises(ValueError, match="does not divide"),
        stem.enabled(unet, StemConfig(num_frames=3)),
    ):
        call(unet, rows=4)


def _twice(unet: Any) -> None:
    first = stem.enable(unet, SMALL)
    second = stem.enable(unet, StemConfig(num_bases=4))
    assert not first.active
    assert second.active
    first.disable()  # has nothing to undo any more
    assert second.active
    stem.disable(unet)


def _twice_disabled(unet: Any) -> None:
    stem.enable(unet, SMALL)
    stem.disable(unet)
    stem.disable(unet)


def _other_mechanisms(unet: Any) -> None:
    stem.enable(unet, InflatedConfig(num_frames=4))
    stem.enable(unet, SparseCausalConfig(num_frames=4))
    call(unet)
    stem.disable(unet)


@pytest.mark.parametrize(
    "episode", [_exception_inside, _failing_forward, _twice, _twice_disabled, _other_mechanisms]
)
def test_output_is_bit_identical_afterwards(episode: Callable[[Any], None]) -> None:
    unet = make_unet()
    before, processors = call(unet), dict(unet.attn_processors)
    episode(unet)
    assert torch.equal(call(unet), before)
    assert all(unet.attn_processors[name] is old for name, old in processors.items())
    assert not unet._forward_pre_hooks


def test_nested_contexts_restore_the_outer_one() -> None:
    unet = make_unet()
    with stem.enabled(unet, SMALL) as outer:
        expected = call(unet)
        with stem.enabled(unet, StemConfig(num_bases=2, num_frames=4)):
            assert not torch.equal(call(unet), expected)
        assert outer.active
        assert torch.equal(call(unet), expected)
    assert not outer.active


def test_enabling_inside_a_context_does_not_outlive_it() -> None:
    unet = make_unet()
    before = call(unet)
    with stem.enabled(unet, SMALL):
        stem.enable(unet, StemConfig(num_bases=2))
    assert torch.equal(call(unet), before)
    with stem.enabled(unet, SMALL) as outer:
        expected = call(unet)
        with stem.enabled(unet, StemConfig(num_bases=4)):
            stem.enable(unet, StemConfig(num_bases=2))
        assert outer.active
        assert torch.equal(call(unet), expected)
    assert torch.equal(call(unet), before)
    assert not unet._forward_pre_hooks


def test_a_processor_set_meanwhile_stays(caplog: pytest.LogCaptureFixture) -> None:
    unet = make_unet()
    handle = stem.enable(unet, SMALL)
    name, attention = next(iter(self_attentions(unet).items()))
    theirs = AttnProcessor2_0()
    attention.set_processor(theirs)
    handle.disable()
    assert attention.processor is theirs
    assert name in caplog.text


def test_a_copied_unet_is_independent() -> None:
    unet = make_unet()
    stem.enable(unet, SMALL)
    copied = copy.deepcopy(unet)
    stem.disable(copied)
    assert type(next(iter(self_attentions(unet).values())).processor).__name__ == "StemProcessor"
    stem.disable(unet)
    assert torch.equal(call(copied), call(unet))


def test_targets_and_arguments_that_do_not_fit() -> None:
    unet = make_unet()
    with pytest.raises(TypeError, match="is a Linear, which no attention mechanism"):
        stem.enable(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config is a dict; it must be a StemConfig"):
        stem.enable(unet, {"num_bases": 3})  # type: ignore[arg-type]
    attention = next(iter(self_attentions(unet).values()))
    with stem.enabled(unet, SMALL):
        tokens = torch.randn(2, 4, 32)
        with pytest.raises(ValueError, match="got an attention_mask of shape"):
            attention(tokens, attention_mask=torch.zeros(2, 1, 4))
        with pytest.raises(ValueError, match="takes no encoder_hidden_states"):
            attention(tokens, encoder_hidden_states=tokens)
