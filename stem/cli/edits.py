"""The command that edits, `stem edit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..names import EMBEDDED_MODEL, FLOW_EDIT_METHODS, INVERSIONS
from ..storage import remove_stale
from .app import app, print_note, say
from .arguments import Cuts, chunk_of
from .control_options import EditControls, EditControlScales, check_edit_control, control_of_edit
from .edit_options import (
    EditMethods,
    EditModel,
    EditOptions,
    EditSeed,
    Guidance,
    InversionMethod,
    NegativePrompt,
    Preset,
    Prompts,
    Source,
    SourcePrompt,
    Zoom,
    ZoomPrompts,
    ZoomSource,
    chosen_edit_methods,
    refuse_of_inversions,
    split_options,
    with_preset,
)
from .flow import edit_through_video_model
from .ranks import rank_device, ranks
from .request import Request, check_run_device, load, random_note, source_of
from .run_options import DEFAULTS, RunOptions, takes_run_options

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..inversion import InversionFolder
    from ..workflows.edit_plan import EditPlan
    from ..workflows.edits import Edits

EditControl = tuple[list[str] | None, list[float] | None]
"""Texts of --edit-control and --edit-control-scale."""


@app.command("edit")
@takes_run_options(without=("prompt", "methods"), out=Path("out/edit"))
def edit_command(
    context: typer.Context,
    source: Source,
    prompt: Prompts,
    source_prompt: SourcePrompt = "",
    method: EditMethods = "fusion",
    preset: Preset = None,
    guidance: Guidance = None,
    negative_prompt: NegativePrompt = "",
    seed: EditSeed = 0,
    option: EditOptions = None,
    inversion: InversionMethod = "stem",
    cuts: Cuts = "auto",
    model: EditModel = None,
    zoom: Zoom = False,
    zoom_prompt: ZoomPrompts = None,
    zoom_source: ZoomSource = None,
    edit_control: EditControls = None,
    edit_control_scale: EditControlScales = None,
    run: RunOptions = DEFAULTS,
) -> None:
    """Edit a video, or an inversion, by prompts; an interrupted edit goes on where it stopped.

    Each prompt and method gets a folder below --out with edit.mp4, beside.mp4 and sheet.png
    (source, reconstruction, edit, masks) and edit.json; several get a sheet together, too.
    """
    methods = chosen_edit_methods(method)
    is_folder = source.is_dir()
    for name, given in (("--zoom-prompt", zoom_prompt), ("--zoom-source", zoom_source)):
        if given is not None and not zoom:
            raise typer.BadParameter("it describes the window of --zoom", param_hint=name)
    if zoom and (run.control or edit_control or edit_control_scale):
        raise typer.BadParameter(
            "a window has no control, whose pictures are of whole frames", param_hint="--zoom"
        )
    if set(methods) <= set(FLOW_EDIT_METHODS):
        options, of_attention = split_options(option, methods, None if is_folder else "stem")
        of_method = with_preset(options, methods, preset)[methods[0]]
        of_flow = (prompt, of_method, negative_prompt, guidance, seed)
        run = dataclasses.replace(run, option=of_attention, prompt=source_prompt)
        _print(edit_through_video_model(context, source, of_flow, model, run))
        return
    options, of_inversion = split_options(option, methods, None if is_folder else inversion)
    options = with_preset(options, methods, preset)

    from ..inversion import invert
    from ..workflows.edit_plan import EditPlan
    from ..workflows.edits import write_edits

    plan = EditPlan(
        prompt,
        methods,
        options,
        negative_prompt,
        guidance,
        seed,
        zoom=zoom,
        zoom_prompts=zoom_prompt,
        zoom_source=zoom_source,
    )
    shown = (edit_control, edit_control_scale)
    if is_folder:
        refuse_of_inversions(context)
        with ranks(run.device) as group, run.parking(run.out):
            found, note = _edit_inversion(source, plan, shown, model, run, group)
    else:
        request = Request.checked(
            dataclasses.replace(
                run,
                model=model or EMBEDDED_MODEL,
                methods=inversion,
                option=of_inversion,
                seed=seed,
            )
        )
        check_edit_control(edit_control, edit_control_scale, len(run.control or []))
        with ranks(run.device) as group, run.parking(run.out):
            clip = request.open(source, run)
            plan.check_space(run.out, clip.num_frames, clip.height, clip.width)
            pipeline, clip = request.load_for(clip, source)
            plan.check_pipeline(pipeline)
            inverted = invert(
                pipeline,
                clip,
                source_prompt,
                run.out / INVERSIONS,
                method=inversion,
                options=request.options.get(inversion),
                num_steps=run.steps,
                chunk=chunk_of(run.chunk),
                cuts=request.cuts(pipeline, clip, cuts, group),
                model=request.model,
                control=request.control(pipeline, clip, run),
                group=group,
            )
            plan = _with_control(plan, inverted, shown, group)
            say(f"inversion: {inverted.path}")
            note = request.note
            found = write_edits(
                pipeline, inverted, plan, run.out, video=clip, note=note, group=group
            )
    _print(found)
    print_note(note)


def _with_control(
    plan: EditPlan, inversion: InversionFolder, shown: EditControl, group: dist.ProcessGroup | None
) -> EditPlan:
    """The plan with what the options say of the edits' control."""
    from ..distributed import Ranks

    video = inversion.settings["video"]
    size = (video[name] for name in ("num_frames", "height", "width"))
    control = control_of_edit(*shown, Ranks(group).from_main(inversion.control), *size)
    return dataclasses.replace(plan, control=control)


def _edit_inversion(
    path: Path,
    plan: EditPlan,
    shown: EditControl,
    model: str | None,
    run: RunOptions,
    group: dist.ProcessGroup | None,
) -> tuple[Edits, str]:
    """What was found, and what to say of the model."""
    from ..distributed import Ranks
    from ..inversion import InversionFolder
    from ..workflows.edits import write_edits

    device, from_main = rank_device(run.device), Ranks(group).from_main
    check_run_device(run, device)
    inversion = from_main(lambda: InversionFolder.open(path))
    plan = _with_control(plan, inversion, shown, group)
    source = source_of(inversion, model, run)

    def begin() -> None:
        plan.check(inversion, run.out)
        remove_stale(inversion.path)

    from_main(begin)
    dtype = run.dtype or inversion.settings["dtype"]
    pipeline = load(source, device, dtype, run.offloading)
    note = random_note(source)
    return write_edits(pipeline, inversion, plan, run.out, note=note, group=group), note


def _print(found: Edits) -> None:
    for result in found.results:
        say(f"{result.method}, {result.prompt!r}{': reused' if result.reused else ''}")
        files = result.files
        for path in (files.sheet, files.beside, files.video, files.json):
            say(path)
    if found.files is not None:
        say("all of them")
        for path in (found.files.sheet, found.files.json):
            say(path)
