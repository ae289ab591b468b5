"""Deep copies and pickles of pipelines and UNets with a mechanism on."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from pipelines import SMALL, call, make_pipeline, make_unet
from transformers_of_video import make_transformer

import stem
from stem import InflatedConfig, StemConfig, VideoConfig

CHUNKS = dataclasses.replace(SMALL, chunk=2)


def generated(pipeline: Any, guidance: float) -> torch.Tensor:
    return pipeline(
        "a duck",
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize("config", [StemConfig(num_bases=8), InflatedConfig()])
def test_a_deep_copy_of_a_pipeline(config: Any) -> None:
    pipeline = make_pipeline()
    plain = generated(pipeline, 7.5)
    with stem.enabled(pipeline, config):
        expected = {guidance: generated(pipeline, guidance) for guidance in (7.5, 1.0)}
        copied = copy.deepcopy(pipeline)
    assert torch.equal(generated(pipeline, 7.5), plain)
    for guidance, images in expected.items():
        # The copy is told of its own guidance, whatever the first one's last call had.
        generated(pipeline, 8.5 - guidance)
        assert torch.equal(generated(copied, guidance), images)
    stem.disable(copied)
    assert torch.equal(generated(copied, 7.5), plain)
    assert torch.equal(generated(pipeline, 7.5), plain)


def test_a_deep_copy_of_a_unet_in_chunks() -> None:
    unet = make_unet()
    before = call(unet)
    handle = stem.enable(unet, CHUNKS)
    expected = call(unet)
    copied = copy.deepcopy(unet)
    handle.disable()
    assert torch.equal(call(unet), before)
    assert torch.equal(call(copied), expected)
    stem.disable(copied)
    assert "forward" not in vars(copied)
    assert torch.equal(call(copied), before)


class OneRank:
    """A process group of this process, which torch does not copy."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'ProcessGroup' object")


def test_a_deep_copy_shares_the_process_group() -> None:
    unet, group = make_unet(), OneRank()
    with stem.enabled(unet, CHUNKS, group=group):  # type: ignore[arg-type]
        copied = copy.deepcopy(unet)
    assert copied.forward.__self__.group is group
    assert "forward" not in vars(unet)


def test_a_pipeline_is_not_pickled_with_a_mechanism_on() -> None:
    pipeline = make_pipeline()
    for target, config in (
        (pipeline, StemConfig(num_bases=8)),
        (pipeline.unet, CHUNKS),
        (make_transformer("wan"), VideoConfig()),
    ):
        with (
            stem.enabled(target, config),  # type: ignore[call-overload]
            pytest.raises(TypeError, match=r"stem\.disable\(\.\.\.\) first"),
        ):
            pickle.dumps(target)
    assert torch.equal(call(pickle.loads(pickle.dumps(pipeline)).unet), call(pipeline.unet))
