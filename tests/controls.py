"""Pipelines with ControlNets of few random weights, and pictures to show them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from pipelines import make_pipeline
from video_models import with_control

from stem import Control


def make_controlnet(unet: Any, seed: int = 0, factor: int = 2) -> ControlNetModel:
    """A ControlNet for a UNet beside a VAE of this factor, whose last layers are not 0."""
    channels = (8,) * factor.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
        return with_control(net).eval()


@functools.cache
def make_control_pipeline(shape: str = "sd1", nets: int = 1) -> Any:
    """`make_pipeline(shape)` with ControlNets. Shared: leave it as it is."""
    plain = make_pipeline(shape)
    xl = shape == "sdxl"
    kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    found = [make_controlnet(plain.unet, seed) for seed in range(nets)]
    pipeline = kind(
        **plain.components,
        controlnet=found[0] if nets == 1 else found,
        **({} if xl else {"requires_safety_checker": False}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_adapter(unet: Any, seed: int = 0, channels: int = 3, factor: int = 2) -> T2IAdapter:
    """A T2I-Adapter for a UNet beside a VAE of this factor."""
    widths = list(unet.config.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T2IAdapter(
            in_channels=channels, channels=widths, num_res_blocks=1, downscale_factor=factor
        ).eval()


@functools.cache
def make_adapter_pipeline(shape: str = "sd1", nets: int = 1) -> Any:
    """`make_pipeline(shape)` with T2I-Adapters. Shared: leave it as it is."""
    parts = dict(make_pipeline(shape).components)
    xl = shape == "sdxl"
    if not xl:
        del parts["image_encoder"]
    found = [make_adapter(parts["unet"], seed) for seed in range(nets)]
    pipeline = (StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline)(
        **parts,
        adapter=found[0] if nets == 1 else found,
        **({} if xl else {"requires_safety_checker": False}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(frames: int = 3, height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Pictures of noise, uint8 [frames, height, width, 3]."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def shown(nets: int = 1, **changes: Any) -> list[Control]:
    """A control for each ControlNet, for the frames of `inversions.clip()`."""
    return [Control(pictures(seed=number), **changes) for number in range(nets)]
