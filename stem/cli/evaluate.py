"""The command that judges an edit, `stem evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..names import CLIP_MODEL, FLOWS
from ..storage import check_output_file
from .app import app, console, quieten_libraries, say
from .arguments import Config, Deinterlace, Device, Frames, Size, ToneMap, encodable_text, one_of
from .edit_options import SourcePrompt
from .ranks import one_process

if TYPE_CHECKING:
    from rich.table import Table

    from ..video import Video
    from ..workflows.evaluation import Evaluation, Figure

JUDGE = "judge"
_STEM_MULTIPLES = 8  # stem edits crop width and height to multiples of at most this


@app.command("evaluate")
def evaluate_command(
    source: Annotated[Path, typer.Argument(help="The video before the edit.")],
    edit: Annotated[Path, typer.Argument(help="The edited video, of any tool.")],
    prompt: Annotated[
        str, typer.Option(help="Describes the edited video.", callback=encodable_text)
    ],
    source_prompt: SourcePrompt = "",
    frames: Frames = None,
    size: Size = None,
    deinterlace: Deinterlace = False,
    tone_map: ToneMap = False,
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Of the source: {', '.join(FLOWS)}. Default: raft where its weights are on this "
            "machine, else dis.",
            callback=one_of(FLOWS),
        ),
    ] = None,
    clip: Annotated[
        str,
        typer.Option(
            help="A CLIP model: a hub id in this machine's cache, or a local folder; for the "
            f"videos of the package's own world, '{JUDGE}'."
        ),
    ] = CLIP_MODEL,
    device: Device = None,
    config: Config = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Judge an edit by fidelity, by CLIP and along the source's flow.

    --frames, --size, --deinterlace and --tone-map are those that the edit was made with; the source
    is read by them. Nothing is downloaded: a metric whose weights are not here is listed with the
    command that gets them.
    """
    from ..metrics import WorldJudge
    from ..models import check_device
    from ..report.files import write_json
    from ..video import read_video
    from ..workflows.evaluation import evaluate

    one_process("evaluate")
    check_device(device)
    if json is not None:
        check_output_file(json)
    before = read_video(
        source,
        frames=frames,
        size=size,
        deinterlace=deinterlace,
        tone_map=tone_map,
        multiple_of=1,
    )
    after = read_video(edit, multiple_of=1)
    before = _cropped_alike(before, after)
    for path, video in ((source, before), (edit, after)):
        for note in video.notes:
            say(f"{path.name}: {note}")
    quieten_libraries()  # CLIP is one of transformers
    judge = WorldJudge() if clip == JUDGE else clip
    found = evaluate(before, after, source_prompt, prompt, flow=flow, clip=judge, device=device)
    print_evaluation(found)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, {**dataclasses.asdict(found), "provenance": _provenance()})
        say(json)


def print_evaluation(found: Evaluation) -> None:
    """Print the figures, and what is missing with what gets it."""
    console.print(evaluation_table(found))
    for line in missing_lines(found):
        say(line)


def evaluation_table(found: Evaluation) -> Table:
    """A row for each metric, beside what it was measured by."""
    from rich.table import Table

    table = Table(title=f"{found.num_frames} frames, {found.width}x{found.height}")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("measured by")
    for figure in found.figures:
        value = "missing" if figure.value is None else f"{figure.value:.4g}"
        arrow = "↑" if figure.higher_is_better else "↓"
        table.add_row(f"{figure.metric} {arrow}", value, figure.measured_by)
    return table


def missing_lines(found: Evaluation) -> list[str]:
    """What is missing and what gets it, a line for each reason."""
    by_reason: dict[tuple[str, str], list[Figure]] = {}
    for figure in found.figures:
        if figure.value is None:
            by_reason.setdefault((figure.missing, figure.remedy), []).append(figure)
    return [
        f"missing: {', '.join(figure.metric for figure in figures)}: {reason}; {remedy}"
        for (reason, remedy), figures in by_reason.items()
    ]


def _cropped_alike(source: Video, edit: Video) -> Video:
    """The source, cropped as `stem edit` crops it where that makes it of the edit's size."""
    from ..video import crop_to_multiple

    for multiple in (2, 4, _STEM_MULTIPLES):
        if min(source.width, source.height) < multiple:
            break
        cropped = crop_to_multiple(source, multiple)
        if (cropped.width, cropped.height) == (edit.width, edit.height):
            return cropped
    return source


def _provenance() -> dict[str, object]:
    from stem_kernels.info import provenance

    return provenance("transformers", "torchmetrics", "opencv-python-headless", "torchvision")
