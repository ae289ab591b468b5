"""AnimateDiff's motion adapter, whose layers become part of a loaded pipeline's UNet."""

from __future__ import annotations

import inspect
from typing import Any

from ..sources import ModelError
from .reasons import reason_of

_WITH = {
    "StableDiffusionPipeline": "AnimateDiffPipeline",
    "StableDiffusionXLPipeline": "AnimateDiffSDXLPipeline",
}
"""By the pipeline's class: the class with motion modules."""
_STRIDES = 4  # windows that see a frame, FreeNoise's 16 frames 4 apart


def with_motion(pipeline: Any, name: str | None, window: int | None) -> Any:
    """A pipeline of the same components whose UNet has a motion adapter's layers.

    The noise schedule is linear, as in the training of AnimateDiff's adapters. The adapter itself
    is not kept: its weights would be in memory twice.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline, before LoRAs are added.
        name: Hub id, or folder in diffusers' format; None: the pipeline is returned.
        window: Number of frames that the layers see at once; None: all.

    Raises:
        ModelError: the pipeline is of another class, the adapter cannot be loaded or was made for
            another model, or it has fewer places than the window has frames.
    """
    if name is None:
        return pipeline
    import diffusers

    kind = type(pipeline).__name__
    if kind not in _WITH:
        raise ModelError(
            f"the model is a {kind}, and --motion-adapter (motion_adapter) goes with a "
            f"{' or a '.join(_WITH)}; use one of these"
        )
    # FreeNoise's layers are made in the dtype of the pipeline's first part.
    adapter = _loaded(name).to(pipeline.unet.dtype)
    places = adapter.config.motion_max_seq_length
    if window is not None and window > places:
        raise ModelError(
            f"--motion-window (motion_window) is {window}, and the motion adapter {name!r} has "
            f"places for {places} frames (motion_max_seq_length); take {places} at most"
        )
    made = getattr(diffusers, _WITH[kind])
    taken = inspect.signature(made.__init__).parameters
    parts = {key: part for key, part in pipeline.components.items() if key in taken}
    if "force_zeros_for_empty_prompt" in pipeline.config:
        parts["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
    if "beta_schedule" in pipeline.scheduler.config:
        parts["scheduler"] = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, beta_schedule="linear", trained_betas=None
        )
    try:
        animated = made(**parts, motion_adapter=adapter)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"the motion adapter {name!r} was made for another model: {reason_of(error)}"
        ) from error
    if window is not None:
        animated.enable_free_noise(context_length=window, context_stride=max(1, window // _STRIDES))
    animated.register_modules(motion_adapter=None)
    animated.unet.eval()
    return animated


def _loaded(name: str) -> Any:
    from diffusers import MotionAdapter

    try:
        kind = MotionAdapter.load_config(name).get("_class_name")
        if kind != "MotionAdapter":
            raise ValueError(f"it is a {kind}, and a MotionAdapter is needed")
        return MotionAdapter.from_pretrained(name)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"no motion adapter can be loaded from {name!r}: {reason_of(error)}. --motion-adapter "
            "(motion_adapter) takes a hub id, or a folder in diffusers' format, of AnimateDiff's"
        ) from error
