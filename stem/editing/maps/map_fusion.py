"""The source's attention maps in the target's place: FateZero's fusion of maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

from stem_kernels import blended_attention

from ...attention import Hook
from ...attention.layers.hooks import Attend, Operands, Site
from ..regions.masks import layer_size
from .prompts import ColumnMap

Size = tuple[int, int]
Mask = torch.Tensor | Callable[[Size], torch.Tensor]


class MapFusion(Hook):
    """The last video of a batch attends by the first one's maps, to its own values.

    Rows are [source | unconditional | conditional] or [source | conditional]; only the last video
    changes, and a batch of one video does not. STEM's attention gives all videos joint bases, so
    that the source's map to base k means the target's base k.

    Args:
        columns: Columns of the source's text maps for the target's prompt.
        latent_size: Height and width of the latents.
        equalizer: Factors [L] of the columns where the source's maps are taken, or None.
        backend: Name of the backend of `stem_kernels.blended_attention`.

    Attributes:
        cross: Share of the source in text maps, one number or [L] for the target's tokens,
            0 ... 1; float 0.0 leaves them alone.
        self_on: Whether the source's self-attention maps are taken.
        mask: Share m of the target's own self-attention maps, 0 ... 1, [N, h, w]: in latent
            cells, which are averaged for a layer; or a function of a layer's height and width.
            None: 0 everywhere.

    Source: arXiv 2303.09535; through bases it is this package's.
    """

    joint_bases = True

    def __init__(
        self,
        columns: ColumnMap,
        latent_size: Size,
        *,
        equalizer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self.columns = columns
        self.latent_size = latent_size
        self.equalizer = equalizer
        self.backend = backend
        self.cross: torch.Tensor | float = 0.0
        self.self_on = False
        self.mask: Mask | None = None

    @property
    def takes_text_maps(self) -> bool:
        """Whether the source's text maps are taken."""
        return not (isinstance(self.cross, float) and self.cross == 0.0)

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        if len(maps) == 1 or not self.takes_text_maps:
            return maps
        target = maps[-1]
        fused = self.columns(maps[0], target)
        if self.equalizer is not None:
            fused = fused * self.equalizer
        fused = self.cross * fused + (1 - self.cross) * target
        return torch.cat([maps[:-1], fused.unsqueeze(0)])

    def operands(self, site: Site, operands: Operands) -> Operands:
        if not self.self_on or self.mask is not None or len(operands.query) == 1:
            return operands
        query, key = (torch.cat([part[:-1], part[:1]]) for part in (operands.query, operands.key))
        bias = operands.bias
        return Operands(
            query, key, operands.value, None if bias is None else torch.cat([bias[:-1], bias[:1]])
        )

    def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
        if not self.self_on or self.mask is None or len(operands.query) == 1:
            return attend(operands)
        operands.refuse_calibrated(self)
        share = self._share(self.mask, site, operands.query)
        source, target = operands.of(slice(0, 1)), operands.of(slice(-1, None))
        if operands.bias is None:  # of dense attention, where SDPA is the faster
            by_source = Operands(source.query, source.key, target.value)
            attended = attend(_joined(operands, by_source))
            others, own, given = attended[:-2], attended[-2], attended[-1]
            shares = share[:, None, :, None].to(own.dtype)
            blended = torch.lerp(given, own, shares)
        else:
            others = attend(operands.of(slice(0, -1)))
            blended = blended_attention(
                target.query[0],
                target.key[0],
                source.query[0],
                source.key[0],
                target.value[0],
                share,
                bias=operands.bias[0],
                backend=self.backend,
            )
        return torch.cat([others, blended.unsqueeze(0)])

    def _share(self, mask: Mask, site: Site, query: torch.Tensor) -> torch.Tensor:
        """The mask of the frames in hand, for each query: [groups, n]."""
        _, groups, _, num_queries, _ = query.shape
        frames = list(site.frames)
        size = layer_size(groups * num_queries // len(frames), *self.latent_size)
        if isinstance(mask, torch.Tensor):
            of_frames = interpolate(mask[frames].float().unsqueeze(1), size=size, mode="area")
        else:
            of_frames = mask(size)[frames]
        return of_frames.reshape(groups, num_queries)


def _joined(operands: Operands, more: Operands) -> Operands:
    """Operands without a bias, with other videos behind theirs."""
    return Operands(
        torch.cat([operands.query, more.query]),
        torch.cat([operands.key, more.key]),
        torch.cat([operands.value, more.value]),
    )
