"""AnimateDiff's pipelines of few random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
)
from pipelines import make_pipeline

PLACES = 8
"""Frames that the adapters here have places for."""


def make_adapter(shape: str = "sd1", *, strength: float = 1.0) -> MotionAdapter:
    """A motion adapter for `make_pipeline(shape)`; of strength 0 it leaves every frame as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = MotionAdapter(
            block_out_channels=make_pipeline(shape).unet.config.block_out_channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=PLACES,
        ).eval()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if ".proj_out." in name:
                parameter.mul_(strength)
    return adapter


def linear_scheduler(pipeline: Any) -> DDIMScheduler:
    """The schedule that AnimateDiff's adapters were trained with."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, beta_schedule="linear")


def animated(shape: str = "sd1", *, strength: float = 1.0, controlnet: Any = None) -> Any:
    """A pipeline of its own, made by hand as diffusers' users do."""
    base = make_pipeline(shape)
    parts = {**base.components, "scheduler": linear_scheduler(base)}
    kind: Any = AnimateDiffSDXLPipeline if shape == "sdxl" else AnimateDiffPipeline
    if shape != "sdxl":
        del parts["safety_checker"]
    if controlnet is not None:
        kind, parts["controlnet"] = AnimateDiffControlNetPipeline, controlnet
    pipeline = kind(**parts, motion_adapter=make_adapter(shape, strength=strength))
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def make_motion_pipeline() -> Any:
    """AnimateDiff on `make_pipeline()`. Shared: leave it as it is."""
    return animated()


@functools.cache
def make_still_pipeline() -> Any:
    """`make_pipeline()` with the same schedule. Shared: leave it as it is."""
    base = make_pipeline()
    return StableDiffusionPipeline(
        **{**base.components, "scheduler": linear_scheduler(base)}, requires_safety_checker=False
    )
