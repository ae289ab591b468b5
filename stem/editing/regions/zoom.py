"""A window that follows a small thing through a video, seen at the size of the whole frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, max_pool2d

from .consensus import Motion, places
from .masks import dilated

FILL = 0.7
"""Share of a window's side that the thing in it takes."""
LEAST, MOST = 0.25, 0.65
"""Shares of a frame's side that a window has: below the first a few pixels are blown up to a frame;
above the second the thing is large already, and a window makes edits of shapes worse."""
_EDGE = 1e-6
_OF_CELLS = 0.98  # of a thing's cells lie in its window; a stray one need not


@dataclass(frozen=True)
class Zoom:
    """Where a window is in each frame, in the coordinates of `grid_sample`, -1 ... 1.

    Args:
        centres: Centres (x, y), float32 [N, 2].
        shares: Shares of the frame's width and height that the window has, float32 [N].
    """

    centres: torch.Tensor
    shares: torch.Tensor

    @classmethod
    def of(cls, cores: torch.Tensor, scenes: Sequence[range]) -> Zoom | None:
        """The windows around what is to change, one path and one size a scene.

        Args:
            cores: Where a thing is, bool [N, h, w].
            scenes: Frames of each scene.

        Returns:
            Windows, which are whole frames in scenes where they would have more than `MOST` of
            them; None where all would.
        """
        centres, shares = [], []
        for scene in scenes:
            here = cores[scene.start : scene.stop].cpu()
            path = Motion.of(here.float()).centres
            share = max(_reach(here, path) / FILL, LEAST)
            share = 1.0 if share > MOST else share
            centres.append(path.clamp(share - 1, 1 - share))
            shares.append(torch.full((len(scene),), share))
        found = cls(torch.cat(centres), torch.cat(shares))
        return found if bool((found.shares < 1).any()) else None

    def __getitem__(self, frames: slice | Sequence[int]) -> Zoom:
        """The windows of some frames."""
        return Zoom(self.centres[frames], self.shares[frames])

    def seen(self, frames: torch.Tensor) -> torch.Tensor:
        """What the windows show, as large as the frames.

        Args:
            frames: Frames, uint8 [N, H, W, 3].

        Returns:
            uint8 [N, H, W, 3].
        """
        pictures = frames.permute(0, 3, 1, 2).float()
        grid = places(frames.shape[1:3]) * self.shares[:, None, None, None]
        grid = grid + self.centres[:, None, None]
        shown = grid_sample(
            pictures, grid, mode="bicubic", padding_mode="reflection", align_corners=False
        )
        return shown.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def pasted(
        self, shown: torch.Tensor, source: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """The source's frames, with what windows show inside masks; one fades into the other, at
        the edges of a window, too.

        Args:
            shown: What the windows show, uint8 [N, H, W, 3].
            source: Frames of the source, likewise.
            masks: Where they are taken, bool [N, h, w] in latent cells of the windows.

        Returns:
            uint8 [N, H, W, 3].
        """
        height, width = shown.shape[1:3]
        weights = dilated(masks, 1).float().cpu() * self._fades(*masks.shape[1:])
        weights = interpolate(weights.unsqueeze(1), (height, width), mode="bilinear")
        pictures = torch.cat([shown.permute(0, 3, 1, 2).float(), weights], 1)
        mixed = source.float()
        for index, picture in enumerate(pictures):
            window = self[index : index + 1]
            finer = math.ceil(1 / float(window.shares))
            rows, columns = (window._pixels(side, axis) for axis, side in ((1, height), (0, width)))
            grid = places((height, width), finer, rows, columns)
            found = avg_pool2d(window._placed(picture.unsqueeze(0), grid), finer)
            colours, weight = (part.permute(1, 2, 0) for part in found[0].split((3, 1)))
            under = mixed[index, rows.start : rows.stop, columns.start : columns.stop]
            # Colours are averaged with the part of a pixel that the window covers.
            under.mul_(1 - weight).add_(colours)
        return mixed.round().clamp(0, 255).to(torch.uint8)

    def masks_of_frames(self, masks: torch.Tensor) -> torch.Tensor:
        """The cells of the frames that masks [N, h, w] of the windows touch, bool [N, h, w]."""
        finer = math.ceil(1 / LEAST)
        grid = places(masks.shape[1:], finer)
        found = []
        for index, mask in enumerate(masks):
            values = mask.float().cpu()[None, None]
            placed = self[index : index + 1]._placed(values, grid, "nearest")
            found.append(max_pool2d(placed, finer)[0, 0] > 0)
        return torch.stack(found)

    def _pixels(self, side: int, axis: int) -> range:
        """The pixels, along an axis of so many, that the first frame's window touches."""
        centre, share = float(self.centres[0, axis]), float(self.shares[0])
        first, end = ((centre + sign * share + 1) / 2 * side for sign in (-1, 1))
        return range(max(0, math.floor(first)), min(side, math.ceil(end)))

    def _fades(self, height: int, width: int) -> torch.Tensor:
        """Weights [N, h, w] of the windows' cells: 0 beside the rest of the frame, else 1."""
        fades = torch.ones(len(self.shares), height, width)
        begins = self.centres - self.shares[:, None] > _EDGE - 1
        ends = self.centres + self.shares[:, None] < 1 - _EDGE
        fades[begins[:, 0], :, 0] = fades[ends[:, 0], :, -1] = 0
        fades[begins[:, 1], 0] = fades[ends[:, 1], -1] = 0
        return fades

    def _placed(
        self, values: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear"
    ) -> torch.Tensor:
        """Windows' values [N, c, h, w] at places of the frames; 0 around the windows.

        The last channel weighs the others.
        """
        grid = (grid - self.centres[:, None, None]) / self.shares[:, None, None, None]
        inside = (grid.abs().amax(-1) < 1).unsqueeze(1)
        found = grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=False)
        weight = found[:, -1:] * inside
        return torch.cat([found[:, :-1] * weight, weight], 1)


@dataclass(frozen=True)
class ZoomedVideo:
    """What windows show of a video, as a video of the same size.

    Args:
        frames: Function that gives the video's frames, a number of them at a time: uint8
            [n, H, W, 3].
        zoom: Windows.
        num_frames: Number N of frames.
        height: Height H in pixels.
        width: Width W in pixels.
        fps: Frames per second.
    """

    frames: Callable[[int], Iterator[torch.Tensor]]
    zoom: Zoom
    num_frames: int
    height: int
    width: int
    fps: Fraction

    def parts(self, count: int) -> Iterator[torch.Tensor]:
        """The frames, `count` at a time: uint8 [n, H, W, 3]."""
        first = 0
        for part in self.frames(count):
            yield self.zoom[first : first + len(part)].seen(part)
            first += len(part)


def _reach(cores: torch.Tensor, centres: torch.Tensor) -> float:
    """How far a thing reaches from a path, in halves of a frame; 1 where there is none."""
    frame, row, column = torch.nonzero(cores, as_tuple=True)
    if not len(frame):
        return 1.0
    height, width = cores.shape[1:]
    cells = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], 1)
    half_a_cell = torch.tensor([1 / width, 1 / height])
    reach = ((cells - centres[frame]).abs() + half_a_cell).amax(1).sort().values
    return float(reach[math.ceil(_OF_CELLS * len(reach)) - 1])
