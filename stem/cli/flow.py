"""What `stem invert`, `reconstruct` and `edit` do through a video transformer."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..names import EMBEDDED_VIDEO_MODEL, FLOW_METHODS, INVERSIONS
from ..sources import ModelSource
from ..storage import remove_stale
from .app import quieten_libraries, say
from .arguments import is_given, names_of, parsed_options, refuse
from .control_options import OF_CONTROL
from .edit_options import refuse_of_inversions
from .ranks import one_process
from .request import check_run_device, read_options, source_of
from .run_options import OF_MOTION, RunOptions

if TYPE_CHECKING:
    from ..flow import VelocityModel
    from ..inversion import InversionFolder
    from ..video import VideoFile
    from ..workflows.edits import Edits

Plan = tuple[list[str], dict[str, Any], str, float | None, int]
"""Arguments of `FlowEditPlan`, in its order."""

_CONTROLS = ("controlnet", *OF_CONTROL, "edit_control", "edit_control_scale")
_ADDED = ("model_config", "vae", "lora", "textual_inversion", *OF_MOTION)
_OF_WINDOW = ("zoom", "zoom_prompt", "zoom_source")
_REFUSED = {
    **dict.fromkeys(_ADDED, "what it names is made for Stable Diffusion's models"),
    **dict.fromkeys(_CONTROLS, "ControlNets are made for Stable Diffusion's UNets"),
    **dict.fromkeys(("chunk", "cuts", "park"), "all frames go through it at once"),
    **dict.fromkeys(("offload", "offload_folder"), "its weights all stay on the --device"),
    **dict.fromkeys(_OF_WINDOW, "it has no mask that a window could follow"),
    **dict.fromkeys(("keep_bases", "bases"), "its bases are of one call, and are not kept"),
}
"""By parameter, why a video transformer does not go with it."""


def through_video_model(run: RunOptions) -> bool:
    """Whether the options ask for an inversion through a video transformer."""
    of_flow = any(name in FLOW_METHODS for name in names_of(run.methods))
    return of_flow or ModelSource(run.model).is_video_model


def invert_through_video_model(context: typer.Context, video: Path, run: RunOptions) -> None:
    """Invert a video by each method, and say where.

    Args:
        context: Context of the command, which knows what was given.
        video: Path of the video.
        run: Options of the command.

    Raises:
        typer.BadParameter, ValueError, OSError: an option cannot be followed.
    """
    from ..inversion import invert_video

    methods = names_of(run.methods) if is_given(context, "methods") else [FLOW_METHODS[0]]
    if not methods or any(name not in FLOW_METHODS for name in methods):
        raise typer.BadParameter(
            f"{run.methods!r}; through a video transformer take one or more of "
            f"{', '.join(FLOW_METHODS)}. STEM's bases are on in each, and --option "
            "stem.enabled=false turns them off",
            param_hint="--methods",
        )
    name = run.model if is_given(context, "model") else EMBEDDED_VIDEO_MODEL
    _refuse(context, {**_REFUSED, "seed": "nothing is drawn"})
    request = _Request.checked("invert", name, run)
    model, clip = request.load_for(request.open(video), video)
    for method in methods:
        inversion = invert_video(
            model,
            clip,
            run.prompt,
            run.out / INVERSIONS,
            method=method,
            options=request.options,
            num_steps=run.steps,
            source=request.source.record(),
        )
        say(f"{method}: {inversion.path}")
    say("the way back: stem reconstruct FOLDER, with a folder from above")


def reconstruct_through_video_model(
    context: typer.Context,
    inversion: InversionFolder,
    path: Path,
    model: str | None,
    run: RunOptions,
) -> None:
    """Write a reconstruction, and say how far it is from what the VAE makes of the source.

    Args:
        context: Context of the command.
        inversion: Inversion through a video transformer.
        path: File to write.
        model: Text of --model, or None.
        run: Options of the command.

    Raises:
        typer.BadParameter, ValueError, OSError: an option cannot be followed.
    """
    from ..inversion import reconstruct_video
    from ..inversion.runs import check_startable
    from ..metrics import psnr
    from ..video import write_video

    _refuse(context, _REFUSED)
    one_process("reconstruct")
    check_startable(inversion, FLOW_METHODS)
    loaded = _load(source_of(inversion, model, run), run, inversion.settings["dtype"])
    frames = reconstruct_video(loaded, inversion)
    write_video(path, frames, Fraction(inversion.settings["video"]["fps"]))
    say(path)
    say(f"PSNR to the source through the VAE: {psnr(frames, loaded.decode(inversion.x0())):.2f} dB")


def edit_through_video_model(
    context: typer.Context, source: Path, plan: Plan, model: str | None, run: RunOptions
) -> Edits:
    """Edit a video, or an inversion's, by FlowEdit.

    Args:
        context: Context of the command.
        source: Path of a video, or of an inversion's folder.
        plan: What the edits are.
        model: Text of --model, or None.
        run: Options of the command, the source's prompt and --option of the attention among them.

    Raises:
        typer.BadParameter, ValueError, OSError: an option cannot be followed.
    """
    from ..inversion import InversionFolder, keep_source
    from ..workflows.flow_edits import FlowEditPlan, write_flow_edits

    _refuse(context, {**_REFUSED, "inversion": "flowedit inverts nothing"})
    asked = FlowEditPlan(*plan)
    if source.is_dir():
        refuse_of_inversions(context)
        one_process("edit")
        kept = InversionFolder.open(source)
        of_model = source_of(kept, model, run)
        asked.check(kept, run.out, has_video=False)
        remove_stale(kept.path)
        loaded = _load(of_model, run, kept.settings["dtype"])
        return write_flow_edits(loaded, kept, asked, run.out)
    request = _Request.checked("edit", model or EMBEDDED_VIDEO_MODEL, run)
    clip = request.open(source)
    asked.check_space(run.out, clip.num_frames, clip.height, clip.width)
    loaded, pictures = request.load_for(clip, source)
    kept = keep_source(
        loaded,
        pictures,
        run.prompt,
        run.out / INVERSIONS,
        options=request.options,
        num_steps=run.steps,
        source=request.source.record(),
    )
    say(f"source: {kept.path}")
    return write_flow_edits(loaded, kept, asked, run.out, video=pictures)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a command that encodes a video is asked for, checked as far as that needs no model."""

    source: ModelSource
    options: dict[str, Any]
    run: RunOptions

    @classmethod
    def checked(cls, command: str, name: str, run: RunOptions) -> _Request:
        from ..flow import noise_levels
        from ..inversion.flow_inverting import video_attention
        from ..storage import check_output

        one_process(command)
        options = parsed_options(run.option or [], ["stem"]).get("stem", {})
        video_attention(options)
        noise_levels(run.steps)
        source = ModelSource(name, run.variant)
        source.check()
        check_run_device(run, run.device)
        check_output(run.out / INVERSIONS)
        return cls(source, options, run)

    def open(self, path: Path) -> VideoFile:
        """The frames asked for, cropped and counted as far as the model's VAE is known."""
        from ..flow.loading import known_steps
        from ..flow.model import check_num_frames
        from ..video import open_video

        every, multiple = known_steps(self.source.name)
        clip = open_video(path, **read_options(self.run), multiple_of=multiple)
        check_num_frames(clip.num_frames, every)
        return clip

    def load_for(self, clip: VideoFile, path: Path) -> tuple[VelocityModel, VideoFile]:
        """The model, and the clip as it takes it; prints what was changed in it."""
        from ..video import crop_to_multiple

        model = _load(self.source, self.run, self.run.dtype)
        pictures = crop_to_multiple(clip, model.multiple)
        for note in pictures.notes:
            say(f"{path.name}: {note}")
        return model, pictures


def _load(source: ModelSource, run: RunOptions, dtype: str | None) -> VelocityModel:
    from ..flow import load_video_model

    quieten_libraries()
    dtype = run.dtype or dtype
    return load_video_model(source.name, device=run.device, dtype=dtype, variant=source.variant)


def _refuse(context: typer.Context, reasons: dict[str, str]) -> None:
    """Raise where an option is given that a video transformer does not go with."""
    said = "it does not go with a video transformer: {}; leave it out"
    refuse(context, {name: said.format(reason) for name, reason in reasons.items()})
