"""A scene's frames and their exact truth: masks, optical flow, occlusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grammar import BACKGROUND_COLOURS, Background, Scene, Thing, caption
from .motion import Pose, drift, pose
from .shapes import coverage, pattern_weight, shape_distance, texture_weight

PALETTE = {
    "red": (220, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 40),
    "green": (40, 170, 60),
    "cyan": (40, 205, 215),
    "blue": (40, 80, 225),
    "purple": (135, 45, 205),
    "pink": (240, 65, 165),
}
SHADE = 0.55  # the second tone of stripes and dots; a factor, so that it keeps the hue
NEUTRAL_TONES = {"white": (240, 200), "gray": (130, 95), "black": (20, 60)}


@dataclass(frozen=True)
class Clip:
    """N frames of a scene with k objects, with their exact masks, flow and occlusion.

    Args:
        frames: Frames, uint8 [N, H, W, 3], RGB, anti-aliased.
        masks: Masks of the objects, bool [N, k, H, W]; True where the pixel's centre shows the
            object.
        flow: Flow [N-1, H, W, 2], float32, (dx, dy) in pixels, of the point that each pixel's
            centre shows, from frame t to frame t + 1, whether it is seen there or not.
        occlusion: Mask [N-1, H, W], bool, True where that point is not seen in frame t + 1: it is
            covered, or outside the picture.
        caption: Caption, which is the scene in words.
    """

    frames: torch.Tensor
    masks: torch.Tensor
    flow: torch.Tensor
    occlusion: torch.Tensor
    caption: str


def render(
    scene: Scene, num_frames: int, size: int, span: tuple[float, float] = (0.0, 1.0)
) -> Clip:
    """Draw a scene. Equal arguments give equal bits, and any size shows the same picture.

    Args:
        scene: Scene to draw.
        num_frames: Number N of frames, at least 1, at equal distances in time; they show the whole
            motion, for any N.
        size: Height and width H = W in pixels, at least 8.
        span: Times of the first and the last frame; the motion begins at 0 and ends at 1. A single
            frame is at the first time.

    Raises:
        ValueError: `num_frames`, `size` or `span` is out of range.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; it must be at least 1")
    if size < 8:
        raise ValueError(f"size is {size}; it must be at least 8 pixels")
    if not all(0 <= time <= 1 for time in span):
        raise ValueError(f"span is {span}; its times must be from 0 to 1")
    times = torch.linspace(*span, num_frames)
    shift = drift(scene, times)
    poses = [_shifted(pose(thing, times), shift) for thing in scene.things]
    points = _pixel_centres(size)

    picture = _background(scene.background, points - shift[:, None, None], size / 2)
    own = [placed.to_own(points) for placed in poses]
    distances = [
        shape_distance(thing.shape, where) for thing, where in zip(scene.things, own, strict=True)
    ]
    # The first thing is in front, so it is painted last.
    for thing, placed, where, distance in reversed(
        list(zip(scene.things, poses, own, distances, strict=True))
    ):
        pixels = placed.radius[:, None, None] * (size / 2)
        alpha = coverage(distance, pixels)[..., None]
        picture = torch.lerp(picture, _surface(thing, where, pixels), alpha)

    surface = _visible_surface(distances)
    masks = torch.stack([surface == index for index in range(len(poses))], dim=1)
    flow, occlusion = _forward(scene, poses, own, shift, surface, points)
    return Clip(
        frames=picture.round().to(torch.uint8),
        masks=masks,
        flow=flow * (size / 2),
        occlusion=occlusion,
        caption=caption(scene),
    )


def background_tones(colour: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tones of a background, float [3] each in 0..255; duller than any object's.

    Args:
        colour: one of BACKGROUND_COLOURS.
    """
    if colour not in BACKGROUND_COLOURS:
        raise ValueError(f"the colour is {colour!r}; it must be one of {BACKGROUND_COLOURS}")
    if colour in NEUTRAL_TONES:
        one, other = NEUTRAL_TONES[colour]
        return torch.full((3,), float(one)), torch.full((3,), float(other))
    muted = 0.5 * torch.tensor(PALETTE[colour], dtype=torch.float32) + 70
    return muted, 0.72 * muted


def _pixel_centres(size: int) -> torch.Tensor:
    """float [1, H, W, 2], (x, y) from -1 to 1 between the picture's edges."""
    centres = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1)[None]


def _shifted(placed: Pose, shift: torch.Tensor) -> Pose:
    return Pose(placed.centre + shift, placed.angle, placed.radius)


def _background(background: Background, points: torch.Tensor, pixels: float) -> torch.Tensor:
    weight = pattern_weight(background.pattern, points, background.angle, background.seed, pixels)
    return torch.lerp(*background_tones(background.colour), weight[..., None])


def _surface(thing: Thing, points: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    weight = texture_weight(thing.texture, points, pixels)[..., None]
    return points.new_tensor(PALETTE[thing.colour]) * (1 - (1 - SHADE) * weight)


def _visible_surface(distances: list[torch.Tensor]) -> torch.Tensor:
    """int64 [N, H, W]: the front object at a pixel's centre, or their number for the background."""
    surface = torch.full(distances[0].shape, len(distances))
    for index, distance in reversed(list(enumerate(distances))):
        surface[distance <= 0] = index
    return surface


def _forward(
    scene: Scene,
    poses: list[Pose],
    own: list[torch.Tensor],
    shift: torch.Tensor,
    surface: torch.Tensor,
    points: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow in picture coordinates and occlusion, of every frame but the last."""
    now = surface[:-1]
    landing = points + (shift[1:] - shift[:-1])[:, None, None]
    for index, placed in enumerate(poses):
        moved = placed[1:].to_picture(own[index][:-1])
        landing = torch.where((now == index)[..., None], moved, landing)
    lost = (landing.abs() > 1).any(-1)
    # Only what is in front can cover: of a thing, the things before it; of the background, all.
    for index, (thing, placed) in enumerate(zip(scene.things, poses, strict=True)):
        covers = shape_distance(thing.shape, placed[1:].to_own(landing)) <= 0
        lost |= covers & (now > index)
    return landing - points, lost
