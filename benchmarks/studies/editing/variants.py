"""What the editing study compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stem.inversion import METHODS as INVERSIONS
from stem.world import EDIT_KINDS, WorldEdit

CEILING = "ceiling"
UNEDITED = "unedited"
BASELINE = "pnp"
OURS = "fusion"


@dataclass(frozen=True)
class Variant:
    """One way to edit.

    Args:
        method: Name of the editing method.
        inversion: Name of the inversion that it starts from.
        guidance: Guidance scale; None: the method's own.
        options: Changes to the method's options.
        kinds: Kinds of edits that it is tried on.
        to_words: Whether the options of FateZero that depend on the prompts are set, see
            `fatezero_options`.
    """

    method: str
    inversion: str
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = EDIT_KINDS
    to_words: bool = False

    def options_for(self, edit: WorldEdit) -> dict[str, Any]:
        """The options for one edit."""
        found = dict(self.options)
        if self.method == OURS:
            found.setdefault("preset", edit.kind)
        return found | (fatezero_options(edit) if self.to_words else {})


def fatezero_options(edit: WorldEdit) -> dict[str, Any]:
    """FateZero's published constants: attributes 0.5/0.5; shapes the same with a blend mask.

    Words are replaced where there are equally many, and aligned where one is put in or taken away.
    """
    before, after = edit.words
    found: dict[str, Any] = {
        "mapping": "replace" if len(before) == len(after) else "refine",
        "cross_replace": 0.5,
        "self_replace": 0.5,
    }
    if edit.kind == "shape":
        found["blend_words"] = (before, after)
    return found


def _step(**options: Any) -> Variant:
    """A row of fusion's ablation, which is of colour edits."""
    return Variant("fusion", "stem", 3.0, {"mask": False, **options}, ("colour",))


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("pnp", "ddim"),
    "tokenflow": Variant("tokenflow", "ddim"),
    "tokenflow chunk=4": Variant("tokenflow", "ddim", options={"chunk": 4}),
    "tokenflow chunk=4 extended=stem": Variant(
        "tokenflow", "ddim", options={"chunk": 4, "extended": "stem"}
    ),
    "sdedit": Variant("sdedit", "ddim"),
    "fatezero": Variant("fatezero", "st-ddim", to_words=True),
    OURS: Variant("fusion", "stem"),
    "fusion consensus": Variant(
        "fusion", "stem", options={"consensus": True}, kinds=("colour", "texture")
    ),
    "fusion no consensus": Variant("fusion", "stem", 7.5, {"consensus": False}, ("shape",)),
    "guidance 3": Variant("fatezero", "stem", 3.0, kinds=("colour",), to_words=True),
    "guided in the first half": _step(cross_maps=0.5, self_maps=0.5),
    "source maps at all steps": _step(cross_maps=1.0, self_maps=1.0),
}
"""By name; each on the inversion that it was published with, "pnp" and what builds on it on DDIM
with attention per frame. `fusion` has the preset of the edit's kind, with which consensus is on for
shapes alone. TokenFlow's published chunk is 8, which leaves 8 frames one pivot."""

ABLATION: dict[str, tuple[str, str]] = {
    "FateZero + STEM": ("fatezero", "stem"),
    "1: guidance 3": ("guidance 3", "stem"),
    "2: guided in the first half only": ("guided in the first half", "stem"),
    "3: source maps at all steps": ("source maps at all steps", "stem"),
    "4: a mask on bases, blended at every step": (OURS, "stem"),
    "5: consensus": ("fusion consensus", "stem"),
}
"""Fusion's steps one after the other, each with the ones before: (variant, inversion)."""

CROSSED = ("pnp", "tokenflow", "sdedit", "fatezero", OURS)
"""Variants that are tried on every inversion."""
LONG = (BASELINE, "tokenflow", OURS)
"""Variants that are tried on longer videos."""
LONG_FRAMES = 20


@dataclass(frozen=True)
class Series:
    """Rows that belong together: an edit of one kind by one variant, scene by scene.

    Args:
        variant: Name in VARIANTS, or CEILING or UNEDITED.
        inversion: Name of the inversion; "" for those two.
        kind: Kind of edit.
        frames: Number of frames.
    """

    variant: str
    inversion: str
    kind: str
    frames: int

    @property
    def name(self) -> str:
        """The series in the file of results."""
        on = f" on {self.inversion}" if self.inversion else ""
        return f"{self.variant}{on}, {self.kind}, {self.frames} frames"


def series_of(frames: int, kind: str, variant: str, inversion: str | None = None) -> Series:
    """The series of a variant, on its own inversion where none is named."""
    if variant in (CEILING, UNEDITED):
        return Series(variant, "", kind, frames)
    return Series(variant, inversion or VARIANTS[variant].inversion, kind, frames)


def wanted(kind: str, frames: int, crossed: bool) -> list[Series]:
    """The series that the study wants of one scene, each once, CEILING and UNEDITED first.

    Args:
        kind: Kind of edit.
        frames: Number of frames.
        crossed: Whether the variants of CROSSED are wanted on every inversion.
    """
    found = [series_of(frames, kind, name) for name in (CEILING, UNEDITED)]
    found += [series_of(frames, kind, name) for name in VARIANTS if kind in VARIANTS[name].kinds]
    found.append(series_of(frames, kind, "fatezero", "stem"))
    for name in CROSSED if crossed else (OURS,):
        found += [series_of(frames, kind, name, inversion) for inversion in INVERSIONS]
    return list(dict.fromkeys(found))


def wanted_of_long(kind: str) -> list[Series]:
    """The series that the study wants of one scene with LONG_FRAMES frames."""
    return [series_of(LONG_FRAMES, kind, name) for name in (CEILING, UNEDITED, *LONG)]
