"""Shapes and patterns as signed distances, from which edges are anti-aliased at any size."""

from __future__ import annotations

import math
import random

import torch

STAR_TIP, STAR_NOTCH = 1.0, 0.45
SYMMETRY = {"ball": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "star": 5}
"""How often a full turn maps a shape onto itself; 0 stands for every turn."""


def shape_distance(shape: str, points: torch.Tensor) -> torch.Tensor:
    """Signed distance to a shape's outline, negative inside; exact beside straight and round edges.

    Args:
        shape: one of SHAPES.
        points: float [..., 2] in the object's own coordinates, its radius being about 1.

    Returns:
        float [...], in the same unit.
    """
    x, y = points.unbind(-1)
    if shape == "ball":
        return torch.hypot(x, y) - 0.85
    if shape == "ring":
        return (torch.hypot(x, y) - 0.68).abs() - 0.2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.74
    if shape == "triangle":
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.5
    if shape == "cross":
        long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - 0.9, short - 0.28)
    # The star has ten mirror images of one edge, from a tip to a notch; fold all onto it.
    sector = math.pi / 5
    turn = (torch.atan2(x, -y) + sector).remainder(2 * sector) - sector
    along, across = torch.hypot(x, y) * turn.cos(), torch.hypot(x, y) * turn.sin().abs()
    normal_along = STAR_NOTCH * math.sin(sector)
    normal_across = STAR_TIP - STAR_NOTCH * math.cos(sector)
    length = math.hypot(normal_along, normal_across)
    edge = ((along - STAR_TIP) * normal_along + across * normal_across) / length
    return torch.maximum(edge, torch.hypot(x, y) - STAR_TIP)  # or blur would lengthen the tips


def coverage(distance: torch.Tensor, pixels: torch.Tensor | float) -> torch.Tensor:
    """How much of a pixel lies inside, 0..1; `pixels` are the pixels in a unit of distance."""
    return (0.5 - distance * pixels).clamp(0, 1)


def texture_weight(
    texture: str, points: torch.Tensor, pixels: torch.Tensor | float
) -> torch.Tensor:
    """How much of an object's second tone shows, float [...] in 0..1.

    Args:
        texture: one of TEXTURES.
        points: float [..., 2] in the object's own coordinates.
        pixels: how many pixels one unit of these is.
    """
    if texture == "striped":
        # Aslant, for the cross and the square not to pass for stripes.
        return _bands(points.sum(-1) * math.sqrt(0.5), 0.64, pixels)
    if texture == "dotted":
        cell = (points / 0.56 + 0.5).remainder(1) - 0.5
        return coverage(0.56 * torch.hypot(cell[..., 0], cell[..., 1]) - 0.17, pixels)
    return torch.zeros_like(points[..., 0])


def pattern_weight(
    pattern: str, points: torch.Tensor, angle: float, seed: int, pixels: float
) -> torch.Tensor:
    """How much of a background's second tone shows, float [...] in 0..1.

    Args:
        pattern: one of PATTERNS.
        points: float [..., 2] in coordinates that move with the background.
        angle, seed: see `Background`.
        pixels: how many pixels one unit of the coordinates is.
    """
    x, y = points.unbind(-1)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    if pattern == "graded":
        return (0.5 + along / 3).clamp(0, 1)
    if pattern == "striped":
        return _bands(along, 0.5, pixels)
    if pattern == "checked":
        one, other = _bands(along, 0.7, pixels), _bands(across, 0.7, pixels)
        return one + other - 2 * one * other
    if pattern == "cloudy":
        rng = random.Random(seed)
        total = torch.zeros_like(x)
        for _ in range(6):
            heading, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(2, 6)
            wave_x, wave_y = frequency * math.cos(heading), frequency * math.sin(heading)
            total += torch.cos(wave_x * x + wave_y * y + rng.uniform(0, 2 * math.pi))
        return (0.5 + total / 5).clamp(0, 1)
    return torch.zeros_like(x)


def _bands(along: torch.Tensor, period: float, pixels: torch.Tensor | float) -> torch.Tensor:
    return coverage((((along / period).remainder(1) - 0.5).abs() - 0.25) * period, pixels)
