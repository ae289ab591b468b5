"""ControlNets and T2I-Adapters beside a UNet: each chunk of frames goes through them first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter, methodcaller
from typing import Any

import torch

_NET, _ADAPTER = "net", "adapter"  # whose residuals


@dataclass(frozen=True, eq=False)
class Scaled:
    """What a ControlNet or adapter is shown in a call: no tensor, which chunks would cut.

    Args:
        net: Number of the ControlNet or adapter.
        pictures: Pictures, uint8 [N, H, W, 3].
        scale: Factor of the residuals.
    """

    net: int
    pictures: torch.Tensor
    scale: float


class ControlledForward:
    """Takes the place of a UNet's `forward`: ControlNets and adapters see its rows first.

    It stands inside `ChunkedForward`, so the residuals are those of one chunk's frames, on the
    rank that runs the chunk.

    Args:
        unet: UNet whose `forward` this is to be.
        nets: ControlNets and T2I-Adapters of it.
    """

    def __init__(self, unet: torch.nn.Module, nets: Sequence[Any]) -> None:
        self.forward = unet.forward
        self._nets = nets

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        control: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """The UNet's output.

        Args:
            sample: Latents [rows, c, h, w], or [branches, c, frames, h, w] where the UNet's samples
                have an axis of frames; rows are then [branch, frame].
            timestep: Timestep, a tensor of one element.
            encoder_hidden_states: Embeddings of the prompts [rows, tokens, channels].
            control: What ControlNets are shown: "groups", a tuple of what each group of rows is
                shown (tuples of `Scaled`); "group" and "frame", the number of each row's group
                and frame, int64 [rows]. None: nothing.
            others: Other arguments of the UNet.
        """
        if control is not None:
            given: dict[str, Any] = {"encoder_hidden_states": encoder_hidden_states}
            if others.get("added_cond_kwargs") is not None:
                given["added_cond_kwargs"] = others["added_cond_kwargs"]
            rows = sample if sample.ndim == 4 else sample.transpose(1, 2).flatten(0, 1)
            others |= self._residuals(rows, timestep, given, **control)
        return self.forward(sample, timestep, encoder_hidden_states, **others)

    def _residuals(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        given: dict[str, Any],
        *,
        groups: tuple[tuple[Scaled, ...], ...],
        group: torch.Tensor,
        frame: torch.Tensor,
    ) -> dict[str, Any]:
        """The UNet's arguments that hold the residuals of ControlNets and adapters."""
        whole: dict[str, list[torch.Tensor]] = {}
        for number, shown in enumerate(groups):
            if not shown:
                continue
            if len(groups) == 1:
                whole = self._sum(shown, sample, timestep, frame, given)
                break
            rows = (group == number).nonzero().squeeze(1)
            if not len(rows):
                continue
            on = rows.to(sample.device)
            own = _each(given, itemgetter(on))
            found = self._sum(shown, sample[on], timestep, frame[rows], own)
            for name, parts in found.items():
                if name not in whole:
                    whole[name] = [part.new_zeros(len(sample), *part.shape[1:]) for part in parts]
                for into, part in zip(whole[name], parts, strict=True):
                    into[on] = part
        arguments: dict[str, Any] = {}
        if _NET in whole:
            *down, mid = whole[_NET]
            arguments["down_block_additional_residuals"] = tuple(down)
            arguments["mid_block_additional_residual"] = mid
        if _ADAPTER in whole:
            arguments["down_intrablock_additional_residuals"] = list(whole[_ADAPTER])
        return arguments

    def _sum(
        self,
        shown: tuple[Scaled, ...],
        sample: torch.Tensor,
        timestep: torch.Tensor,
        frames: torch.Tensor,
        given: dict[str, Any],
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals added up: of all ControlNets (the middle's last), and of all adapters."""
        total: dict[str, list[torch.Tensor]] = {}
        for each in shown:
            net, pictures = self._nets[each.net], each.pictures
            # As diffusers' VaeImageProcessor without normalisation: 0 ... 1.
            images = pictures[frames.to(pictures.device)].permute(0, 3, 1, 2).contiguous()
            images = images.float() / 255
            if is_adapter(net):
                name = _ADAPTER
                if net.config.in_channels == 1:
                    images = images.mean(1, keepdim=True)
                parts = [part * each.scale for part in net(images.to(sample.device, net.dtype))]
            else:
                name = _NET
                where = sample.device, net.dtype
                down, mid = net(
                    sample.to(net.dtype),
                    timestep,
                    controlnet_cond=images.to(*where),
                    conditioning_scale=each.scale,
                    return_dict=False,
                    **_each(given, methodcaller("to", *where)),
                )
                parts = [*down, mid]
            found = [part.to(sample.dtype) for part in parts]
            before = total.get(name)
            total[name] = found if before is None else _added(before, found)
        return total


def _added(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor]:
    return [a + b for a, b in zip(one, other, strict=True)]


def is_adapter(net: Any) -> bool:
    """Whether a net is a T2I-Adapter, which sees pictures alone."""
    return type(net).__name__ == "T2IAdapter"


def _each(
    given: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Arguments with a function of each of their tensors, those of dictionaries too."""
    return {
        name: _each(value, function) if isinstance(value, dict) else function(value)
        for name, value in given.items()
    }


def is_controlled(forward: Any) -> bool:
    """Whether a module's `forward` is a `ControlledForward`."""
    return isinstance(getattr(forward, "__self__", None), ControlledForward)


def uncontrolled(forward: Any) -> Any:
    """What a `ControlledForward` calls in its turn; any other `forward` is returned as it is."""
    return forward.__self__.forward if is_controlled(forward) else forward
