"""The commands that run a model, `stem demo`, `compare`, `invert`, `reconstruct`, and `info`."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from ..names import BASES, FLOW_METHODS, INVERSIONS
from .app import app, console, print_note, problems, say
from .arguments import AllMethods, Cuts, VideoPath, chunk_of, one_of
from .edit_options import OF_INVERSIONS
from .evaluate import print_evaluation
from .flow import (
    invert_through_video_model,
    reconstruct_through_video_model,
    through_video_model,
)
from .ranks import rank_device, ranks
from .request import Request, check_run_device, load, source_of
from .run_options import OF_PARTS, RunOptions, takes_run_options


@app.command("demo")
@takes_run_options(
    without=("prompt", "frames", "deinterlace", "tone_map", "chunk", "park", *OF_PARTS),
    out=Path("out/demo"),
)
def demo_command(
    run: RunOptions,
    videos: Annotated[int, typer.Option(help="World videos; one natural clip comes on top.")] = 4,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
) -> None:
    """Compare inversions of videos drawn on the spot and of a real clip, and edit one more.

    It needs nothing else.
    """
    from ..workflows.demo import demo, demo_edit, demo_videos, edited_video
    from ..workflows.measuring import check_measurable
    from .tables import demo_table

    request = Request.checked(run)
    request.check_size(size)
    clips, edited = demo_videos(videos, size), demo_edit(size)
    check_measurable(clips[0][0], request.methods, request.options)
    request.check_space([*(clip for clip, _ in clips), edited_video(edited)])
    found = demo(
        request.load(),
        clips,
        edited,
        run.out,
        request.methods,
        options=request.options,
        num_steps=run.steps,
        model=request.model,
        note=request.note,
    )
    console.print(demo_table(found, size))
    say("±: 95 % interval of the mean over the world videos")
    for comparison in found.comparisons.values():
        say(comparison.sheet)
    say(found.json)
    say(f"edited: {edited.source.caption!r} -> {found.edit.prompt!r}")
    say(
        "look at its third line, the edit: it should be the second, the exact answer, which is the "
        "first, the source, everywhere but in the object (a fourth: where the edit may change it)"
    )
    say(found.edit.files.sheet)
    print_evaluation(found.evaluation)
    say(f"all of it on one page: stem report {found.json}")
    print_note(request.note)


@app.command("compare")
@takes_run_options(out=Path("out/compare"))
def compare_command(video: VideoPath, run: RunOptions) -> None:
    """Several inversions of one video side by side: table, compare.json, .png and .mp4."""
    from ..workflows.comparison import compare
    from ..workflows.measuring import check_measurable
    from .tables import comparison_table

    request = Request.checked(run)
    clip = request.read(video, run)
    check_measurable(clip, request.methods, request.options)
    with ranks(run.device) as group, run.parking(run.out):
        pipeline, clip = request.load_for(clip, video)
        found = compare(
            pipeline,
            clip,
            run.prompt,
            run.out,
            request.methods,
            options=request.options,
            num_steps=run.steps,
            chunk=chunk_of(run.chunk),
            model=request.model,
            control=request.control(pipeline, clip, run),
            note=request.note,
            group=group,
        )
    console.print(comparison_table(found, clip))
    say(
        "latent error: |x - x0| / |x0| of the latents; extra MiB: the peak above the start of each "
        "method"
    )
    for path in (found.sheet, found.video, found.json):
        say(path)
    print_note(request.note)


@app.command("invert")
@takes_run_options()
def invert_command(
    context: typer.Context,
    video: VideoPath,
    run: RunOptions,
    methods: AllMethods = "stem",
    cuts: Cuts = "auto",
    keep_bases: Annotated[
        bool,
        typer.Option("--keep-bases", help="Keep STEM's bases, for reconstruct --bases cached."),
    ] = False,
) -> None:
    """Invert a video; run it again after an interruption and it goes on where it stopped."""
    run = dataclasses.replace(run, methods=methods)
    if through_video_model(run):
        invert_through_video_model(context, video, run)
        return
    from ..inversion import invert

    request = Request.checked(run)
    if keep_bases and "stem" not in request.methods:
        raise typer.BadParameter(
            f"only stem has bases, and --methods is {run.methods}", param_hint="--keep-bases"
        )
    with ranks(run.device) as group, run.parking(run.out):
        pipeline, clip = request.load_for(request.open(video, run), video)
        control = request.control(pipeline, clip, run)
        scenes_begin = request.cuts(pipeline, clip, cuts, group)
        for method in request.methods:
            inversion = invert(
                pipeline,
                clip,
                run.prompt,
                run.out / INVERSIONS,
                method=method,
                options=request.options.get(method),
                num_steps=run.steps,
                chunk=chunk_of(run.chunk),
                cuts=scenes_begin,
                model=request.model,
                control=control,
                keep_bases=keep_bases and method == "stem",
                group=group,
            )
            say(f"{method}: {inversion.path}")
    say("the way back: stem reconstruct FOLDER, with a folder from above")
    if request.note:
        problems.print("The model's weights are random numbers.", style="yellow")


@app.command("reconstruct")
@takes_run_options(without=(*OF_INVERSIONS, "prompt", "methods", "seed", "option"))
def reconstruct_command(
    context: typer.Context,
    inversion: Annotated[Path, typer.Argument(help="A folder that `stem invert` printed.")],
    run: RunOptions,
    model: Annotated[str | None, typer.Option(help="Default: the inversion's own.")] = None,
    bases: Annotated[
        str, typer.Option(help="estimate (EM again) or cached.", callback=one_of(BASES))
    ] = "estimate",
    out: Annotated[
        Path | None, typer.Option(help="An mp4 file. Default: reconstruction.mp4 in the folder.")
    ] = None,
) -> None:
    """Sample an inversion back to a video; it goes on where it was interrupted, too."""
    from ..diffusion.pipeline import decoded_parts
    from ..distributed import Ranks
    from ..inversion import InversionFolder, reconstruct_latents
    from ..inversion.reconstructing import check_reconstructible
    from ..storage import remove_stale
    from ..video import check_video_output, write_video

    check_run_device(run, rank_device(run.device))

    def opened() -> tuple[InversionFolder, Path]:
        found = InversionFolder.open(inversion)
        if found.settings["method"] not in FLOW_METHODS:
            check_reconstructible(found, bases)
        video = found.settings["video"]
        path = out or found.path / "reconstruction.mp4"
        check_video_output(path, video["num_frames"], video["height"], video["width"])
        remove_stale(found.path)
        return found, path

    with ranks(run.device) as group, run.parking(inversion):
        folder, path = Ranks(group).from_main(opened)
        if folder.settings["method"] in FLOW_METHODS:
            reconstruct_through_video_model(context, folder, path, model, run)
            return
        source = source_of(folder, model, run)
        dtype = run.dtype or folder.settings["dtype"]
        pipeline = load(source, rank_device(run.device), dtype, run.offloading)
        latents = reconstruct_latents(pipeline, folder, bases=bases, group=group)
        if Ranks(group).main:
            fps = Fraction(folder.settings["video"]["fps"])
            write_video(path, decoded_parts(pipeline, latents), fps)
    say(path)


@app.command("info")
def info_command(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also run every operator, dtype and backend of this machine against float64; the "
            "exit status is 1 where one is wrong.",
        ),
    ] = False,
) -> None:
    """What is installed, and which backends can run here."""
    import importlib.metadata
    import importlib.util

    from stem_kernels.info import check as checked
    from stem_kernels.info import describe

    say(describe())
    for name in ("diffusers", "transformers", "av", "torchmetrics", "nvtx"):
        found = importlib.util.find_spec(name) is not None
        version = importlib.metadata.version(name) if found else "not installed"
        say(f"{name} {version}")
    if check:
        text, right = checked()
        say(text)
        if not right:
            raise typer.Exit(1)
