"""ControlNets beside a UNet: every chunk of frames goes through them, then through the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Scaled:
    """What a ControlNet is shown in a call, of all frames: no tensor that chunks would cut.

    Args:
        net: Number of the ControlNet.
        pictures: Pictures, uint8 [N, H, W, 3].
        scale: Factor of the residuals.
    """

    net: int
    pictures: torch.Tensor
    scale: float


class ControlledForward:
    """Takes the place of a UNet's `forward`: ControlNets see its rows first.

    It stands inside `ChunkedForward`, so the residuals are those of one chunk's frames, on the
    rank that runs the chunk.

    Args:
        unet: UNet2DConditionModel whose `forward` this is to be.
        nets: ControlNets of it.
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
            sample: Latents [rows, c, h, w].
            timestep: Timestep, a tensor of one element.
            encoder_hidden_states: Embeddings of the prompts [rows, tokens, channels].
            control: What ControlNets are shown: "groups", a tuple of what each group of rows is
                shown (tuples of `Scaled`); "group" and "frame", the number of each row's group
                and frame, int64 [rows]. None: nothing.
            others: Other arguments of the UNet.
        """
        if control is not None:
            others |= self._residuals(
                sample,
                timestep,
                {"encoder_hidden_states": encoder_hidden_states},
                others.get("added_cond_kwargs"),
                **control,
            )
        return self.forward(sample, timestep, encoder_hidden_states, **others)

    def _residuals(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: dict[str, torch.Tensor],
        added: dict[str, torch.Tensor] | None,
        *,
        groups: tuple[tuple[Scaled, ...], ...],
        group: torch.Tensor,
        frame: torch.Tensor,
    ) -> dict[str, Any]:
        """The UNet's arguments that hold the ControlNets' residuals."""
        whole: list[torch.Tensor] | None = None
        for number, shown in enumerate(groups):
            if not shown:
                continue
            if len(groups) == 1:
                whole = self._sum(shown, sample, timestep, frame, text, added)
                break
            rows = (group == number).nonzero().squeeze(1)
            if not len(rows):
                continue
            on = rows.to(sample.device)
            own = None if added is None else {name: value[on] for name, value in added.items()}
            texts = {name: value[on] for name, value in text.items()}
            found = self._sum(shown, sample[on], timestep, frame[rows], texts, own)
            if whole is None:
                whole = [each.new_zeros(len(sample), *each.shape[1:]) for each in found]
            for into, each in zip(whole, found, strict=True):
                into[on] = each
        if whole is None:
            return {}
        return {
            "down_block_additional_residuals": tuple(whole[:-1]),
            "mid_block_additional_residual": whole[-1],
        }

    def _sum(
        self,
        shown: tuple[Scaled, ...],
        sample: torch.Tensor,
        timestep: torch.Tensor,
        frames: torch.Tensor,
        text: dict[str, torch.Tensor],
        added: dict[str, torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """The residuals of all ControlNets added up: the encoder's, then the middle's."""
        total: list[torch.Tensor] = []
        for each in shown:
            net, pictures = self._nets[each.net], each.pictures
            # As diffusers' VaeImageProcessor without normalisation: 0 ... 1.
            images = pictures[frames.to(pictures.device)].permute(0, 3, 1, 2).contiguous()
            arguments: dict[str, Any] = {**text, "controlnet_cond": images.float() / 255}
            if added is not None:
                arguments["added_cond_kwargs"] = added
            moved = _moved(arguments, sample.device, net.dtype)
            down, mid = net(
                sample.to(net.dtype),
                timestep,
                conditioning_scale=each.scale,
                return_dict=False,
                **moved,
            )
            found = [part.to(sample.dtype) for part in (*down, mid)]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total


def _moved(given: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: _moved(value, device, dtype) if isinstance(value, dict) else value.to(device, dtype)
        for name, value in given.items()
    }


def is_controlled(forward: Any) -> bool:
    """Whether a module's `forward` is a `ControlledForward`."""
    return isinstance(getattr(forward, "__self__", None), ControlledForward)


def uncontrolled(forward: Any) -> Any:
    """What a `ControlledForward` calls in its turn; any other `forward` is returned as it is."""
    return forward.__self__.forward if is_controlled(forward) else forward
