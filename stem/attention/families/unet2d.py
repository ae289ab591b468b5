"""Stable Diffusion 1.x, 2.x and XL: a row of the sample is a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .family import Family, Outputs


def _output() -> Callable[..., Any]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput


UNET_2D = Family("UNet2DConditionModel", outputs=Outputs(tuple, tuple, _output))
