"""Names the colour and the shape of a picture's largest object, by hue and by templates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from .grammar import COLOURS, SHAPES
from .render import PALETTE
from .shapes import SYMMETRY, shape_distance

MIN_SATURATION = 0.6  # objects have 0.71 and above, backgrounds 0.5 and below
MIN_CHROMA = 45.0  # of 255; keeps the noise of a nearly black background out
MIN_AREA = 0.008  # of the picture; the smallest object that is drawn has twice as much
TEMPLATE_SCALES = (0.94, 1.0, 1.06)
TEMPLATE_STEP = math.radians(6)


@dataclass(frozen=True)
class Verdict:
    """The colour and the shape of the object that the judge sees.

    Args:
        colour: Colour, one of COLOURS.
        shape: Shape, one of SHAPES.
        overlap: Intersection over union, 0 ... 1, of the object and the best template.
        mask: Mask of the object's pixels, bool [H, W].
    """

    colour: str
    shape: str
    overlap: float
    mask: torch.Tensor


def judge(frame: torch.Tensor) -> Verdict | None:
    """The largest object of one picture, or None if nothing differs enough from its background.

    Args:
        frame: Picture, uint8 [H, W, 3], H = W.

    Raises:
        ValueError: `frame` has another shape or dtype.
    """
    if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != frame.shape[1]:
        raise ValueError(
            f"the frame is {frame.dtype} {list(frame.shape)}; it must be uint8 [H, H, 3]"
        )
    hues, vivid = _hues(frame.float())
    away = (hues[..., None] - _palette_hues() + math.pi).remainder(2 * math.pi) - math.pi
    nearest = away.abs().argmin(-1)
    nearest[~vivid] = -1
    best: tuple[int, torch.Tensor] | None = None
    for index in range(len(COLOURS)):
        blob = _largest_component(nearest == index)
        if best is None or int(blob.sum()) > int(best[1].sum()):
            best = (index, blob)
    assert best is not None
    index, blob = best
    if int(blob.sum()) < MIN_AREA * blob.numel():
        return None
    shape, overlap = _match(blob)
    return Verdict(COLOURS[index], shape, overlap, blob)


def _hues(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue in radians, and whether the colour is as vivid as objects are."""
    red, green, blue = rgb.unbind(-1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    top = rgb.amax(-1)
    chroma = top - rgb.amin(-1)
    return hue, (chroma > MIN_SATURATION * top) & (chroma > MIN_CHROMA)


@cache
def _palette_hues() -> torch.Tensor:
    return _hues(torch.tensor([PALETTE[colour] for colour in COLOURS], dtype=torch.float32))[0]


def _largest_component(mask: torch.Tensor) -> torch.Tensor:
    """The largest part of bool [H, W] whose pixels touch by sides or corners."""
    if not mask.any():
        return mask
    # Every pixel takes the highest number around it until no number spreads any further.
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view_as(mask) * mask
    while True:
        spread = torch.nn.functional.max_pool2d(numbers[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, numbers):
            break
        numbers = spread
    labels, counts = numbers[mask].unique(return_counts=True)
    return numbers == labels[counts.argmax()]


def _match(blob: torch.Tensor) -> tuple[str, float]:
    """The shape whose best template has the greatest overlap with the blob, and that overlap."""
    y, x = torch.nonzero(blob).float().mean(0)
    rows, columns = torch.meshgrid(
        *(torch.arange(length, dtype=torch.float32) for length in blob.shape), indexing="ij"
    )
    places = torch.stack([columns - x, rows - y], dim=-1)
    best = ("", -1.0)
    for shape in SHAPES:
        own = math.sqrt(_unit_area(shape) / float(blob.sum())) * places
        turns = _turns(shape)
        turned = torch.einsum("tij,hwj->thwi", turns, own)
        for scale in TEMPLATE_SCALES:
            templates = shape_distance(shape, turned / scale) <= 0
            both = (templates & blob).sum((1, 2))
            either = (templates | blob).sum((1, 2))
            overlap = float((both / either).max())
            if overlap > best[1]:
                best = (shape, overlap)
    return best


@cache
def _turns(shape: str) -> torch.Tensor:
    """Rotations by every angle that makes a difference to the shape, [T, 2, 2]."""
    period = 2 * math.pi / SYMMETRY[shape] if SYMMETRY[shape] else TEMPLATE_STEP
    angles = torch.arange(0, period - 1e-6, TEMPLATE_STEP)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, sin, -sin, cos], dim=-1).view(-1, 2, 2)


@cache
def _unit_area(shape: str) -> float:
    axis = torch.linspace(-1.2, 1.2, 481)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    inside = shape_distance(shape, points) <= 0
    return float(inside.float().mean()) * 2.4**2
