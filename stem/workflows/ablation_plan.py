"""Which of STEM's options an ablation changes, and to what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from stem_kernels.ops.initialization import INITIALIZATIONS
from stem_kernels.ops.soft_em import EMPTY_POLICIES

from .. import names
from ..config import CALIBRATIONS, SPACES, StemConfig
from ..inversion.records import attention_record

_FORMS: tuple[Callable[..., StemConfig], ...] = (
    StemConfig,
    StemConfig.paper,
    StemConfig.released,
)
FORMS = dict(zip(names.FORMS, _FORMS, strict=True))
"""The configurations that options are changed from."""
_OF_THE_RUN = ("num_frames", "chunk", "cuts", "fit_frames", "seed", "backend")


def _form(name: str) -> dict[str, Any]:
    fields = vars(FORMS[name]())
    return {field: value for field, value in fields.items() if field not in _OF_THE_RUN}


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "K": {str(number): {"num_bases": number} for number in (16, 32, 64, 128, 256, 512)},
    "R": {str(number): {"num_iters": number} for number in (1, 2, 3, 5, 8)},
    "sample": {
        "all" if number is None else str(number): {"sample_per_base": number}
        for number in (4, 8, 16, 22, 32, None)
    },
    "form": {name: _form(name) for name in FORMS},
    "space": {space: {"space": space} for space in SPACES},
    "init": {init: {"init": init} for init in INITIALIZATIONS},
    "empty": {policy: {"empty": policy} for policy in EMPTY_POLICIES},
    "proportional": {"on": {"proportional": True}, "off": {"proportional": False}},
    "calibration": {form: {"calibration": form} for form in CALIBRATIONS},
}
"""By option its values, and the fields of StemConfig that each of them changes."""


def base_config(form: str, options: Mapping[str, Any], num_frames: int) -> StemConfig:
    """The configuration that options are changed from.

    Raises:
        ValueError: a form that does not exist, or a value that an option refuses.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    return FORMS[form](**options, num_frames=num_frames)


def variants_of(base: StemConfig, only: Sequence[str]) -> dict[tuple[str, str], StemConfig]:
    """The configurations to measure, by option and value, in the order of OPTIONS.

    Args:
        base: Configuration that they are changes of.
        only: Names of OPTIONS to change.

    Raises:
        ValueError: no option, or one that does not exist.
    """
    unknown = [option for option in only if option not in OPTIONS]
    if unknown or not only:
        named = ", ".join(unknown) or "none"
        raise ValueError(f"options to change: {named}; take one or more of {', '.join(OPTIONS)}")
    return {
        (option, value): dataclasses.replace(base, **changes)
        for option, values in OPTIONS.items()
        if option in only
        for value, changes in values.items()
    }


def fields_of(config: StemConfig) -> dict[str, Any]:
    """What two configurations of equal figures have in common: all fields but the chunk, as JSON
    types."""
    return {name: value for name, value in attention_record(config).items() if name != "chunk"}


def in_order(keys: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Options and values in the order of OPTIONS."""
    every = [(option, value) for option, values in OPTIONS.items() for value in values]
    return [key for key in every if key in keys]
