"""A pipeline's ControlNets: which can be used, what they are shown, and where they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.controlled import ControlledForward, Scaled, is_controlled
from ..attention.families import unet_of
from ..attention.handle import plain
from ..control import Control

_SAME = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block")
_GIVE = "give control=[stem.Control(pictures), ...], one for each (--control)"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a pipeline's ControlNets are shown in a branch of a batch, at each timestep.

    Args:
        controls: Control of each ControlNet.
        timesteps: Timesteps of the run, ascending; empty: control is on at any timestep.
    """

    controls: tuple[Control, ...]
    timesteps: tuple[int, ...] = ()

    def at(self, timestep: int) -> tuple[Scaled, ...]:
        """What is shown at a timestep; ControlNets that are off there are left out."""
        total = len(self.timesteps)
        step = total - 1 - self.timesteps.index(timestep) if total else 0
        return tuple(
            Scaled(number, control.pictures, control.scale)
            for number, control in enumerate(self.controls)
            if not total or control.is_on(step, total)
        )


def rows_shown(
    branches: Sequence[Shown | None], timestep: int, frames: Sequence[int]
) -> dict[str, Any] | None:
    """The argument `control` of `ControlledForward` for a batch of rows [branch, frame].

    Args:
        branches: What each branch is shown, None: nothing.
        timestep: Timestep of the call.
        frames: Numbers of the frames of a branch.

    Returns:
        None where nothing is shown to any branch.
    """
    distinct = list(dict.fromkeys(branches))
    groups = tuple(() if shown is None else shown.at(timestep) for shown in distinct)
    if not any(groups):
        return None
    number = torch.tensor([distinct.index(shown) for shown in branches])
    return {
        "groups": groups,
        "group": number.repeat_interleave(len(frames)),
        "frame": torch.tensor(list(frames)).repeat(len(branches)),
    }


def controlnets_of(pipeline: Any) -> list[Any]:
    """The ControlNets of a pipeline, those of a MultiControlNetModel one by one."""
    found = getattr(pipeline, "controlnet", None)
    if found is None:
        return []
    nets = found if isinstance(found, (list, tuple)) else getattr(found, "nets", [found])
    return [getattr(net, "_orig_mod", net) for net in nets]


def check_controlnets(pipeline: Any) -> None:
    """Raise where a ControlNet of a pipeline cannot stand beside its UNet.

    Args:
        pipeline: Pipeline with a UNet2DConditionModel and a VAE.

    Raises:
        ValueError: a ControlNet is of another class, wants guess mode or class labels, or was made
            for another UNet or VAE. The message names what differs.
    """
    unet, name = unet_of(pipeline), type(pipeline).__name__
    nets = controlnets_of(pipeline)
    for number, net in enumerate(nets, 1):
        which = f"the ControlNet{f' {number} of {len(nets)}' if len(nets) > 1 else ''} of the "
        which += f"pipeline, a {name},"
        kind = type(net).__name__
        if kind != "ControlNetModel":
            raise ValueError(
                f"{which} is a {kind} (its controlnet), whose control an inversion does not have; "
                "use a ControlNetModel, or several"
            )
        config = net.config
        if config.global_pool_conditions:
            raise ValueError(
                f"{which} averages its residuals over the picture (global_pool_conditions) and "
                "needs guess mode, which an inversion does not have; use one on edges or depth"
            )
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise ValueError(f"{which} wants class labels, which an inversion does not have")
        for key in (*_SAME, "addition_embed_type"):
            own, found = unet.config.get(key), config.get(key)
            if _as_list(own) != _as_list(found):
                raise ValueError(
                    f"{which} has {key} {found}, and the UNet has {own}: it was made for another "
                    "model (1.x, 2.x and XL each have their own); use one that was made for this"
                )
        if config.conditioning_channels != 3:
            raise ValueError(
                f"{which} takes pictures of {config.conditioning_channels} channels, and control "
                "pictures have 3"
            )
        shrunk = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        if shrunk != factor:
            raise ValueError(
                f"{which} makes a place of {shrunk}x{shrunk} pixels, and the VAE a latent of "
                f"{factor}x{factor}; use one that was made for this model"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def checked_controls(
    pipeline: Any,
    control: Control | Sequence[Control] | None,
    num_frames: int,
    height: int,
    width: int,
) -> tuple[Control, ...]:
    """What each ControlNet of a pipeline is shown; empty where it has none.

    Args:
        pipeline: Pipeline.
        control: Control of its ControlNet, or of each of several.
        num_frames: Number of frames of the video.
        height: Height of its frames in pixels.
        width: Width of its frames in pixels.

    Raises:
        TypeError: something else than a Control.
        ValueError: controls without a ControlNet, or too few or too many; pictures that do not fit.
    """
    controls = (control,) if isinstance(control, Control) else tuple(control or ())
    for each in controls:
        if not isinstance(each, Control):
            raise TypeError(f"control holds a {type(each).__name__}; pass stem.Control objects")
    nets, name = controlnets_of(pipeline), type(pipeline).__name__
    if controls and not nets:
        raise ValueError(
            f"control is given, and the pipeline, a {name}, has no ControlNet; load it with "
            "controlnets=[...] (--controlnet), or pass a StableDiffusionControlNetPipeline"
        )
    if nets and not controls:
        raise ValueError(
            f"the pipeline, a {name}, has {_counted(nets)} (controlnet), and nothing to show it; "
            f"{_GIVE}, or pass a pipeline without one"
        )
    if len(nets) != len(controls):
        raise ValueError(
            f"the pipeline, a {name}, has {_counted(nets)}, and control has {len(controls)}; "
            f"{_GIVE}"
        )
    for each in controls:
        each.check_fits(num_frames, height, width)
    return controls


def _counted(nets: Sequence[Any]) -> str:
    return "a ControlNet" if len(nets) == 1 else f"{len(nets)} ControlNets"


def check_uncontrolled(pipeline: Any, what: str) -> None:
    """Raise ValueError where a pipeline has ControlNets, for `what` that has no control."""
    nets = controlnets_of(pipeline)
    if nets:
        raise ValueError(
            f"the pipeline, a {type(pipeline).__name__}, has {_counted(nets)} (controlnet), and "
            f"{what} has no control pictures; pass a pipeline without one"
        )


@contextlib.contextmanager
def controlled(pipeline: Any) -> Iterator[None]:
    """A pipeline's ControlNets beside its UNet for the length of a `with` block.

    Inside it the UNet has its own attention and takes the argument `control` of
    `ControlledForward`; a mechanism that is then enabled cuts frames into chunks for both. The
    ControlNets keep their own attention, each frame by itself: what they say of a frame is the same
    in every chunk, and in a call of a few frames only. Blocks may nest.

    Args:
        pipeline: Pipeline; without ControlNets nothing happens.

    Raises:
        RuntimeError: another thread has the UNet or a ControlNet in such a block.
    """
    nets = controlnets_of(pipeline)
    if not nets:
        yield
        return
    unet = unet_of(pipeline)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain(unet))
        before = unet.__dict__.get("forward")
        if is_controlled(before):
            yield
            return
        for net in nets:
            stack.enter_context(plain(net))
        forward = ControlledForward(unet, nets).__call__
        unet.forward = forward
        try:
            yield
        finally:
            if unet.__dict__.get("forward") is forward:
                del unet.forward
                if before is not None:
                    unet.forward = before
