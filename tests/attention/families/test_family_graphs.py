"""Models of every family compiled, and with gradient checkpointing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from video_models import FRAMES, KINDS, ONE_LEVEL, call_model, make_model, model_inputs, outputs

import stem
from stem import StemConfig

# At tau = 0.01 rounding moves assignments on some CPUs.
FEW = StemConfig(num_bases=4, temperature=0.1, num_frames=FRAMES)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradients(model: Any, *calls: dict[str, Any]) -> torch.Tensor:
    """The gradients of several calls together."""
    model.zero_grad()
    returned = [outputs(model(**inputs, return_dict=False)) for inputs in calls]
    sum(part.square().sum() for parts in returned for part in parts).backward()
    found = [weights.grad for weights in model.parameters() if weights.grad is not None]
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_runs_the_layers_of_each_call_again(kind: str) -> None:
    model = make_model(kind)
    if not model._supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.enable_gradient_checkpointing()
        return
    calls = [model_inputs(kind, videos) for videos in (2, 1)]
    with stem.enabled(model, FEW):
        expected = gradients(model, *calls)
        model.enable_gradient_checkpointing()
        assert relative(gradients(model, *calls), expected) < 1e-5
    if KINDS[kind].frame_axis is not None:
        free = dataclasses.replace(FEW, num_frames=None)
        with stem.enabled(model, free), pytest.raises(ValueError, match="give num_frames"):
            gradients(model, *calls)


@pytest.mark.long
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_as_a_whole_or_in_part(whole: bool) -> None:
    torch._dynamo.reset()
    model, free = make_model(ONE_LEVEL), dataclasses.replace(FEW, num_frames=None)
    lengths = (3,) if whole else (3, 2)
    calls = [model_inputs("SparseControlNetModel", frames=frames) for frames in lengths]
    with stem.enabled(model, free):
        expected = [call_model(model, inputs) for inputs in calls]
    compiled = model
    if whole:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:  # its graph asks for the number of frames, which the call of the model found out
        model.mid_block.attentions[0].compile(backend="eager", fullgraph=True)
    with stem.enabled(compiled, free):
        for inputs, eager in zip(calls, expected, strict=True):
            assert relative(call_model(compiled, inputs), eager) < 1e-5
