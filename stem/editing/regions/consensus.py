"""One object in all frames: predicted clean latents, averaged along the object's motion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import grid_sample

from ...attention.waiting.parked import FRAMES_AT_ONCE, current_parking

_TINY = 1e-6
LATE_SHARES = (0.5, 0.9)
"""Shares of the way to the mean that the first and the last of the late steps go: where later ones
go further, the video is steadier, and as many shapes are right."""


@dataclass(frozen=True)
class Motion:
    """Where an object is in each frame, in the coordinates of `grid_sample`, -1 ... 1.

    Args:
        centres: Centres (x, y), float32 [N, 2].
        radii: Radii, float32 [N], in any unit.
    """

    centres: torch.Tensor
    radii: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor) -> Motion:
        """The motion of what has weight, float32 [N, h, w] >= 0, quadratic over the frames.

        Frames in which nothing has weight say nothing of it.
        """
        known = weights.flatten(1).sum(1) > 0
        known = known | ~known.any()
        centres, area = _centres(weights + _TINY)
        radii = _quadratic(area.sqrt().unsqueeze(1), known).squeeze(1)
        return cls(_quadratic(centres, known), radii)

    def __getitem__(self, frames: slice) -> Motion:
        """The motion in some of the frames."""
        return Motion(self.centres[frames], self.radii[frames])

    def still(self) -> Motion:
        """The object in every frame where it is in the middle one."""
        middle = len(self.radii) // 2
        return Motion(
            self.centres[middle : middle + 1].expand_as(self.centres),
            self.radii[middle : middle + 1].expand_as(self.radii),
        )


def moved(
    frames: torch.Tensor, before: Motion, after: Motion, mode: str = "bilinear"
) -> torch.Tensor:
    """Frames [N, c, h, w] whose object moves from where it is `before` to where it is `after`.

    Args:
        frames: Frames.
        before: Motion of the object in them.
        after: Motion that it gets.
        mode: Interpolation of `grid_sample`.
    """
    count, _, height, width = frames.shape
    grid = places((height, width), device=frames.device).expand(count, -1, -1, -1)
    scale = (before.radii / after.radii)[:, None, None, None]
    sampled = (grid - after.centres[:, None, None]) * scale + before.centres[:, None, None]
    return grid_sample(frames, sampled, mode=mode, padding_mode="reflection", align_corners=False)


def in_consensus(
    clean: torch.Tensor, masks: torch.Tensor, motion: Motion, late: float | None = None
) -> torch.Tensor:
    """Clean latents, inside the masks nearer to their mean along the object's motion.

    Every frame is warped onto the middle one, where the mean is taken, weighted by the warped
    masks; it is warped back into every frame. Early steps decide the outline: they take the mean,
    by cubic interpolation, as the linear one blurs small shapes away. Later steps go a part
    of the way, which rises from one of `LATE_SHARES` to the other.

    Args:
        clean: Predicted clean latents [N, c, h, w].
        masks: Where the object is, bool [N, h, w].
        motion: Motion of the source's object.
        late: Place of the step among the late ones, from 0 to 1; None: it is an early one.
    """
    parking, middle = current_parking(), motion.still()
    first, last = LATE_SHARES
    mode, part_of_way = "bicubic", 1.0
    if late is not None:
        mode, part_of_way = "bilinear", first + late * (last - first)
    summed = total = torch.zeros(1, device=clean.device)
    along = (clean, masks, motion.centres, motion.radii)
    for part, mask, centres, radii in parking.parts(FRAMES_AT_ONCE, *along):
        place, still = Motion(centres, radii), middle[: len(part)]
        weight = moved(mask.float().unsqueeze(1), place, still)
        summed = summed + (moved(part, place, still, mode) * weight).sum(0, keepdim=True)
        total = total + weight.sum(0, keepdim=True)
    mean = summed / (total + _TINY)

    def agreed(
        clean: torch.Tensor, masks: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor
    ) -> torch.Tensor:
        still = middle[: len(clean)]
        back = moved(mean.expand_as(clean).contiguous(), still, Motion(centres, radii), mode)
        return clean + part_of_way * masks.float().unsqueeze(1) * (back - clean)

    return parking.by_frames(agreed, *along)


def carried(noise: torch.Tensor, motion: Motion) -> torch.Tensor:
    """Noise of the middle frame in every frame, carried along with the object.

    Every cell is one cell of the noise, as a mean of several would have less of it.

    Args:
        noise: Noise [1, c, h, w].
        motion: Motion of the object.

    Returns:
        [N, c, h, w].
    """
    middle = motion.still()

    def placed(centres: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
        frames = noise.expand(len(radii), -1, -1, -1).contiguous()
        return moved(frames, middle[: len(radii)], Motion(centres, radii), "nearest")

    return current_parking().by_frames(placed, motion.centres, motion.radii)


def places(
    size: Sequence[int],
    finer: int = 1,
    rows: range | None = None,
    columns: range | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The centres (x, y) of parts of pixels in the coordinates of `grid_sample`.

    Args:
        size: Height and width in pixels.
        finer: Number of parts of a pixel, along a side.
        rows: Rows of pixels; None: all.
        columns: Columns likewise.
        device: Device of the result; None: the CPU.

    Returns:
        float32 [1, finer * rows, finer * columns, 2].
    """

    def along(side: int, chosen: range | None) -> torch.Tensor:
        chosen = range(side) if chosen is None else chosen
        parts = torch.arange(finer * chosen.start, finer * chosen.stop, device=device)
        return (2 * parts + 1) / (finer * side) - 1

    y, x = torch.meshgrid(along(size[0], rows), along(size[1], columns), indexing="ij")
    return torch.stack([x, y], -1).unsqueeze(0)


def _centres(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of mass (x, y) [N, 2] of weights [N, h, w], and their sums [N]."""
    x, y = places(weights.shape[1:], device=weights.device)[0].unbind(-1)
    total = weights.sum((1, 2))
    centre = torch.stack([(weights * x).sum((1, 2)), (weights * y).sum((1, 2))], -1)
    return centre / total.unsqueeze(1), total


def _quadratic(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The quadratic over the frames nearest to the values [N, m] of those that are known."""
    known = known.cpu()
    time = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    powers = torch.stack([time**power for power in range(min(3, int(known.sum())))], 1)
    # A CPU's default driver, gelsy, reads memory that nothing has written: other bits each time.
    found = torch.linalg.lstsq(powers[known], values.cpu().double()[known], driver="gels")
    fitted = powers @ found.solution
    return fitted.to(values.device, values.dtype)
