"""Edits of world videos with their exact answers: another colour, texture or shape."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from .grammar import COLOURS, SHAPES, TEXTURES, Scene, changed
from .render import Clip, render
from .sampling import sample_scene

EDIT_KINDS = ("colour", "texture", "shape")
"""Properties of an object that an edit may change."""
_CHOICES = {"colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}


@dataclass(frozen=True)
class WorldEdit:
    """A video of one object, and the exact result of an edit of one of its words.

    Args:
        kind: Property that is edited, one of EDIT_KINDS.
        scene: Scene before the edit.
        source: Clip before the edit; its caption is the source prompt.
        exact: Clip after the edit, rendered. Its caption is the target prompt, its frames are the
            exact answer, and its flow and occlusion are those of the edited scene.
        words: Words of the source prompt that the edit removes, and words that replace them;
            without the word "plain", which captions omit.
        colour: Colour of the edited object.
        shape: Shape of the edited object.
    """

    kind: str
    scene: Scene
    source: Clip
    exact: Clip
    words: tuple[tuple[str, ...], tuple[str, ...]]
    colour: str
    shape: str

    @property
    def objects(self) -> torch.Tensor:
        """Pixels whose centres show the object before or after the edit, bool [N, H, W]."""
        return self.source.masks[:, 0] | self.exact.masks[:, 0]

    @property
    def region(self) -> torch.Tensor:
        """Pixels of `objects` and every other pixel that the edit changes, bool [N, H, W].

        The other pixels are on the anti-aliased rims. Outside the region, the exact answer equals
        the source, bit for bit.
        """
        return self.objects | (self.source.frames != self.exact.frames).any(-1)


def world_edit(seed: int, kind: str, num_frames: int, size: int = 64) -> WorldEdit:
    """An edit of the scene `sample_scene(seed, num_things=1)`. Equal arguments give equal edits.

    The new word is drawn at random from the others of its kind; a new colour is not that of the
    background.

    Args:
        seed: Seed of the scene and, with the kind, of the new word, at least 0.
        kind: Property to edit, one of EDIT_KINDS.
        num_frames: Number N of frames, at least 1.
        size: Height and width of the frames in pixels.

    Raises:
        ValueError: an argument is out of range.
    """
    if kind not in EDIT_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(EDIT_KINDS)}")
    scene = sample_scene(seed, num_things=1)
    (thing,) = scene.things
    old = getattr(thing, kind)
    taken = {old, scene.background.colour}
    new = random.Random(f"{kind} {seed}").choice([w for w in _CHOICES[kind] if w not in taken])
    after = _edited(scene, kind, old, new)
    return WorldEdit(
        kind=kind,
        scene=scene,
        source=render(scene, num_frames, size),
        exact=render(after, num_frames, size),
        words=(_said(old), _said(new)),
        colour=after.things[0].colour,
        shape=after.things[0].shape,
    )


def _edited(scene: Scene, kind: str, old: str, new: str) -> Scene:
    (thing,) = scene.things
    if kind == "texture":
        return changed(scene, f"{old} {thing.shape}", f"{new} {thing.shape}")
    return changed(scene, old, new)


def _said(word: str) -> tuple[str, ...]:
    return () if word == "plain" else (word,)
