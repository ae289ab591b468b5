"""The classes of diffusers that attention across frames can be put into: a module for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .controlnet import CONTROLNET
from .family import Family
from .i2vgen_xl import I2VGEN_XL
from .motion import MOTION
from .sparse_controlnet import SPARSE_CONTROLNET
from .spatio_temporal import SPATIO_TEMPORAL
from .unet2d import UNET_2D
from .unet3d import UNET_3D

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNetMotionModel
    from diffusers.models.attention_processor import Attention

FAMILIES = {
    family.name: family
    for family in (
        UNET_2D,
        MOTION,
        UNET_3D,
        SPATIO_TEMPORAL,
        I2VGEN_XL,
        CONTROLNET,
        SPARSE_CONTROLNET,
    )
}
"""By the name of the class, which is found without importing it."""

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "family_of_unet",
    "model_of",
    "self_attentions",
    "text_attentions",
    "unet_of",
]

_INVERTED = (UNET_2D, MOTION)
"""Those whose UNets an inversion goes through."""


def family_of(model: Any) -> Family | None:
    """The family of a model, by its class or one that this derives from; None: no such class."""
    for base in type(model).__mro__:
        if base.__module__.partition(".")[0] == "diffusers" and base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    return None


def model_of(target: Any) -> torch.nn.Module:
    """The model that a mechanism goes into.

    Args:
        target: Pipeline whose `unet` is of one of `FAMILIES`, or such a model, also compiled or
            with LoRA.

    Raises:
        TypeError: there is no model of these classes.
    """
    model = _bare(target)
    if family_of(model) is None:
        raise TypeError(
            f"{_described(target, model)}, which no attention mechanism can be put into; pass one "
            f"of {', '.join(FAMILIES)}, or a pipeline whose unet is one"
        )
    return model


def unet_of(target: Any) -> UNet2DConditionModel | UNetMotionModel:
    """The UNet that inversions go through, of a pipeline, a compiled module or a PEFT model.

    Raises:
        TypeError: there is no UNet2DConditionModel and no UNetMotionModel.
    """
    model = _bare(target)
    if family_of(model) not in _INVERTED:
        raise TypeError(
            f"{_described(target, model)}, not a UNet2DConditionModel or UNetMotionModel; pass a "
            "Stable Diffusion 1.x, 2.x or XL pipeline, AnimateDiff's on one of these, or its unet"
        )
    return model


def family_of_unet(target: Any) -> Family:
    """The family of what `unet_of` finds."""
    family = family_of(unet_of(target))
    assert family is not None
    return family


def self_attentions(model: torch.nn.Module) -> dict[str, Attention]:
    """Every spatial self-attention of a model by name, in the order of its modules.

    Args:
        model: Model of one of `FAMILIES`.

    Raises:
        ValueError: it has none.
    """
    found = _attentions(model, to_text=False)
    if not found:
        raise ValueError(f"this {type(model).__name__} has no self-attention to replace")
    return found


def text_attentions(model: torch.nn.Module) -> dict[str, Attention]:
    """Every spatial cross-attention to the prompt by name, in the order of its modules.

    Args:
        model: Model of one of `FAMILIES`.
    """
    return _attentions(model, to_text=True)


def _attentions(model: torch.nn.Module, *, to_text: bool) -> dict[str, Attention]:
    family = family_of(model)
    if family is None:
        raise TypeError(f"{type(model).__name__} is none of {', '.join(FAMILIES)}")
    return family.attentions(model, to_text=to_text)


def _bare(target: Any) -> Any:
    """The module itself, without its pipeline, torch.compile or PEFT around it."""
    module = getattr(target, "unet", target)
    module = getattr(module, "_orig_mod", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _described(target: Any, model: Any) -> str:
    """What was passed, as the beginning of a message."""
    if hasattr(target, "unet"):
        return f"the unet of {type(target).__name__} is a {type(model).__name__}"
    return f"the target is a {type(model).__name__}"
