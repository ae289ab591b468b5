"""The video transformers of diffusers: a module for each class, and what all of them share."""

from __future__ import annotations

from typing import Any

import torch

from .cogvideox import COGVIDEOX
from .family import VideoFamily
from .hunyuan import HUNYUAN
from .ltx import LTX
from .processor import VideoProcessor
from .state import VideoState
from .wan import WAN

VIDEO_FAMILIES = {family.name: family for family in (WAN, COGVIDEOX, HUNYUAN, LTX)}
"""By the name of the class, which is found without importing it."""

__all__ = [
    "VIDEO_FAMILIES",
    "VideoFamily",
    "VideoProcessor",
    "VideoState",
    "transformer_of",
    "video_family_of",
]


def video_family_of(model: Any) -> VideoFamily | None:
    """The family of a transformer, by its class or one that this derives from; None: no such."""
    for base in type(model).__mro__:
        if base.__module__.partition(".")[0] == "diffusers" and base.__name__ in VIDEO_FAMILIES:
            return VIDEO_FAMILIES[base.__name__]
    return None


def transformer_of(target: Any) -> torch.nn.Module | None:
    """The video transformer that a mechanism goes into; None: the target neither is nor has one.

    Args:
        target: Pipeline, or transformer, also compiled or with LoRA.

    Raises:
        TypeError: the target is a pipeline with another transformer.
        ValueError: the target is a pipeline with two transformers.
    """
    of_pipeline = not isinstance(target, torch.nn.Module) and not hasattr(target, "unet")
    of_pipeline = of_pipeline and hasattr(target, "transformer")
    module = target.transformer if of_pipeline else target
    module = getattr(module, "_orig_mod", module)
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    if video_family_of(module) is not None:
        if of_pipeline and getattr(target, "transformer_2", None) is not None:
            raise ValueError(
                f"{type(target).__name__} has two transformers, one for each part of the steps; "
                "call this with pipeline.transformer and with pipeline.transformer_2"
            )
        found: torch.nn.Module = module
        return found
    if of_pipeline:
        raise TypeError(
            f"the transformer of {type(target).__name__} is a {type(module).__name__}, which no "
            f"attention mechanism can be put into; it must be one of {', '.join(VIDEO_FAMILIES)}"
        )
    return None
