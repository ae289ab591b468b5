"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..names import (
    DTYPES,
    EMBEDDED_MODEL,
    EMBEDDED_VIDEO_MODEL,
    FLOW_METHODS,
    INVERSION_METHODS,
    OFFLOADS,
    PARKING,
    RANDOM_MODEL,
)
from .config_file import read_config, with_config_file

ALL_METHODS = ",".join(INVERSION_METHODS)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given, on the command line, in a file or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse(context: typer.Context, reasons: Mapping[str, str]) -> None:
    """Raise where a parameter is given that cannot be followed.

    Args:
        context: Context of the command.
        reasons: Reasons, with what to do, by parameter.

    Raises:
        typer.BadParameter: with the first reason that applies.
    """
    for name, reason in reasons.items():
        if is_given(context, name):
            raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")


def one_of(allowed: Collection[str]) -> Callable[[str | None], str | None]:
    """A callback for an option that takes one of a few values."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r}; take one of {', '.join(allowed)}")
        return value

    return check


def encodable_text(value: str) -> str:
    """The value; bytes of a command line that are no UTF-8 come as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(
            f"{value!a} is not UTF-8; write it in that encoding, or in plain letters"
        ) from error
    return value


VideoPath = Annotated[Path, typer.Argument(help="Any video file that FFmpeg reads.")]
Model = Annotated[
    str,
    typer.Option(
        help="A hub id, a local folder in diffusers' format, a whole model in one .safetensors "
        f"file, '{EMBEDDED_MODEL}' (small, trained, comes with this package) or '{RANDOM_MODEL}' "
        f"(untrained). invert and edit take video transformers, too: '{EMBEDDED_VIDEO_MODEL}', or "
        "Wan's."
    ),
]
Variant = Annotated[
    str | None, typer.Option(help="Of a hub id's or a folder's weights: fp16, for example.")
]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|ID",
        help="Of a model in one file: a model of the same kind, in diffusers' format, which has "
        "its configuration. Default: the standard one of the kind that the file shows.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(metavar="ID|FOLDER|FILE", help="A VAE in place of the model's own."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]", help="A .safetensors file, repeatable: style.safetensors:0.7."
    ),
]
TextualInversions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:TOKEN]",
        help="A .safetensors file of a word's embeddings, repeatable: cat.safetensors:<cat>.",
    ),
]
ControlNets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID|FOLDER|embedded",
        help="A ControlNet or T2I-Adapter made for the model, repeatable; see --control. embedded: "
        "the one on edges that comes with the model of that name.",
    ),
]
MotionAdapter = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="AnimateDiff's, made for the model: its layers attend along the frames.",
    ),
]
MotionWindow = Annotated[
    int | None,
    typer.Option(
        help="Frames that the motion adapter sees at once, in overlapping windows, for videos of "
        "more frames than it has places for: 16. Default: all frames.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:NUMBER. Default: a GPU where there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Of the weights: {', '.join(DTYPES)}. Default: float16 on a GPU, else float32; of a "
        "reconstruction and of a folder's edit, the inversion's own.",
        callback=one_of(DTYPES),
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(OFFLOADS),
        help="For a card that is too small: whole models wait on the CPU until they run, or each "
        "layer does. Default: all weights are on the device.",
        callback=one_of(OFFLOADS),
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(help="Of --offload group: the weights wait on this disk, not in memory."),
]
Park = Annotated[
    str,
    typer.Option(
        metavar="|".join(PARKING),
        help="Where chunks of frames wait for each other: in files below --out (disk), off the GPU "
        "in the CPU's memory (cpu), on the device (never), or there until they take a quarter of "
        "its free memory (auto). Results are the same.",
        callback=one_of(PARKING),
    ),
]
Prompt = Annotated[str, typer.Option(help="Describes the source video.", callback=encodable_text)]
Methods = Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(INVERSION_METHODS)}.")]
AllMethods = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated, of: {', '.join(INVERSION_METHODS)}; through a video transformer, "
        f"of: {', '.join(FLOW_METHODS)}, of which {FLOW_METHODS[0]} is the default."
    ),
]
Frames = Annotated[
    str | None, typer.Option(help="16 (the first 16), 8:40 or 8:40:2. Default: all.")
]
Size = Annotated[
    str | None, typer.Option(help="256 (shorter side) or 512x320. Default: the source's.")
]
Deinterlace = Annotated[
    bool,
    typer.Option(
        "--deinterlace",
        help="Every frame is two fields, as of a television camera: show the first one alone.",
    ),
]
ToneMap = Annotated[
    bool,
    typer.Option("--tone-map", help="Make HDR pictures (PQ or HLG) SDR, where a video has them."),
]
Steps = Annotated[
    int, typer.Option(help="Steps; DDIM's, through a UNet, must divide the training steps.")
]
Seed = Annotated[int, typer.Option(help="Of STEM's Gaussian initial bases, and of a random model.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        help="METHOD.FIELD=VALUE, repeatable: stem.num_bases=64, st-ddim.frames=mid, ...",
        callback=with_config_file,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file with any of these options.", callback=read_config, is_eager=True),
]
Chunk = Annotated[
    str,
    typer.Option(
        help="Frames that go through the UNet at once: a number, 'auto' (as many as fit into free "
        "memory) or 'all'.",
        callback=lambda text: str(chunk_of(text) or "all"),
    ),
]
Cuts = Annotated[
    str,
    typer.Option(
        metavar="auto|none|N,N,...",
        help="Frames that begin another scene, which has bases of its own: found (auto), none, or "
        "their numbers, counted from 0.",
        callback=lambda text: _checked_cuts(text),
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of everything written.")]


def names_of(text: str) -> list[str]:
    """The names in a comma-separated text, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def chosen_methods(text: str) -> list[str]:
    """Names of methods from a comma-separated text."""
    names = names_of(text)
    unknown = [method for method in names if method not in INVERSION_METHODS]
    if unknown or not names:
        raise typer.BadParameter(
            f"{text!r}; take one or more of {', '.join(INVERSION_METHODS)}", param_hint="--methods"
        )
    return names


def method_options(
    texts: list[str] | None, methods: list[str], seed: int
) -> dict[str, dict[str, Any]]:
    """METHOD.FIELD=VALUE texts by method, checked against the methods.

    Args:
        texts: Texts of --option.
        methods: Names of the methods that run.
        seed: Seed of Gaussian initial bases, where the texts give none.
    """
    if not texts:
        return {}
    from ..inversion.methods import attention_config

    options = parsed_options(texts, methods)
    if options.get("stem", {}).get("init") == "gaussian":
        options["stem"].setdefault("seed", seed)
    for method in methods:
        attention_config(method, options.get(method, {}), num_frames=1)
    return options


def parsed_options(texts: list[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD.FIELD=VALUE texts by method and field.

    Args:
        texts: Texts of --option.
        methods: Names that can stand for METHOD.

    Raises:
        typer.BadParameter: a text is of another form, or of another method.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        method, dot, name = target.partition(".")
        if not equals or not dot or method not in methods:
            raise typer.BadParameter(
                f"{text!r}; write METHOD.FIELD=VALUE with a method of {', '.join(methods)}",
                param_hint="--option",
            )
        parts = tuple(typed_value(part) for part in value.split(","))
        options.setdefault(method, {})[name] = parts if len(parts) > 1 else parts[0]
    return options


def typed_value(text: str) -> int | float | bool | str:
    """A word of an option: a number, true, false, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def chunk_of(text: str) -> int | str | None:
    """The text of --chunk as `invert` takes it.

    Raises:
        typer.BadParameter: it is neither a number of at least 1 nor "auto" nor "all".
    """
    if text in ("auto", "all"):
        return None if text == "all" else text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise typer.BadParameter(f"{text!r}; write a number of frames of at least 1, auto or all")


def _checked_cuts(text: str) -> str:
    cuts_of(text)
    return text


def cuts_of(text: str) -> tuple[int, ...] | None:
    """The text of --cuts as `invert` takes it; None: they are to be found.

    Raises:
        typer.BadParameter: it is neither numbers nor "auto" nor "none".
    """
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return tuple(map(int, parts))
    raise typer.BadParameter(f"{text!r}; write auto, none, or numbers of frames such as 120,300")
