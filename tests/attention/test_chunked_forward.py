"""Chunks in the place of a UNet's `forward`, beside others: LoRA, offloading, control."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from controls import make_control_pipeline, pictures
from pipelines import call, make_unet, unet_inputs

import stem
from stem import Control, StemConfig
from stem.diffusion.control import Shown, checked_controls, controlled, rows_shown

FRAMES = 8


def output(unet: Any, config: Any, **given: Any) -> torch.Tensor:
    arguments, keywords = unet_inputs("sd1", rows=2 * FRAMES)
    with stem.enabled(unet, config), torch.no_grad():
        found: torch.Tensor = unet(*arguments, **keywords, **given)[0]
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_scale_of_a_lora_is_that_of_one_batch_in_every_chunk() -> None:
    peft = pytest.importorskip("peft", reason="peft adds LoRA weights")
    unet = make_unet()
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    config = StemConfig(num_bases=16, temperature=0.1, num_frames=FRAMES)
    for scale in (0.0, 0.5):
        given = {"cross_attention_kwargs": {"scale": scale}}
        expected = output(unet, config, **given)
        assert (
            relative(output(unet, dataclasses.replace(config, chunk=2), **given), expected) < 1e-5
        )
        assert given == {"cross_attention_kwargs": {"scale": scale}}
    # Nothing of the scale is left in the weights.
    without = output(unet, dataclasses.replace(config, chunk=2))
    assert relative(without, output(unet, config)) < 1e-5
    assert relative(without, expected) > 1e-3


@pytest.mark.parametrize("before", [True, False], ids=["offloaded first", "enabled first"])
def test_chunks_stay_where_offloading_takes_its_hook_off_and_on(before: bool) -> None:
    # As a pipeline does at the end of each of its calls, and with each LoRA that it loads.
    unet, config = make_unet(), StemConfig(num_bases=16, num_frames=FRAMES, chunk=2)
    own = unet.forward
    expected = output(unet, config)
    if before:
        accelerate.cpu_offload_with_hook(unet, "cpu")
    handle = stem.enable(unet, config)
    if not before:
        accelerate.cpu_offload_with_hook(unet, "cpu")
    for _ in range(2):
        assert torch.equal(call(unet, "sd1", rows=2 * FRAMES), expected)
        remove_hook_from_module(unet, recurse=True)
        assert torch.equal(call(unet, "sd1", rows=2 * FRAMES), expected)
        accelerate.cpu_offload_with_hook(unet, "cpu")
    handle.disable()
    remove_hook_from_module(unet, recurse=True)
    assert unet.forward == own


def test_control_nets_see_one_chunk_where_the_unet_is_offloaded() -> None:
    pipeline = copy.deepcopy(make_control_pipeline())  # which other tests have, too
    unet, config = pipeline.unet, StemConfig(num_bases=8, num_frames=4, chunk=2)
    arguments, keywords = unet_inputs("sd1", rows=4)
    shown = Shown(checked_controls(pipeline, Control(pictures(4, 16, 16)), 4, 16, 16))
    control = rows_shown([shown], 501, range(4))
    seen: list[int] = []

    def found() -> torch.Tensor:
        with controlled(pipeline), stem.enabled(unet, config), torch.no_grad():
            output: torch.Tensor = unet(*arguments, **keywords, control=control)[0]
        return output

    pipeline.controlnet.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    expected = found()
    accelerate.cpu_offload_with_hook(unet, "cpu")
    assert torch.equal(found(), expected)
    assert set(seen) == {2}


def test_a_forward_that_was_put_back_is_not_taken_for_chunks() -> None:
    unet = make_unet()
    with stem.enabled(unet, StemConfig(num_bases=16, num_frames=FRAMES, chunk=2)):
        standing = unet.forward
        del unet.forward
        with pytest.raises(RuntimeError, match=r"put back .* call stem.enable again"):
            call(unet, "sd1", rows=2 * FRAMES)
        unet.forward = standing
        call(unet, "sd1", rows=2 * FRAMES)
