"""What the self-attention nearest a UNet's output puts out, as maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..distributed import Ranks
from .families import self_attentions

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


def last_self_attention(unet: UNet2DConditionModel) -> tuple[str, Attention]:
    """The decoder's last self-attention and its name; without one there, the last of all.

    Args:
        unet: UNet to look into. In Stable Diffusion 1.5 it is
            `up_blocks.3.attentions.2.transformer_blocks.0.attn1`.
    """
    layers = self_attentions(unet)
    # A UNet lists its middle block after its decoder.
    decoder = [name for name in layers if name.startswith("up_blocks")]
    name = (decoder or list(layers))[-1]
    return name, layers[name]


class LastFeatures:
    """The output of `last_self_attention` in the latest call of a UNet, until `remove`.

    Args:
        unet: UNet to listen to.
        ranks: Ranks that share the frames of a call, in their order; None: there is one.

    Attributes:
        layer: Name of the self-attention.
    """

    def __init__(self, unet: UNet2DConditionModel, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks(None)
        self.layer, attention = last_self_attention(unet)
        self._parts: list[torch.Tensor] = []
        self._hooks = [
            unet.register_forward_pre_hook(self._forget),
            attention.register_forward_hook(self._keep),
        ]

    def maps(self, num_frames: int, height: int, width: int) -> torch.Tensor:
        """The features as maps, [N, C, h, w], h and w being the latents' or halves of them.

        All ranks make this call, and each of them has the maps of all frames.

        Args:
            num_frames: Number N of rows of the call, in chunks or at once.
            height: Height of the latents that the UNet was called with.
            width: Width of these latents.

        Raises:
            RuntimeError: the layer was not called with so many rows.
        """
        # A call whose memory ran out was made again, in smaller chunks: the last rows are whole.
        own = torch.cat(self._parts) if self._parts else torch.empty(0, 0, 0)
        by_rank = self._ranks.from_each(own.cpu) if self._ranks.size > 1 else [own]
        found = torch.cat(by_rank).to(own.device)[-num_frames:]
        if found.shape[0] != num_frames:
            raise RuntimeError(
                f"{self.layer} gave {found.shape[0]} of {num_frames} frames; the UNet must be "
                "called through its own modules, not compiled"
            )
        tokens = found.shape[1]
        while height * width > tokens:
            height, width = (height + 1) // 2, (width + 1) // 2
        return found.transpose(1, 2).unflatten(2, (height, width))

    def remove(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _forget(self, unet: torch.nn.Module, arguments: Any) -> None:
        self._parts = []

    def _keep(self, module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        self._parts.append(output)
