"""The command that follows features along the flow, `stem analyse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..analysis import Analysis, analyse, check_analysable
from ..metrics import FLOWS
from ..models import EMBEDDED_MODEL
from ..video import read_video
from .app import app, console, print_note, say
from .arguments import (
    Chunk,
    Config,
    Device,
    Dtype,
    Frames,
    Methods,
    Model,
    Options,
    Out,
    Prompt,
    Seed,
    Size,
    Steps,
    VideoPath,
    chunk_of,
    one_of,
)
from .ranks import one_process
from .request import Request


@app.command("analyse")
def analyse_command(
    video: VideoPath,
    model: Model = EMBEDDED_MODEL,
    prompt: Prompt = "",
    methods: Methods = "ddim,stem",
    frames: Frames = None,
    size: Size = None,
    steps: Steps = 50,
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Of the video: {', '.join(FLOWS)}. Default: raft where its weights are on this "
            "machine, else dis.",
            callback=one_of(FLOWS),
        ),
    ] = None,
    timestep: Annotated[
        int | None, typer.Option(help="Shown in the picture, or the nearest. Default: the middle.")
    ] = None,
    seed: Seed = 0,
    option: Options = None,
    chunk: Chunk = "auto",
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    out: Out = Path("out/analyse"),
) -> None:
    """How steady an inversion's features are along the video's flow: picture, plot, figures.

    It writes analysis.png, analysis-plot.png and analysis.json. Nothing is kept from run to run.
    """
    one_process("analyse")
    request = Request.checked(model, methods, option, seed, steps, device, dtype, out)
    clip = read_video(video, frames=frames, size=size, multiple_of=1)
    check_analysable(clip, request.methods, request.options)
    pipeline, clip = request.load_for(clip, video)
    found = analyse(
        pipeline,
        clip,
        prompt,
        out,
        request.methods,
        options=request.options,
        flow=flow,
        timestep=timestep,
        num_steps=steps,
        chunk=chunk_of(chunk),
        model=request.model,
        note=request.note,
    )
    console.print(analysis_table(found))
    say(f"flow: {found.flow.name}; the former frame's features, warped, against the current one's")
    for path in (found.sheet, found.plot, found.json):
        say(path)
    print_note(request.note)


def analysis_table(found: Analysis) -> Table:
    """A row for each method: the mean similarity, and the lowest with its timestep."""
    table = Table(title="cosine similarity of the last self-attention's features")
    table.add_column("method")
    for heading in ("mean", "lowest", "at t"):
        table.add_column(heading, justify="right")
    for method, curve in found.curves.items():
        lowest = min(curve.similarity, key=curve.similarity.__getitem__)
        table.add_row(method, f"{curve.mean:.4f}", f"{curve.similarity[lowest]:.4f}", str(lowest))
    return table
