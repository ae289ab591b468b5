"""A pipeline's ControlNets: which can be used, what they are shown, and where they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.controlled import ControlledForward, Scaled, is_adapter, is_controlled
from ..attention.families import family_of_unet, unet_of
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
    """The ControlNets or T2I-Adapters of a pipeline, those of a wrapper of several one by one."""
    found: list[Any] = []
    for part, several in (("controlnet", "nets"), ("adapter", "adapters")):
        value = getattr(pipeline, part, None)
        if value is not None:
            listed = isinstance(value, (list, tuple))
            found += value if listed else getattr(value, several, [value])
    return [getattr(net, "_orig_mod", net) for net in found]


def check_controlnets(pipeline: Any) -> None:
    """Raise where a ControlNet or T2I-Adapter of a pipeline cannot stand beside its UNet.

    Args:
        pipeline: Pipeline with a UNet that inversions go through, and a VAE.

    Raises:
        ValueError: one is of another class, wants guess mode or class labels, or was made for
            another UNet or VAE. The message names what differs.
    """
    unet, name = unet_of(pipeline), type(pipeline).__name__
    nets = controlnets_of(pipeline)
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    for number, net in enumerate(nets, 1):
        order = f" {number} of {len(nets)}" if len(nets) > 1 else ""
        which = f"the {_word(net)}{order} of the pipeline, a {name},"
        if is_adapter(net):
            if family_of_unet(pipeline).frame_axis is not None:
                raise ValueError(
                    f"{which} is beside a {type(unet).__name__}, which takes no features of "
                    "T2I-Adapters (down_intrablock_additional_residuals); use a ControlNet"
                )
            _check_adapter(net, unet, factor, which)
        else:
            _check_controlnet(net, unet, factor, which)


def _check_controlnet(net: Any, unet: Any, factor: int, which: str) -> None:
    kind = type(net).__name__
    if kind != "ControlNetModel":
        raise ValueError(
            f"{which} is a {kind} (its controlnet or adapter), whose control an inversion does not "
            "have; use a ControlNetModel or a T2IAdapter, or several"
        )
    config = net.config
    if config.global_pool_conditions:
        raise ValueError(
            f"{which} averages its residuals over the picture (global_pool_conditions) and needs "
            "guess mode, which an inversion does not have; use one on edges or depth"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise ValueError(f"{which} wants class labels, which an inversion does not have")
    for key in (*_SAME, "addition_embed_type"):
        _check_same(which, key, config.get(key), unet.config.get(key))
    if config.conditioning_channels != 3:
        raise ValueError(
            f"{which} takes pictures of {config.conditioning_channels} channels, and control "
            "pictures have 3"
        )
    _check_place(which, 2 ** (len(config.conditioning_embedding_out_channels) - 1), factor)


def _check_adapter(net: Any, unet: Any, factor: int, which: str) -> None:
    config, widths = net.config, list(unet.config.block_out_channels)
    _check_same(which, "channels", list(config.channels)[: len(widths)], widths)
    if config.in_channels not in (1, 3):
        raise ValueError(
            f"{which} takes pictures of {config.in_channels} channels, and control pictures have 3"
        )
    # The first features of XL's adapters are added after the UNet's first downsampling.
    halved = 2 if config.adapter_type == "full_adapter_xl" else 1
    _check_place(which, config.downscale_factor, factor * halved)


def _check_same(which: str, key: str, found: Any, own: Any) -> None:
    if _as_list(own) != _as_list(found):
        raise ValueError(
            f"{which} has {key} {found}, and the UNet has {own}: it was made for another model "
            "(1.x, 2.x and XL each have their own); use one that was made for this"
        )


def _check_place(which: str, found: int, own: int) -> None:
    if found != own:
        raise ValueError(
            f"{which} makes a place of {found}x{found} pixels, and the VAE a latent of "
            f"{own}x{own}; use one that was made for this model"
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
            f"the pipeline, a {name}, has {_counted(nets)}, and nothing to show it; "
            f"{_GIVE}, or pass a pipeline without one"
        )
    if len(nets) != len(controls):
        raise ValueError(
            f"the pipeline, a {name}, has {_counted(nets)}, and control has {len(controls)}; "
            f"{_GIVE}"
        )
    for net, each in zip(nets, controls, strict=True):
        each.check_fits(num_frames, height, width)
        multiple = net.config.downscale_factor if is_adapter(net) else 1
        if height % multiple or width % multiple:
            raise ValueError(
                f"the T2I-Adapter of the pipeline, a {name}, takes pictures whose width and height "
                f"are multiples of {multiple}, and the frames are {width}x{height}; take another "
                "size"
            )
    return controls


def _word(net: Any) -> str:
    return "T2I-Adapter" if is_adapter(net) else "ControlNet"


def _counted(nets: Sequence[Any]) -> str:
    return f"a {_word(nets[0])}" if len(nets) == 1 else f"{len(nets)} {_word(nets[0])}s"


def check_uncontrolled(pipeline: Any, what: str) -> None:
    """Raise ValueError where a pipeline has ControlNets, for `what` that has no control."""
    nets = controlnets_of(pipeline)
    if nets:
        raise ValueError(
            f"the pipeline, a {type(pipeline).__name__}, has {_counted(nets)}, and "
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
            if not is_adapter(net):
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
