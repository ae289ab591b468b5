"""Masks of words, from the text maps of a UNet's cross-attentions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate, max_pool2d

from ...attention import Hook
from ...attention.families import text_attentions
from ...attention.layers.hooks import Site
from ...distributed import Ranks
from ..regions.masks import halvings, layer_size
from .map_fusion import Size

_COARSE = 2


class TextMaps(Hook):
    """Keeps what text maps say of some tokens: summed over the tokens, mean over heads and layers.

    It sees the maps as they are when it is called, so it has to be added before what changes them.

    Args:
        layers: Names of the cross-attentions, all of one resolution.
        num_frames: Number N of frames.
        latent_size: Height and width of the latents.
        ranks: Ranks that share the frames.

    Attributes:
        looked_at: Video of the batch and positions of tokens in its prompt, by a name of choice.
    """

    def __init__(
        self, layers: Iterable[str], num_frames: int, latent_size: Size, ranks: Ranks
    ) -> None:
        self.looked_at: Mapping[str, tuple[int, Sequence[int]]] = {}
        self._layers = frozenset(layers)
        self._num_frames = num_frames
        self._latent_size = latent_size
        self._ranks = ranks
        self._own: set[int] = set()
        self._seen: dict[str, dict[str, torch.Tensor]] = {}

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        if site.name not in self._layers:
            return maps
        for name, (video, positions) in self.looked_at.items():
            found = maps[video][..., list(positions)].sum(-1).mean(1)
            seen = self._seen.setdefault(name, {})
            if site.name not in seen:
                seen[site.name] = found.new_zeros(self._num_frames, found.shape[-1])
            # A pass that ran out of memory begins again: each frame is set, not added to.
            seen[site.name][list(site.frames)] = found
            self._own.update(site.frames)
        return maps

    def take(self, name: str) -> torch.Tensor:
        """What the last pass showed under a name of `looked_at`: float32 [N, h, w]. Once only."""
        maps = torch.stack(list(self._seen.pop(name).values())).mean(0)
        self._ranks.fill(maps, self._own)
        return maps.unflatten(1, layer_size(maps.shape[1], *self._latent_size))


def mask_layers(unet: Any) -> list[str]:
    """The cross-attentions that masks are made of: those at a quarter of the latents' height and
    width, or at the next finer resolution that has two of them.

    The UNet's middle is not among them.

    Raises:
        ValueError: no resolution has two.
    """
    of_level: dict[int | None, list[str]] = {}
    for name in text_attentions(unet):
        of_level.setdefault(halvings(unet, name), []).append(name)
    for level in range(_COARSE, -1, -1):
        if len(of_level.get(level, ())) >= 2:
            return of_level[level]
    raise ValueError(
        "this UNet has no two cross-attentions of one resolution, at a quarter of the latents' or "
        "finer, to make masks of; edit without blend_words"
    )


def word_mask(maps: torch.Tensor, size: Size, threshold: float) -> torch.Tensor:
    """Where maps of words are high.

    Args:
        maps: Maps [N, h, w], as `TextMaps.take` returns them.
        size: Height and width of the mask.
        threshold: Share of each frame's maximum above which the mask holds, 0 ... 1.

    Returns:
        bool [N, *size].

    Source: arXiv 2208.01626 and 2303.09535, the released code: 3x3 maxima, nearest neighbours.
    """
    highest = max_pool2d(maps.unsqueeze(1), 3, stride=1, padding=1)
    resized = interpolate(highest, size=size).squeeze(1)
    return resized / resized.amax((1, 2), keepdim=True) > threshold
