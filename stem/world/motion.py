"""Where objects and camera are at a time: the motions' extents, and poses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grammar import Scene, Thing

RADII = {"small": 0.28, "large": 0.46}
TRAVEL = 0.7  # of a moving object, over the whole clip, in halves of the picture's side
TURN = 2.0  # radians
GROWTH = 0.25  # the radius goes from 1 - GROWTH to 1 + GROWTH of its middle
PAN = 0.4
UNIT = {
    "still": (0.0, 0.0),
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}


@dataclass(frozen=True)
class Pose:
    """An object's place in N frames: a similarity from its own coordinates to the picture's.

    Args:
        centre: float [N, 2].
        angle: float [N], radians, clockwise on the screen.
        radius: float [N].
    """

    centre: torch.Tensor
    angle: torch.Tensor
    radius: torch.Tensor

    def __getitem__(self, frames: slice) -> Pose:
        return Pose(self.centre[frames], self.angle[frames], self.radius[frames])

    def to_own(self, points: torch.Tensor) -> torch.Tensor:
        """Picture coordinates [N or 1, H, W, 2] in the object's own, [N, H, W, 2]."""
        shifted = (points - self.centre[:, None, None]) / self.radius[:, None, None, None]
        return _rotate(shifted, -self.angle)

    def to_picture(self, points: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_own`."""
        scaled = _rotate(points, self.angle) * self.radius[:, None, None, None]
        return scaled + self.centre[:, None, None]


def pose(thing: Thing, times: torch.Tensor) -> Pose:
    """The object's pose without the camera.

    Args:
        times: float [N], 0 at the clip's beginning and 1 at its end.
    """
    phase = (times - 0.5) * thing.pace
    direction = times.new_tensor(UNIT.get(thing.motion, (0.0, 0.0)))
    centre = times.new_tensor(thing.position) + TRAVEL * phase[:, None] * direction
    turn = TURN if thing.motion == "spin" else 0.0
    growth = {"grow": GROWTH, "shrink": -GROWTH}.get(thing.motion, 0.0)
    radius = RADII[thing.size] * thing.stretch * (1 + 2 * growth * phase)
    return Pose(centre, thing.angle + turn * phase, radius)


def drift(scene: Scene, times: torch.Tensor) -> torch.Tensor:
    """What the camera's pan adds to every position, float [N, 2]; the world goes the other way."""
    direction = times.new_tensor(UNIT[scene.camera])
    return -PAN * (times[:, None] - 0.5) * direction


def _rotate(points: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
