"""The words of the procedural world: scenes, their captions, and scenes with a changed word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

SHAPES = ("ball", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
DIRECTIONS = ("right", "left", "up", "down")
MOTIONS = ("still", *DIRECTIONS, "spin", "grow", "shrink")
CAMERAS = ("still", *DIRECTIONS)
PATTERNS = ("plain", "graded", "striped", "checked", "cloudy")
BACKGROUND_COLOURS = (*COLOURS, "white", "gray", "black")
MAX_CAPTION_WORDS = 60

_VERBS = {
    "still": "rests",
    **{direction: f"moves {direction}" for direction in DIRECTIONS},
    "spin": "spins",
    "grow": "grows",
    "shrink": "shrinks",
}
_KINDS = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Background:
    """The picture behind all objects; it moves with the camera only.

    Args:
        pattern: Pattern, one of PATTERNS, in two tones of the colour ("plain": in one tone).
        colour: Colour, one of BACKGROUND_COLOURS; it is a muted tone of the object colour of
            the same name.
        angle: Angle of the pattern in radians.
        seed: Seed of the clouds; other patterns ignore it.

    Raises:
        ValueError: the pattern or the colour is not allowed.
    """

    pattern: str
    colour: str
    angle: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("pattern", self.pattern, PATTERNS)
        _check_choice("background colour", self.colour, BACKGROUND_COLOURS)


@dataclass(frozen=True)
class Thing:
    """One object and its motion.

    Lengths are in halves of the picture's side; the picture spans -1..1, x to the right, y down.

    Args:
        shape: Shape, one of SHAPES.
        colour: Colour, one of COLOURS.
        size: Size, one of SIZES.
        texture: Texture, one of TEXTURES.
        motion: Motion, one of MOTIONS.
        position: Position (x, y) of the centre in the middle of the motion, without the camera's
            motion.
        angle: Angle in radians in the middle of the motion, clockwise on the screen.
        stretch: Factor of the radius that `size` has, above 0.
        pace: Factor of the extent of the motion, above 0.

    Raises:
        ValueError: a value is not allowed.
    """

    shape: str
    colour: str
    size: str = "large"
    texture: str = "plain"
    motion: str = "still"
    position: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    stretch: float = 1.0
    pace: float = 1.0

    def __post_init__(self) -> None:
        for kind, words in _KINDS.items():
            _check_choice(kind, getattr(self, kind), words)
        _check_choice("motion", self.motion, MOTIONS)
        for name in ("stretch", "pace"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")

    def words(self) -> str:
        """The object in words, such as "small striped red ball", without the word "plain"."""
        said = (getattr(self, kind) for kind in _KINDS)
        return " ".join(word for word in said if word != "plain")


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs to know.

    Args:
        background: Background of the scene.
        things: Objects, one or two; the first one is in front.
        overlap: Whether the caption says that the first object is in front of the second, and not
            only that there are two.
        camera: Motion of the camera, one of CAMERAS; everything in the picture moves the other way.

    Raises:
        ValueError: a value is not allowed, or an object has the background's colour.
    """

    background: Background
    things: tuple[Thing, ...]
    overlap: bool = False
    camera: str = "still"

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(self.things))
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"there are {len(self.things)} things; a scene has 1 or 2")
        if self.overlap and len(self.things) == 1:
            raise ValueError("overlap is True; it takes 2 things, and there is 1")
        _check_choice("camera", self.camera, CAMERAS)
        for thing in self.things:
            if thing.colour == self.background.colour:
                others = (colour for colour in COLOURS if colour != thing.colour)
                raise ValueError(
                    f"the colour of the {thing.words()} is the background's; "
                    f"it must be one of {', '.join(others)}"
                )


def caption(scene: Scene) -> str:
    """The scene in words of VOCABULARY, separated by spaces; at most MAX_CAPTION_WORDS.

    For example "a small striped red ball moves right in front of a large green star that spins on a
    checked blue background while the camera pans left".

    Args:
        scene: Scene to describe.
    """
    front, *others = scene.things
    parts = ["a", front.words(), _VERBS[front.motion]]
    for thing in others:
        relation, pronoun = ("in front of", "that") if scene.overlap else ("and", "")
        parts += [relation, "a", thing.words(), pronoun, _VERBS[thing.motion]]
    background = scene.background
    look = [word for word in (background.pattern, background.colour) if word != "plain"]
    parts += ["on", "an" if look[0] == "orange" else "a", *look, "background"]
    if scene.camera != "still":
        parts += ["while the camera pans", scene.camera]
    return " ".join(part for part in parts if part)


def changed(scene: Scene, old: str, new: str) -> Scene:
    """The scene after an edit of one object's words; everything else stays the same.

    Args:
        scene: Scene before the edit.
        old: Words that name exactly one object by its size, texture, colour or shape, such as
            "red ball".
        new: Words that replace them, such as "blue star". Properties that `new` does not name
            stay; but a texture that `old` names and `new` does not is removed, as from the caption.

    Raises:
        ValueError: a word names none of these properties, or two words name the same one; `old`
            names no object or two; or the new colour is the background's.
    """
    before, after = _parse("old", old), _parse("new", new)
    if "texture" in before:
        after.setdefault("texture", "plain")
    found = [
        index
        for index, thing in enumerate(scene.things)
        if all(getattr(thing, kind) == word for kind, word in before.items())
    ]
    if len(found) != 1:
        there = " and ".join(f"a {thing.words()}" for thing in scene.things)
        raise ValueError(f"old is {old!r}, which names {len(found)} objects; there is {there}")
    things = list(scene.things)
    things[found[0]] = replace(things[found[0]], **after)  # type: ignore[arg-type]
    return replace(scene, things=tuple(things))


def _parse(name: str, text: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for word in text.split():
        if word in _ARTICLES:
            continue
        kind = next((kind for kind, words in _KINDS.items() if word in words), None)
        if kind is None:
            allowed = ", ".join(word for words in _KINDS.values() for word in words)
            raise ValueError(f"{name} holds {word!r}; its words must be among {allowed}")
        if kind in named:
            raise ValueError(f"{name} is {text!r}, with two words for the {kind}; it may have one")
        named[kind] = word
    if not named:
        raise ValueError(f"{name} is {text!r}; it must name a {', a '.join(_KINDS)}")
    return named


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"the {name} is {value!r}; it must be one of {', '.join(choices)}")


def _vocabulary() -> tuple[str, ...]:
    phrases = (
        "a an and in front of that on background while the camera pans",
        *_VERBS.values(),
        *SIZES,
        *TEXTURES,
        *BACKGROUND_COLOURS,
        *SHAPES,
        *PATTERNS,
        *DIRECTIONS,
    )
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    del words["plain"]  # captions pass over it
    return tuple(words)


VOCABULARY = _vocabulary()
"""Every word of every caption, once, lower-case, in a fixed order."""
