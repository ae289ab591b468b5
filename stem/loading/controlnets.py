"""ControlNets that are added to a loaded pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..sources import ModelError
from .reasons import reason_of

_WITH_CONTROL = {
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
}


def with_controlnets(pipeline: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    """A pipeline of the same components with ControlNets beside them.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline.
        names: Hub ids, or folders in diffusers' format; with none, the pipeline is returned.
        dtype: Dtype of the weights.

    Raises:
        ModelError: the pipeline is of another class, or a ControlNet cannot be loaded.
    """
    if not names:
        return pipeline
    import diffusers

    kind = type(pipeline).__name__
    if kind not in _WITH_CONTROL:
        raise ModelError(
            f"the model is a {kind}, and --controlnet (controlnets) goes with a "
            f"{' or a '.join(_WITH_CONTROL)}; use one of these"
        )
    nets = [_loaded(name, dtype) for name in names]
    options = {"requires_safety_checker": False}
    if "force_zeros_for_empty_prompt" in pipeline.config:
        options = {"force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt}
    return getattr(diffusers, _WITH_CONTROL[kind])(
        **pipeline.components, controlnet=nets[0] if len(nets) == 1 else nets, **options
    )


def _loaded(name: str, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    try:
        kind = ControlNetModel.load_config(name).get("_class_name")
        if kind != "ControlNetModel":
            raise ValueError(f"it is a {kind}, and a ControlNetModel is needed")
        return ControlNetModel.from_pretrained(name).to(dtype)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"no ControlNet can be loaded from {name!r}: {reason_of(error)}. --controlnet "
            "(controlnets) takes a hub id, or a ControlNet's folder in diffusers' format"
        ) from error
