"""ControlNets or T2I-Adapters that are added to a loaded pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..names import EMBEDDED_MODEL
from ..sources import ModelError
from .reasons import reason_of

# By the pipeline's class and the added one: the class with both, and the name of what is added.
_WITH = {
    ("StableDiffusionPipeline", "ControlNetModel"): (
        "StableDiffusionControlNetPipeline",
        "controlnet",
    ),
    ("StableDiffusionXLPipeline", "ControlNetModel"): (
        "StableDiffusionXLControlNetPipeline",
        "controlnet",
    ),
    ("AnimateDiffPipeline", "ControlNetModel"): ("AnimateDiffControlNetPipeline", "controlnet"),
    ("StableDiffusionPipeline", "T2IAdapter"): ("StableDiffusionAdapterPipeline", "adapter"),
    ("StableDiffusionXLPipeline", "T2IAdapter"): ("StableDiffusionXLAdapterPipeline", "adapter"),
}


def with_controlnets(pipeline: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    """A pipeline of the same components with ControlNets or T2I-Adapters beside them.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline or AnimateDiffPipeline.
        names: Hub ids, or folders in diffusers' format; with none, the pipeline is returned.
        dtype: Dtype of the weights.

    Raises:
        ModelError: the pipeline is of another class, one cannot be loaded, or they are of two
            kinds.
    """
    if not names:
        return pipeline
    import diffusers

    kind = type(pipeline).__name__
    models = sorted({model for model, _ in _WITH})
    if kind not in models:
        raise ModelError(
            f"the model is a {kind}, and --controlnet (controlnets) goes with a "
            f"{' or a '.join(models)}; use one of these"
        )
    nets = [_loaded(name, dtype) for name in names]
    kinds = sorted({type(net).__name__ for net in nets})
    if len(kinds) > 1:
        raise ModelError(
            f"--controlnet (controlnets) names {' and '.join(kinds)}; take those of one kind"
        )
    if (kind, kinds[0]) not in _WITH:
        raise ModelError(
            f"the model is a {kind}, and --controlnet (controlnets) names a {kinds[0]}: diffusers "
            "has no pipeline with both; take a ControlNetModel"
        )
    made, part = _WITH[kind, kinds[0]]
    taken = inspect.signature(getattr(diffusers, made).__init__).parameters
    options: dict[str, Any] = {}
    if "requires_safety_checker" in taken:
        options["requires_safety_checker"] = False
    if "force_zeros_for_empty_prompt" in pipeline.config:
        options["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
    shared = {name: value for name, value in pipeline.components.items() if name in taken}
    added = {part: nets[0] if len(nets) == 1 else nets}
    return getattr(diffusers, made)(**shared, **added, **options)


def _loaded(name: str, dtype: torch.dtype) -> Any:
    import diffusers

    try:
        kind = diffusers.ControlNetModel.load_config(name).get("_class_name")
        if kind not in {kind for _, kind in _WITH}:
            raise ValueError(f"it is a {kind}, and a ControlNetModel or T2IAdapter is needed")
        return getattr(diffusers, kind).from_pretrained(name).to(dtype)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"no ControlNet can be loaded from {name!r}: {reason_of(error)}. --controlnet "
            "(controlnets) takes a hub id, or a folder in diffusers' format, of a ControlNet or "
            f"T2I-Adapter, or {EMBEDDED_MODEL!r}"
        ) from error
