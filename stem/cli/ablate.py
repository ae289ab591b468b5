"""The command that changes STEM's options one at a time, `stem ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import ABLATED, FORMS
from .app import app, console, print_note, say
from .arguments import (
    VideoPath,
    chunk_of,
    names_of,
    one_of,
)
from .ranks import one_process
from .request import Request, read_options
from .run_options import OF_MOTION, RunOptions, takes_run_options


@app.command("ablate")
@takes_run_options(without=("methods", *OF_MOTION), methods="stem", out=Path("out/ablate"))
def ablate_command(
    video: VideoPath,
    run: RunOptions,
    only: Annotated[str, typer.Option(help="Options to change, comma-separated.")] = ",".join(
        ABLATED
    ),
    form: Annotated[
        str,
        typer.Option(
            help=f"What they are changed from: {', '.join(FORMS)}. --option changes it further.",
            callback=one_of(FORMS),
        ),
    ] = "defaults",
) -> None:
    """What each of STEM's options is worth on a video: table, ablation.json and .png.

    Run it again after an interruption and it goes on with the next configuration.
    """
    from ..video import read_video
    from ..workflows.ablation import ablate
    from ..workflows.ablation_plan import base_config, variants_of
    from ..workflows.measuring import check_measurable
    from .tables import ablation_table

    one_process("ablate")
    request = Request.checked(run)
    options = {"seed": run.seed, **request.options.get("stem", {})}
    chosen = names_of(only)
    clip = read_video(video, **read_options(run), multiple_of=1)
    check_measurable(clip, ["stem"], {})
    variants_of(base_config(form, options, clip.num_frames), chosen)
    pipeline, clip = request.load_for(clip, video)
    with run.parking(run.out):
        found = ablate(
            pipeline,
            clip,
            run.prompt,
            run.out,
            chosen,
            form=form,
            options=options,
            num_steps=run.steps,
            chunk=chunk_of(run.chunk),
            model=request.model,
            control=request.control(pipeline, clip, run),
            note=request.note,
        )
    console.print(ablation_table(found))
    say(
        "*: what the others are changes of; latents: |x - x0| / |x0|; seconds: there and back, "
        f"measured once; MiB: {found.memory}, peak above the start"
    )
    for path in (found.plot, found.json):
        say(path)
    print_note(request.note)
