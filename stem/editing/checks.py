"""What an edit is asked for: each method's options, checks, and the settings that it records."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..control import Control
from ..inversion import InversionFolder
from ..inversion.runs import check_startable
from ..names import EDIT_METHODS
from .job import Options
from .methods.fatezero_options import FateZeroOptions
from .methods.fusion import FusionOptions
from .methods.pnp import PnPOptions
from .methods.sdedit import SDEditOptions
from .methods.tokenflow import TokenFlowOptions

OptionsT = TypeVar("OptionsT", bound=Options)
METHODS: dict[str, type[Options]] = dict(
    zip(
        EDIT_METHODS,
        (PnPOptions, TokenFlowOptions, SDEditOptions, FateZeroOptions, FusionOptions),
        strict=True,
    )
)
"""The dataclass of each method's options, by the name of the method."""
DEFAULT_METHOD = "fusion"


def edit_options(method: str, options: Options | Mapping[str, Any] | None) -> Options:
    """The options of a method, checked.

    Args:
        method: Name of the method.
        options: Its options, or some of their fields by name (JSON types are taken), or None.

    Raises:
        ValueError: the method or an option is unknown, or an option refuses its value.
        TypeError: the options are those of another method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    return options_of(METHODS[method], method, options)


def options_of(
    kind: type[OptionsT], method: str, options: Options | Mapping[str, Any] | None
) -> OptionsT:
    """Options of a kind, checked.

    Args:
        kind: Dataclass of a method's options.
        method: Name of the method, for errors.
        options: Options, or some of their fields by name (JSON types are taken), or None.

    Raises:
        ValueError: an option is unknown, or refuses its value.
        TypeError: the options are those of another method.
    """
    if isinstance(options, kind):
        return options
    if isinstance(options, Options):
        raise TypeError(f"options are {type(options).__name__}; {method} takes {kind.__name__}")
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in options or {}:
        if name not in fields:
            raise ValueError(f"{method} has no option {name!r}; it has {', '.join(fields)}")
    return kind(**(options or {}))


def check_edit(
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str = DEFAULT_METHOD,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
) -> None:
    """Check, without a pipeline, that `run_edit` can begin.

    Args:
        inversion: Inversion to start from.
        prompt: Prompt that describes the edited video.
        method: Name of the method.
        negative_prompt: Negative prompt, used with guidance only.
        guidance: Classifier-free guidance scale, or None.
        seed: Seed of the method's random numbers.
        options: Options of the method.

    Raises:
        TypeError: a prompt is not a text, or the options are those of another method.
        ValueError: a setting does not fit.
        InversionError: the inversion is incomplete.
    """
    chosen = edit_options(method, options)
    check_texts(prompt, negative_prompt)
    check_numbers(guidance, seed)
    check_startable(inversion)
    chosen.check(inversion, prompt)


def check_text(name: str, text: str) -> None:
    """Raise TypeError where an argument of this name is not one text."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}; it must be one text")


def check_texts(prompt: str, negative_prompt: str) -> None:
    """Raise where an edit's prompts cannot be used: TypeError or, of an empty one, ValueError."""
    check_text("prompt", prompt)
    check_text("negative_prompt", negative_prompt)
    if not prompt.strip():
        raise ValueError("the prompt is empty; describe the video as it is to be")


def check_numbers(guidance: float | None, seed: int) -> None:
    """Raise ValueError where a guidance scale or a seed cannot be used."""
    number = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)
    if guidance is not None and not (number and 0.0 <= guidance < float("inf")):
        raise ValueError(f"guidance is {guidance!r}; it must be a finite number of at least 0")
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of 64 bits")


def edit_settings(
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str,
    negative_prompt: str,
    guidance: float | None,
    seed: int,
    options: Options,
    control: Sequence[Control] | None = None,
) -> dict[str, Any]:
    """Everything that shapes an edit beside its inversion, as JSON types."""
    scale = options.guidance if guidance is None else float(guidance)
    shown = {} if control is None else {"control": [each.record() for each in control]}
    return {
        **shown,
        "inversion": inversion.path.name,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "method": method,
        "guidance": scale,
        "seed": seed,
        "options": _as_json(dataclasses.asdict(options)),
        "version": importlib.metadata.version("stem-inversion"),
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_as_json(inner) for inner in value]
    return value
