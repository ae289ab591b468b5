"""What a chunk that waits need not hold: tensors that only a UNet's local names keep alive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .layers.exchange import Lockstep
from .others import nobody_looks_in


@contextlib.contextmanager
def released_when_used(
    unet: torch.nn.Module, forward: Callable[..., Any], exchange: Lockstep
) -> Iterator[None]:
    """Free the memory of decoder inputs and skip connections as soon as they are used.

    `UNet2DConditionModel.forward` has names for the input of the decoder block that runs and for
    its skip connections until the block ends; its resnets alone read them. In lockstep a chunk
    waits inside the block, so these would be held for all frames.

    Nothing is freed while gradients are recorded, nor where a hook or another's `forward` is on a
    module of the UNet, which may have kept these tensors (see `nobody_looks_in`).

    Args:
        unet: UNet2DConditionModel that runs in chunks.
        forward: What runs for each chunk, the UNet's own `forward` or what took its place.
        exchange: Exchange of its chunks.
    """
    alone = len(exchange.chunks) == 1
    if alone or torch.is_grad_enabled() or not nobody_looks_in(unet, forward):
        yield
        return
    entered: dict[int, tuple[torch.Tensor, ...]] = {}

    def enter(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Skip connections are used from the last to the first.
        skips = reversed(kwargs["res_hidden_states_tuple"])
        entered[exchange.number] = (kwargs["hidden_states"], *skips)

    def used(index: int, resnet: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given, *skips = entered[exchange.number]
        for tensor in (given, skips[0]) if index == 0 else (skips[index],):
            if tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(0)
            else:  # parked in a file, which goes with its last tensor
                tensor.data = tensor.new_empty(0)

    hooks = []
    for block in unet.up_blocks:  # type: ignore[union-attr]
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for index, resnet in enumerate(block.resnets):
            hooks.append(resnet.register_forward_hook(partial(used, index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
