"""Compiled blocks, exported UNets and gradient checkpointing: of whole videos, and in chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pipelines import SMALL, call, make_unet, unet_inputs

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig

CHUNKS = dataclasses.replace(SMALL, chunk=2)


@pytest.mark.parametrize("config", [CHUNKS, SparseCausalConfig(num_frames=4, chunk=4)])
def test_checkpointing_is_refused_in_chunks(config: Any) -> None:
    unet = make_unet()
    unet.enable_gradient_checkpointing()
    arguments, keywords = unet_inputs()
    with stem.enabled(unet, config):
        assert call(unet).isfinite().all()
        with pytest.raises(ValueError, match=r"disable_gradient_checkpointing\(\)"):
            unet(*arguments, **keywords)


def gradients(unet: Any) -> torch.Tensor:
    """The gradients of two calls together."""
    (sample, timestep, text), keywords = unet_inputs()
    unet.zero_grad()
    sum(
        unet(sample, step, text, **keywords)[0].square().sum() for step in (timestep, timestep // 2)
    ).backward()
    return torch.cat([weights.grad.flatten() for weights in unet.parameters()])


def test_checkpointing_of_whole_videos() -> None:
    unet = make_unet()
    with stem.enabled(unet, SMALL):
        expected = gradients(unet)
        unet.enable_gradient_checkpointing()
        assert torch.equal(gradients(unet), expected)
    # Run again, layers would take the numbers of the last call: gradients were off by 4.6 %.
    with (
        stem.enabled(unet, dataclasses.replace(SMALL, init="gaussian")),
        pytest.raises(ValueError, match="init='tokens'"),
    ):
        gradients(unet)


MECHANISMS = [
    SMALL,
    dataclasses.replace(SMALL, init="gaussian"),
    dataclasses.replace(SMALL, space="key"),
    SparseCausalConfig(num_frames=4),
    InflatedConfig(num_frames=4),
    PerFrameConfig(num_frames=4),
]


@pytest.mark.parametrize(
    "config",
    [MECHANISMS[0], *(pytest.param(each, marks=pytest.mark.long) for each in MECHANISMS[1:])],
)
def test_repeated_blocks_compile_once_a_kind(config: Any) -> None:
    torch._dynamo.reset()
    unet = make_unet()
    with stem.enabled(unet, config):
        expected = call(unet)
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    unet.compile_repeated_blocks(fullgraph=True, backend=counted)
    with stem.enabled(unet, config):
        assert torch.equal(call(unet), expected)
    # Blocks of 32 channels and of 64, seven layers in all.
    assert len(graphs) == 2


def test_repeated_blocks_in_chunks() -> None:
    torch._dynamo.reset()
    unet = make_unet()
    with stem.enabled(unet, CHUNKS):
        expected = call(unet)
    unet.compile_repeated_blocks(backend="eager")
    with stem.enabled(unet, CHUNKS):
        assert torch.equal(call(unet), expected)
    torch._dynamo.reset()
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    refused = pytest.raises(torch._dynamo.exc.Unsupported, match="chunks of a video take turns")
    with stem.enabled(unet, CHUNKS), refused:
        call(unet)


@pytest.mark.long
def test_export() -> None:
    unet = make_unet()
    (sample, timestep, text), keywords = unet_inputs()
    with stem.enabled(unet, dataclasses.replace(SMALL, init="gaussian")), torch.no_grad():
        exported = torch.export.export(unet, (sample, timestep, text), keywords)
        for step in (timestep, timestep // 2):
            expected = unet(sample, step, text, **keywords)[0]
            assert torch.equal(exported.module()(sample, step, text, **keywords)[0], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_chunks_is_refused(strict: bool) -> None:
    torch._dynamo.reset()
    unet = make_unet()
    arguments, keywords = unet_inputs()
    refused = pytest.raises(
        (ValueError, torch._dynamo.exc.Unsupported), match=r"chunks of a video.*take turns"
    )
    with stem.enabled(unet, CHUNKS), torch.no_grad(), refused:
        torch.export.export(unet, arguments, keywords, strict=strict)
