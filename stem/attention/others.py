"""What others have put around a UNet's modules, and which of it cannot run in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .controlled import uncontrolled
from .layers.processor import TextAttentionProcessor, VideoAttentionProcessor

_LIBRARIES = ("diffusers", "torch", "peft")
"""Packages whose modules keep nothing of what goes through them."""
_CACHES = ("DeepCache", "tgate")
"""Packages that replace the `forward` of a UNet's modules by one that keeps its output."""
_OWN_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _OWN_HOOKS)


def nobody_looks_in(unet: torch.nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether the tensors between a UNet's blocks are seen by diffusers' own code alone.

    Args:
        unet: UNet2DConditionModel.
        forward: What its call runs: the bound method of its class, or what took its place.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D

    # Residuals of ControlNets are added before the decoder: it sees the sums alone.
    if getattr(uncontrolled(forward), "__func__", None) is not UNet2DConditionModel.forward:
        return False
    if any(type(block) not in (UpBlock2D, CrossAttnUpBlock2D) for block in unet.up_blocks):  # type: ignore[union-attr]
        return False
    if any(getattr(torch.nn.modules.module, hooks) for hooks in _GLOBAL_HOOKS):
        return False
    for name, module in unet.named_modules():
        # The UNet's own hooks see what it is given and returns, nothing between.
        if name and _touched(module):
            return False
        # The blocks and what they hold are handed these tensors; deeper modules are not.
        if name.count(".") <= 3 and _library(type(module).forward) not in _LIBRARIES:
            return False
    return True


def check_chunks(unet: torch.nn.Module) -> None:
    """Raise where something on a UNet's modules would give wrong numbers in chunks.

    Args:
        unet: UNet2DConditionModel that is to run in more chunks than one.

    Raises:
        ValueError: a cache that has one state for all chunks, or offloading of whole blocks.
    """
    for name, module in unet.named_modules():
        for cache in _caches(module):
            raise ValueError(
                f"{cache} on {name or 'the UNet'} keeps one state for all chunks of a video, which "
                "would take each other's; disable it, or run all frames at once (chunk=None)"
            )
        if _offloaded_whole(module) and any(map(_ours, module.modules())):
            raise ValueError(
                f"block-level offloading takes the weights of {name or 'the UNet'} away when one "
                "chunk of a video has left it, and others are still inside; offload with "
                "offload_type='leaf_level', or run all frames at once (chunk=None)"
            )


def _touched(module: torch.nn.Module) -> bool:
    """Whether a call runs more than the `forward` of the module's class."""
    if "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(vars(module).get(hooks) for hooks in _OWN_HOOKS)


def _library(function: Any) -> str:
    """The package that a function was written in; what a decorator copies does not count."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0]


def _caches(module: torch.nn.Module) -> Iterator[str]:
    """The names of the caches that are on a module."""
    for hook in _diffusers_hooks(module):
        if hook._is_stateful:
            yield type(hook).__name__
    library = _library(vars(module).get("forward"))
    if library in _CACHES:
        yield library


def _diffusers_hooks(module: torch.nn.Module) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _offloaded_whole(module: torch.nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate take away weights of what is below a module."""
    from diffusers.hooks.group_offloading import GroupOffloadingHook

    for hook in _diffusers_hooks(module):
        if isinstance(hook, GroupOffloadingHook):
            group = hook.group
            # With streams the UNet itself has a group of nothing, to learn the order of layers.
            if group.modules or group.parameters or group.buffers:
                return True
    hook = getattr(module, "_hf_hook", None)
    return any(
        getattr(each, "offload", False) and getattr(each, "place_submodules", False)
        for each in getattr(hook, "hooks", (hook,))
    )


def _ours(module: torch.nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    return isinstance(processor, (VideoAttentionProcessor, TextAttentionProcessor))
