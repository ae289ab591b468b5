"""What FateZero can be told; frozen, and checked when made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...inversion import InversionFolder
from ...names import PRESETS
from ..job import Options, check_choice, check_flag, check_share
from ..maps.prompts import check_word_counts, places_of

MAPPINGS = ("refine", "replace")
BACKGROUNDS = ("level", "late")
STORES = ("recompute", "memory", "disk")
OTHER_WORDS = "default_"
"""In `cross_replace`, the key of all tokens whose word is not named."""
_STYLE_FACTOR = 10.0
_NO_PRESET = {"mapping": "refine", "cross_replace": 0.8, "self_replace": 0.8}
_ATTRIBUTE = {"mapping": "replace", "cross_replace": 0.5, "self_replace": 0.5}
_PRESETS = {"style": _NO_PRESET, "attribute": _ATTRIBUTE, "shape": _ATTRIBUTE}
_NEEDED = {
    "style": ("equalize", "the words of the prompt that describe the style"),
    "shape": ("blend_words", "the object's words in the source's prompt, and in the prompt"),
}


@dataclass(frozen=True)
class FateZeroOptions(Options):
    """Options of `fatezero`. JSON types are allowed, too: lists in place of tuples.

    If `mapping`, `cross_replace` or `self_replace` is None, the value of the preset is used.

    Args:
        preset: Name of the authors' options for an edit. "style": "refine" and 0.8, as without a
            preset; it needs `equalize`. "attribute", for example another colour: "replace" and 0.5.
            "shape": the values of "attribute"; it needs `blend_words`. (For "shape" the authors
            also tune the UNet on the video, which this package does not do.)
        mapping: Mapping of the prompts' words. "refine": the tokens that both prompts have are
            aligned. "replace": word by word; both prompts must have equally many words.
        cross_replace: Share of the steps in which the source's text maps are taken; or such shares
            by word of the prompt, where "default_" stands for all other tokens (1 if not given).
        self_replace: Share of the steps in which the source's self-attention maps are taken; or the
            two shares at which this begins and ends.
        equalize: Factors of the columns of words, by word of the prompt, at least 0; or a list of
            words, whose factor is then 10.
        blend_words: Words of the source's prompt and words of the prompt. Inside the masks of these
            words the self-attention maps are the edit's own; None: they are the source's
            everywhere.
        blend_threshold: Share of a frame's maximum; where a word's map is above it, the word's mask
            is set.
        blend_latents: Whether latents outside the words' masks are the source's, from a fifth to
            four fifths of the steps.
        background: Source's latents for `blend_latents`. "level": the latents of the noise level
            just reached. "late": latents one step noisier, as in the released code.
        store: Place of the source's maps. "recompute": they are not stored, but computed again in
            the same UNet call from what the inversion kept. "memory" and "disk" (in the inversion's
            folder): the maps of all steps are stored before the edit, as published; this is not
            possible with STEM, whose bases need the source's tokens.

    Raises:
        ValueError: a value does not fit; the message names what is allowed.

    Source: arXiv 2303.09535.
    """

    presets: ClassVar[tuple[str, ...]] = PRESETS["fatezero"]

    preset: str | None = None
    mapping: str | None = None
    cross_replace: float | Mapping[str, float] | None = None
    self_replace: float | tuple[float, float] | None = None
    equalize: Mapping[str, float] = field(default_factory=dict)
    blend_words: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    blend_threshold: float = 0.3
    blend_latents: bool = False
    background: str = "level"
    store: str = "recompute"

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_choice("preset", self.preset, self.presets)
        self.fill(_NO_PRESET if self.preset is None else _PRESETS[self.preset])
        if isinstance(self.equalize, (str, list, tuple)):
            words = [self.equalize] if isinstance(self.equalize, str) else self.equalize
            _check_words("equalize", tuple(words))
            object.__setattr__(self, "equalize", dict.fromkeys(words, _STYLE_FACTOR))
        check_choice("mapping", self.mapping, MAPPINGS)
        check_choice("background", self.background, BACKGROUNDS)
        check_choice("store", self.store, STORES)
        check_flag("blend_latents", self.blend_latents)
        if isinstance(self.cross_replace, Mapping):
            _check_words("cross_replace", tuple(self.cross_replace))
            for word, share in self.cross_replace.items():
                check_share(f"cross_replace of {word!r}", share)
        else:
            check_share("cross_replace", self.cross_replace)
        if isinstance(self.self_replace, (list, tuple)):
            object.__setattr__(self, "self_replace", tuple(self.self_replace))
        bounds = self.self_bounds
        for share in bounds:
            check_share("self_replace", share)
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise ValueError(
                f"self_replace is {self.self_replace!r}; it must be one share of the steps, or two "
                "of them, the lesser first"
            )
        if not isinstance(self.equalize, Mapping):
            raise ValueError(f"equalize is {self.equalize!r}; it must be factors by word, or words")
        _check_words("equalize", tuple(self.equalize))
        for word, factor in self.equalize.items():
            if not _is_number(factor) or not 0 <= factor < math.inf:
                raise ValueError(
                    f"equalize of {word!r} is {factor!r}; it must be a finite number of at least 0"
                )
        if not _is_number(self.blend_threshold) or not 0 <= self.blend_threshold < 1:
            raise ValueError(
                f"blend_threshold is {self.blend_threshold!r}; it must be at least 0 and below 1"
            )
        if self.blend_words is not None:
            object.__setattr__(self, "blend_words", _both_words(self.blend_words))
        elif self.blend_latents:
            raise ValueError("blend_latents is True; it needs blend_words, too")
        if self.preset in _NEEDED:
            needed, meaning = _NEEDED[self.preset]
            if not getattr(self, needed):
                raise ValueError(f"preset is {self.preset!r}; it needs {needed}, too: {meaning}")

    @property
    def self_bounds(self) -> tuple[float, ...]:
        """The shares of the steps at which the source's self-attention maps begin and end."""
        given = self.self_replace
        assert given is not None
        return given if isinstance(given, tuple) else (0.0, given)

    def check(self, inversion: InversionFolder, prompt: str) -> None:
        source = inversion.settings["prompt"]
        if self.store != "recompute" and inversion.settings["method"] == "stem":
            raise ValueError(
                f"store is {self.store!r}, and the inversion is STEM's, whose bases need the "
                "source's tokens in every step; take store='recompute'"
            )
        if self.mapping == "replace":
            check_word_counts(source, prompt)
        places_of([*self.equalize, *self.cross_shares()], prompt)
        if self.blend_words is not None:
            for words, text in zip(self.blend_words, (source, prompt), strict=True):
                places_of(words, text)

    def cross_shares(self) -> dict[str, float]:
        """The shares of the steps of the words that have a share of their own."""
        given = self.cross_replace
        named = given if isinstance(given, Mapping) else {}
        return {word: share for word, share in named.items() if word != OTHER_WORDS}

    @property
    def other_cross_share(self) -> float:
        """The share of the steps of all other tokens."""
        given = self.cross_replace
        assert given is not None
        return given.get(OTHER_WORDS, 1.0) if isinstance(given, Mapping) else given


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_words(name: str, words: Any) -> None:
    if not isinstance(words, tuple) or not all(
        isinstance(word, str) and word.strip() for word in words
    ):
        raise ValueError(f"{name} has the words {words!r}; each must be a text that is not empty")


def _both_words(given: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words of both prompts, each a text or several."""
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise ValueError(
            f"blend_words is {given!r}; it must be two lists: words of the source's prompt, and "
            "words of the prompt"
        )
    before, after = (
        (part,) if isinstance(part, str) else tuple(part) if isinstance(part, list) else part
        for part in given
    )
    for words in (before, after):
        _check_words("blend_words", words)
        if not words:
            raise ValueError("blend_words has an empty list; name at least one word of each prompt")
    return before, after
