"""Settings and provenance of results, as names and values to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

Pairs = list[tuple[str, str]]
_NAMED = ("name", "weights_sha256", "config_sha256")


def settings_of(settings: Mapping[str, Any]) -> Pairs:
    """Settings as pairs of a name and a text, those of a part behind the part's name.

    Args:
        settings: Settings, as JSON types.
    """
    pairs: Pairs = []
    for name, value in settings.items():
        shown = name.replace("_", " ")
        if isinstance(value, Mapping) and value:
            pairs += [(f"{shown}: {part}", text) for part, text in settings_of(value)]
        else:
            pairs.append((shown, _text(value)))
    return pairs


def run_settings(inversion: Mapping[str, Any], notes: Sequence[str]) -> Pairs:
    """What the inversions of one video share.

    Args:
        inversion: Settings of an `InversionFolder`.
        notes: Notes of what was changed when the video was read.
    """
    video = inversion["video"]
    return [
        ("prompt", inversion["prompt"] or "none"),
        ("steps", str(inversion["num_steps"])),
        ("device", inversion["device"]),
        ("dtype", inversion["dtype"]),
        ("video", f"{video['num_frames']} frames of {video['width']}×{video['height']}"),
        *(("reading", note) for note in notes),
    ]


def method_settings(inversion: Mapping[str, Any]) -> Pairs:
    """What an inversion has of its own: its backend and its attention.

    Args:
        inversion: Settings of an `InversionFolder`.
    """
    own = {name: inversion[name] for name in ("backend", "keep_bases")}
    return settings_of({**own, **inversion["attention"]})


def provenance_of(provenance: Mapping[str, Any], inversion: Mapping[str, Any] | None) -> Pairs:
    """Where results come from: machine, versions, commit, and the weights' fingerprints.

    Args:
        provenance: Provenance that `stem_kernels.info.provenance` gave.
        inversion: Settings of an inversion by the same model, or None.
    """
    pairs: Pairs = [
        ("CPU", provenance["cpu"]),
        ("threads", str(provenance["threads"])),
        ("GPU", provenance["gpu"] or "none"),
        ("Python", provenance["python"]),
        *provenance["versions"].items(),
    ]
    if "commit" in provenance:
        pairs.append(("commit", provenance["commit"] or "none, not in a checkout"))
    if inversion is not None:
        model = inversion["model"]
        pairs += [
            ("model", model["name"] or "not named"),
            *settings_of({k: v for k, v in model.items() if k not in _NAMED}),
            ("weights, SHA-256", model["weights_sha256"]),
            ("configuration, SHA-256", model["config_sha256"]),
            ("frames, SHA-256", inversion["video"]["frames_sha256"]),
        ]
    return pairs


def rate(fps: str) -> str:
    """A video's frames per second, to read.

    Args:
        fps: Fraction, as a text.
    """
    return f"{float(Fraction(fps)):.5g} frames a second"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value or "none"
    if isinstance(value, Sequence):
        return ", ".join(map(_text, value)) or "none"
    return json.dumps(value)
