"""Scenes drawn at random from the grammar."""

from __future__ import annotations

import math
import random

import torch

from .grammar import (
    BACKGROUND_COLOURS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    Thing,
)
from .motion import GROWTH, PAN, RADII, TRAVEL, UNIT, pose

PAN_SHARE = 0.25
PAIR_SHARE = 0.5


def sample_scene(seed: int, num_things: int | None = None) -> Scene:
    """Draw a scene at random. Equal arguments give equal scenes; global random state is not used.

    Objects stay in the picture; at most a rim of them leaves it. Two objects differ in colour. Half
    of the scenes with two objects overlap in the middle of the motion, the others never do.

    Args:
        seed: Seed, at least 0.
        num_things: Number of objects, 1 or 2; None: 1 or 2 at random.

    Raises:
        ValueError: an argument is out of range.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    if num_things not in (None, 1, 2):
        raise ValueError(f"num_things is {num_things}; it must be 1, 2 or None")
    rng = random.Random(seed)
    count = num_things or (2 if rng.random() < PAIR_SHARE else 1)
    background = Background(
        pattern=rng.choice(PATTERNS),
        colour=rng.choice(BACKGROUND_COLOURS),
        angle=rng.uniform(0, math.pi),
        seed=rng.getrandbits(31),
    )
    camera = rng.choice(DIRECTIONS) if rng.random() < PAN_SHARE else "still"
    overlap = count == 2 and rng.random() < 0.5
    while True:  # until there is room for both, which two large movers never have
        things = _things(rng, count, background.colour, camera)
        if count == 1 or _separation_holds(things, overlap):
            return Scene(background, things, overlap, camera)


def _things(rng: random.Random, count: int, taken: str, camera: str) -> tuple[Thing, ...]:
    colours = rng.sample([colour for colour in COLOURS if colour != taken], count)
    return tuple(_thing(rng, colour, camera) for colour in colours)


def _thing(rng: random.Random, colour: str, camera: str) -> Thing:
    shape, texture = rng.choice(SHAPES), rng.choice(TEXTURES)
    # Nobody sees a plain round object turn.
    round_and_plain = shape in ("ball", "ring") and texture == "plain"
    motion = rng.choice([m for m in MOTIONS if not (m == "spin" and round_and_plain)])
    size, stretch, pace = rng.choice(SIZES), rng.uniform(0.94, 1.06), rng.uniform(0.6, 1.0)
    radius = RADII[size] * stretch * (1 + GROWTH * (motion in ("grow", "shrink")))
    position = []
    for step, pan in zip(UNIT.get(motion, (0, 0)), UNIT[camera], strict=True):
        reach = radius + (TRAVEL * pace * abs(step) + PAN * abs(pan)) / 2
        room = max(0.0, 1 - reach)
        position.append(rng.uniform(-room, room))
    return Thing(
        shape,
        colour,
        size,
        texture,
        motion,
        position=(position[0], position[1]),
        angle=rng.uniform(-0.3, 0.3),
        stretch=stretch,
        pace=pace,
    )


def _separation_holds(things: tuple[Thing, ...], overlap: bool) -> bool:
    one, other = (pose(thing, torch.linspace(0, 1, 9)) for thing in things)
    gap = (one.centre - other.centre).norm(dim=1) / (one.radius + other.radius)
    if overlap:
        return 0.5 <= float(gap[4]) <= 0.75
    return float(gap.min()) > 1.05
