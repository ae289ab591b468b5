"""ControlNets of Stable Diffusion: a row of the sample and of the control is a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .family import Family, Outputs, Tensors


def _flat(returned: tuple[Any, ...]) -> Tensors:
    down, mid = returned
    return (*down, mid)


def _nested(tensors: Tensors) -> tuple[Any, ...]:
    return list(tensors[:-1]), tensors[-1]


def _output() -> Callable[..., Any]:
    from diffusers.models.controlnets.controlnet import ControlNetOutput

    return ControlNetOutput


CONTROLNET = Family("ControlNetModel", outputs=Outputs(_flat, _nested, _output))
