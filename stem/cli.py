"""The command line: `stem demo`, `invert`, `reconstruct`, `compare` and `info`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler

from stem_kernels import BackendError
from stem_kernels.info import describe

from .compare import Comparison, compare
from .demo import Demo, demo
from .diffusion.pipeline import vae_factor
from .inversion import METHODS, InversionError, InversionFolder, invert, reconstruct
from .inversion.methods import attention_config
from .models import EMBEDDED_MODEL, RANDOM_MODEL, ModelError, load_pipeline
from .tables import comparison_table, demo_table
from .video import Video, read_video, write_video

ALL_METHODS = ",".join(METHODS)
RANDOM_NOTE = (
    "The model's weights are random numbers: the pictures mean nothing, and the figures show the "
    "machinery, not quality. For a real model, point --model at a hub id or a local folder in "
    "diffusers' format, e.g. stem compare VIDEO --model stable-diffusion-v1-5/"
    "stable-diffusion-v1-5 --prompt '...'"
)

app = typer.Typer(
    help="Invert, reconstruct and compare videos with diffusion models, through STEM attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
problems = Console(stderr=True)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Options of the command from a YAML file; what is typed on the command line wins."""
    if path is None:
        return None
    try:
        # Texts as they stand: YAML itself would read 8:40 as the number 520, and 1e-2 as a text.
        document = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"{path} must hold a mapping of options, such as 'steps: 50'")
    allowed = {p.name for p in context.command.params if p.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in allowed:
            options = ", ".join(sorted(allowed))
            raise typer.BadParameter(
                f"{path}: {context.info_name} has no option {key!r}; it has {options}"
            )
        if name == "option":
            value = _flat_options(path, value)
        elif isinstance(value, list):
            value = ",".join(value)
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _flat_options(path: Path, methods: Any) -> list[str]:
    """{method: {field: value}} as METHOD.FIELD=VALUE texts."""
    if isinstance(methods, list) and all(isinstance(text, str) for text in methods):
        return methods
    if not isinstance(methods, dict) or not all(isinstance(f, dict) for f in methods.values()):
        raise typer.BadParameter(
            f"{path}: option must map methods to their fields, such as 'stem: {{num_bases: 64}}', "
            "or list METHOD.FIELD=VALUE texts"
        )
    return [
        f"{method}.{field}={','.join(value) if isinstance(value, list) else value}"
        for method, fields in methods.items()
        for field, value in fields.items()
    ]


VideoPath = Annotated[Path, typer.Argument(help="Any video file that FFmpeg reads.")]
Model = Annotated[
    str,
    typer.Option(
        help=f"A hub id, a local folder in diffusers' format, '{EMBEDDED_MODEL}' (small, trained, "
        f"comes with this package) or '{RANDOM_MODEL}' (untrained)."
    ),
]
Prompt = Annotated[str, typer.Option(help="Describes the source video.")]
Methods = Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(METHODS)}.")]
Frames = Annotated[
    str | None, typer.Option(help="16 (the first 16), 8:40 or 8:40:2. Default: all.")
]
Size = Annotated[
    str | None, typer.Option(help="256 (shorter side) or 512x320. Default: the source's.")
]
Steps = Annotated[int, typer.Option(help="DDIM steps; must divide the training steps.")]
Seed = Annotated[int, typer.Option(help="Of STEM's Gaussian initial bases, and of a random model.")]
Options = Annotated[
    list[str] | None,
    typer.Option(help="METHOD.FIELD=VALUE, repeatable: stem.num_bases=64, st-ddim.frames=mid, ..."),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file with any of these options.", callback=_read_config, is_eager=True),
]
Out = Annotated[Path, typer.Option(help="Folder of everything written.")]


@app.command("demo")
def demo_command(
    model: Model = EMBEDDED_MODEL,
    methods: Methods = ALL_METHODS,
    videos: Annotated[int, typer.Option(help="World videos; one natural clip comes on top.")] = 4,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    steps: Steps = 50,
    seed: Seed = 0,
    option: Options = None,
    config: Config = None,
    out: Out = Path("out/demo"),
) -> None:
    """Compare inversions of videos drawn on the spot and of a real clip; needs nothing else."""
    chosen = _methods(methods)
    options = _options(option, chosen, seed)
    model = _model_name(model, seed)
    note = _note(model)
    with _resumable():
        found = demo(
            load_pipeline(model),
            out,
            chosen,
            options=options,
            videos=videos,
            size=size,
            num_steps=steps,
            model=model,
            note=note,
        )
    _print_demo(found, size)
    if note:
        console.print(note, style="yellow", soft_wrap=True)


@app.command("compare")
def compare_command(
    video: VideoPath,
    model: Model = EMBEDDED_MODEL,
    prompt: Prompt = "",
    methods: Methods = ALL_METHODS,
    frames: Frames = None,
    size: Size = None,
    steps: Steps = 50,
    seed: Seed = 0,
    option: Options = None,
    config: Config = None,
    out: Out = Path("out/compare"),
) -> None:
    """Several inversions of one video side by side: table, compare.json, .png and .mp4."""
    chosen = _methods(methods)
    options = _options(option, chosen, seed)
    model = _model_name(model, seed)
    pipeline = load_pipeline(model)
    clip = _read(video, frames, size, pipeline)
    note = _note(model)
    with _resumable():
        found = compare(
            pipeline,
            clip,
            prompt,
            out,
            chosen,
            options=options,
            num_steps=steps,
            model=model,
            note=note,
        )
    _print_comparison(found, clip)
    if note:
        console.print(note, style="yellow", soft_wrap=True)


@app.command("invert")
def invert_command(
    video: VideoPath,
    model: Model = EMBEDDED_MODEL,
    prompt: Prompt = "",
    methods: Methods = "stem",
    frames: Frames = None,
    size: Size = None,
    steps: Steps = 50,
    seed: Seed = 0,
    option: Options = None,
    keep_bases: Annotated[
        bool,
        typer.Option("--keep-bases", help="Keep STEM's bases, for reconstruct --bases cached."),
    ] = False,
    config: Config = None,
    out: Out = Path("out"),
) -> None:
    """Invert a video; run it again after an interruption and it goes on where it stopped."""
    chosen = _methods(methods)
    options = _options(option, chosen, seed)
    model = _model_name(model, seed)
    pipeline = load_pipeline(model)
    clip = _read(video, frames, size, pipeline)
    with _resumable():
        for method in chosen:
            inversion = invert(
                pipeline,
                clip,
                prompt,
                out / "inversions",
                method=method,
                options=options.get(method),
                num_steps=steps,
                model=model,
                keep_bases=keep_bases and method == "stem",
            )
            console.print(f"{method}: {inversion.path}", soft_wrap=True)
    console.print("the way back: stem reconstruct FOLDER, with a folder from above")
    if _note(model):
        problems.print("The model's weights are random numbers.", style="yellow")


@app.command("reconstruct")
def reconstruct_command(
    inversion: Annotated[Path, typer.Argument(help="A folder that `stem invert` printed.")],
    model: Annotated[str | None, typer.Option(help="Default: the inversion's own.")] = None,
    bases: Annotated[str, typer.Option(help="estimate (EM again) or cached.")] = "estimate",
    config: Config = None,
    out: Annotated[
        Path | None, typer.Option(help="An mp4 file. Default: reconstruction.mp4 in the folder.")
    ] = None,
) -> None:
    """Sample an inversion back to a video."""
    folder = InversionFolder.open(inversion)
    name = model or folder.settings["model"]["name"]
    if not name:
        raise ModelError(f"{inversion} does not name its model; pass it with --model")
    pipeline = load_pipeline(name)
    frames = reconstruct(pipeline, folder, bases=bases)
    path = out or folder.path / "reconstruction.mp4"
    write_video(path, frames, Fraction(folder.settings["video"]["fps"]))
    console.print(str(path), soft_wrap=True)


@app.command("info")
def info_command() -> None:
    """What is installed, and which backends can run here."""
    console.print(describe(), soft_wrap=True, highlight=False)
    for name in ("diffusers", "transformers", "av", "torchmetrics", "nvtx"):
        found = importlib.util.find_spec(name) is not None
        version = importlib.metadata.version(name) if found else "not installed"
        console.print(f"{name} {version}", highlight=False)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        problems.print(
            "interrupted; finished steps are kept: run the same command again and it goes on after "
            "the last of them"
        )
        raise typer.Exit(130) from None


def _print_comparison(found: Comparison, clip: Video) -> None:
    console.print(comparison_table(found, clip))
    console.print(
        "latent error: |x - x0| / |x0| of the latents; extra MiB: the peak above the start of "
        "each method"
    )
    for path in (found.sheet, found.video, found.json):
        console.print(str(path), soft_wrap=True)


def _print_demo(found: Demo, size: int) -> None:
    console.print(demo_table(found, size))
    console.print("±: 95 % interval of the mean over the world videos")
    for comparison in found.comparisons.values():
        console.print(str(comparison.sheet), soft_wrap=True)
    console.print(str(found.json), soft_wrap=True)


def _methods(text: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [method for method in chosen if method not in METHODS]
    if unknown or not chosen:
        raise typer.BadParameter(
            f"{text!r}; take one or more of {', '.join(METHODS)}", param_hint="--methods"
        )
    return chosen


def _options(texts: list[str] | None, methods: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """METHOD.FIELD=VALUE texts by method, values read as YAML; checked against the methods."""
    options: dict[str, dict[str, Any]] = {}
    for text in texts or []:
        target, equals, value = text.partition("=")
        method, dot, name = target.partition(".")
        if not equals or not dot or method not in methods:
            raise typer.BadParameter(
                f"{text!r}; write METHOD.FIELD=VALUE with a method of {', '.join(methods)}",
                param_hint="--option",
            )
        parts = tuple(_value(part) for part in value.split(","))
        options.setdefault(method, {})[name] = parts if len(parts) > 1 else parts[0]
    if options.get("stem", {}).get("init") == "gaussian":
        options["stem"].setdefault("seed", seed)
    for method in methods:
        attention_config(method, options.get(method, {}), num_frames=1)
    return options


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _model_name(model: str, seed: int) -> str:
    """The name under which an inversion finds its model again."""
    return f"{RANDOM_MODEL}:{seed}" if model == RANDOM_MODEL else model


def _note(model: str) -> str:
    return RANDOM_NOTE if model.startswith(f"{RANDOM_MODEL}:") else ""


def _read(path: Path, frames: str | None, size: str | None, pipeline: Any) -> Video:
    clip = read_video(path, frames=frames, size=size, multiple_of=vae_factor(pipeline))
    for note in clip.notes:
        console.print(f"{path.name}: {note}", soft_wrap=True)
    return clip


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Expected errors become one line."""
    handler = RichHandler(console=problems, show_time=False, show_path=False)
    # Of the kernels only warnings: on a CPU there is but one backend, and `stem info` explains.
    for name, level in (("stem", logging.INFO), ("stem_kernels", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers = [handler]
    diffusers.logging.set_verbosity_error()
    try:
        app(args=arguments)
    except torch.OutOfMemoryError as error:
        problems.print(f"error: {error} Take fewer or smaller frames", style="red", markup=False)
        return 2
    except (BackendError, InversionError, MemoryError, ModelError, OSError, ValueError) as error:
        problems.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 2
    return 0
