"""The options of `stem edit`, and what their texts mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..names import (
    EDIT_METHODS,
    EMBEDDED_MODEL,
    EMBEDDED_VIDEO_MODEL,
    FLOW_EDIT_METHODS,
    INVERSION_METHODS,
    PRESETS,
)
from .arguments import encodable_text, names_of, one_of, refuse, typed_value
from .config_file import with_config_file
from .control_options import OF_CONTROL

OF_INVERSIONS = (
    "source_prompt", "inversion", "frames", "size", "deinterlace", "tone_map", "steps", "chunk",
    "cuts",
    *OF_CONTROL,
)  # fmt: skip
"""Parameters that shape an inversion, and say nothing where one is there already."""


def _encodable_texts(values: list[str] | None) -> list[str] | None:
    return None if values is None else [encodable_text(value) for value in values]


Source = Annotated[
    Path,
    typer.Argument(
        metavar="VIDEO|FOLDER",
        help="A video file, which is inverted first; or an inversion's folder, as `stem invert` "
        "prints it.",
    ),
]
Prompts = Annotated[
    list[str],
    typer.Option(help="Describes the whole edited video; repeatable.", callback=_encodable_texts),
]
SourcePrompt = Annotated[
    str, typer.Option(help="Describes the source video.", callback=encodable_text)
]
EditMethods = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated, of: {', '.join(EDIT_METHODS)}; or {', '.join(FLOW_EDIT_METHODS)}, "
        "through a video transformer, which inverts nothing."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="METHOD.preset of every method here that has presets: "
        + "; ".join(f"{name}'s are {', '.join(values)}" for name, values in PRESETS.items())
        + "."
    ),
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the method's own.")]
NegativePrompt = Annotated[
    str, typer.Option(help="Describes what is not wanted.", callback=encodable_text)
]
EditSeed = Annotated[
    int,
    typer.Option(
        help="Of the edit's draws; in an inversion, of STEM's Gaussian initial bases; of a random "
        "model."
    ),
]
Zoom = Annotated[
    bool,
    typer.Option(
        "--zoom",
        help="fusion alone: edit what is small in a window that follows it, in which it is large.",
    ),
]
ZoomPrompts = Annotated[
    list[str] | None,
    typer.Option(
        "--zoom-prompt",
        help="Describes the edited video as the window shows it, where what is small is large; "
        "one for each --prompt, in their order. Default: the prompts.",
        callback=_encodable_texts,
    ),
]
ZoomSource = Annotated[
    str | None,
    typer.Option(
        help="Describes the source as the window shows it. Default: as the inversion's prompt.",
        callback=lambda text: None if text is None else encodable_text(text),
    ),
]
EditOptions = Annotated[
    list[str] | None,
    typer.Option(
        help="METHOD.FIELD=VALUE, repeatable, of an edit or of the inversion: fusion.preset=shape, "
        "'fatezero.equalize={blue: 10}', stem.num_bases=64, ...",
        callback=with_config_file,
    ),
]
EditModel = Annotated[
    str | None,
    typer.Option(
        help=f"As for `stem invert`. Default: '{EMBEDDED_MODEL}', or '{EMBEDDED_VIDEO_MODEL}' with "
        f"{FLOW_EDIT_METHODS[0]}; of a folder, the inversion's own."
    ),
]
InversionMethod = Annotated[
    str,
    typer.Option(
        help=f"One of: {', '.join(INVERSION_METHODS)}.", callback=one_of(INVERSION_METHODS)
    ),
]


def chosen_edit_methods(text: str) -> list[str]:
    """Names of edit methods from a comma-separated text."""
    names = names_of(text)
    if names and all(method in FLOW_EDIT_METHODS for method in names):
        return names
    if not names or any(method not in EDIT_METHODS for method in names):
        raise typer.BadParameter(
            f"{text!r}; take one or more of {', '.join(EDIT_METHODS)}, or "
            f"{', '.join(FLOW_EDIT_METHODS)} alone",
            param_hint="--method",
        )
    return names


def split_options(
    texts: list[str] | None, methods: list[str], inversion: str | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """METHOD.FIELD=VALUE texts: values by method of the edits, and the inversion's texts.

    A value is YAML, and `1,2` is `[1, 2]`; its words stay texts but for true, false and numbers.

    Args:
        texts: Texts of --option.
        methods: Names of the edit methods that run.
        inversion: Name of the inversion that runs; None: none does.
    """
    options: dict[str, dict[str, Any]] = {}
    rest = []
    allowed = [*methods, *([inversion] if inversion else [])]
    for text in texts or []:
        target, equals, value = text.partition("=")
        method, dot, name = target.partition(".")
        if not equals or not dot or method not in allowed:
            raise typer.BadParameter(
                f"{text!r}; write METHOD.FIELD=VALUE with a method of {', '.join(allowed)}",
                param_hint="--option",
            )
        if method == inversion:
            rest.append(text)
        else:
            options.setdefault(method, {})[name] = _yaml_value(text, value)
    return options, rest


def with_preset(
    options: Mapping[str, Mapping[str, Any]], methods: list[str], preset: str | None
) -> dict[str, dict[str, Any]]:
    """The options with --preset among those of each method that has one.

    Args:
        options: Options by method.
        methods: Names of the edit methods that run.
        preset: Text of --preset.
    """
    result = {method: dict(options.get(method, {})) for method in methods}
    if preset is None:
        return result
    chosen = [method for method in methods if method in PRESETS]
    lacking = [method for method in chosen if preset not in PRESETS[method]] if chosen else methods
    if lacking:
        known = "; ".join(f"{name} has {', '.join(names)}" for name, names in PRESETS.items())
        raise typer.BadParameter(
            f"{preset!r} is no preset of {', '.join(lacking)}: {known}. For one of several methods "
            "write --option METHOD.preset=...",
            param_hint="--preset",
        )
    for method in chosen:
        if result[method].setdefault("preset", preset) != preset:
            raise typer.BadParameter(
                f"{preset!r}, and --option says {method}.preset={result[method]['preset']}; give "
                "one of them",
                param_hint="--preset",
            )
    return result


def refuse_of_inversions(context: typer.Context) -> None:
    """Raise where options are given that the inversion in a folder has settled already."""
    reason = (
        "it belongs to an inversion, and the folder's own is made; name the video to invert it anew"
    )
    refuse(context, dict.fromkeys(OF_INVERSIONS, reason))


def _yaml_value(text: str, value: str) -> Any:
    import yaml

    listed = f"[{value}]" if "," in value and value.lstrip()[:1] not in ("[", "{") else value
    try:
        # Texts as they stand: YAML itself would read the word "on" as True, and 1e-2 as a text.
        return _typed(yaml.load(listed, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise typer.BadParameter(
            f"{text!r}; its value is not YAML, such as 0.5, [0, 0.8] or {{blue: 10}}",
            param_hint="--option",
        ) from error


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _typed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_typed(part) for part in value]
    return typed_value(value)
