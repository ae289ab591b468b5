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
    """What fills the picture behind all objects; it moves with the camera only.

    Args:
        pattern: one of PATTERNS; two tones of the colour, one only if "plain".
        colour: one of BACKGROUND_COLOURS, a muted tone of an object's colour of that name.
        angle: radians, of the pattern.
        seed: Seed of the clouds; other patterns ignore it.
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
        shape, colour, size, texture, motion: one of SHAPES, COLOURS, SIZES, TEXTURES, MOTIONS.
        position: (x, y) of the centre in the middle of the motion, before the camera's.
        angle: radians, clockwise on the screen, in the middle of the motion.
        stretch: > 0; the radius of `size` times this.
        pace: > 0; the extent of the motion times this.
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
        """Such as "small striped red ball"; a plain texture is not said."""
        said = (getattr(self, kind) for kind in _KINDS)
        return " ".join(word for word in said if word != "plain")


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs to know.

    Args:
        background: the background.
        things: one or two objects, the front one first.
        overlap: the caption says that the first is in front of the second, not that there are two.
        camera: one of CAMERAS; all things seen move the other way.

    Raises:
        ValueError: a value that is not allowed, or an object of the background's colour.
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

    Such as "a small striped red ball moves right in front of a large green star that spins on a
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
    """The scene after an edit of one object's words, everything else being the same.

    Args:
        scene: the scene before.
        old: words that name exactly one object by its size, texture, colour or shape, such as
            "red ball".
        new: words to take their place, such as "blue star". What they do not name stays, but a
            texture that `old` names and `new` does not goes, as it would from the caption.

    Raises:
        ValueError: a word that names none of these or names one twice; `old` naming no object
            or two; the new colour being the background's.
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
