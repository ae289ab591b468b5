"""The command that judges edits, `stem evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..names import BENCHMARK_CLIP_MODEL, CLIP_MODEL, FLOWS
from ..storage import check_output_file
from .app import app, console, quieten_libraries, say
from .arguments import encodable_text, one_of, refuse
from .benchmark import grouped, print_benchmark
from .control_options import OF_CONTROL
from .edit_options import EditModel, SourcePrompt
from .ranks import one_process, rank_device, ranks
from .request import check_run_device, load, read_options, source_of
from .run_options import DEFAULTS, RunOptions, takes_run_options

if TYPE_CHECKING:
    import torch.distributed as dist
    from rich.table import Table

    from ..metrics import WorldJudge
    from ..video import Video
    from ..workflows.benchmark import BenchmarkEvaluation
    from ..workflows.evaluation import Evaluation

JUDGE, DENSE = "judge", "dense"
_STEM_MULTIPLES = 8  # stem edits crop width and height to multiples of at most this
_OF_SOURCE = ("frames", "size", "deinterlace", "tone_map")
_OF_NETWORKS = ("device", "config")
_OF_TWO_VIDEOS = ("prompt", "source_prompt", "flow", "against", *_OF_SOURCE)
_WITHOUT = ("methods", "steps", "seed", "option", "chunk", "out", *OF_CONTROL)


@app.command("evaluate")
@takes_run_options(without=_WITHOUT)
def evaluate_command(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE|BENCHMARK",
            help="The video before the edit; or the folder of FiVE or of IVEBench.",
        ),
    ],
    edit: Annotated[
        Path,
        typer.Argument(
            metavar="EDIT|EDITS",
            help="The edited video, of any tool, or the folder in which `stem edit` wrote it; or "
            "the folder of a benchmark's edits.",
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="Describes the edited video. A benchmark has its own.", callback=encodable_text
        ),
    ] = "",
    source_prompt: SourcePrompt = "",
    against: Annotated[
        str | None,
        typer.Option(
            metavar=f"{DENSE}|FILE",
            help="Another edit to measure PSNR, SSIM and LPIPS to: a video; or the same edit by "
            "all-frame attention, which is made first, of an edit of `stem edit`.",
        ),
    ] = None,
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Of the source: {', '.join(FLOWS)}. Default: raft where its weights are on this "
            "machine, else dis.",
            callback=one_of(FLOWS),
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="A CLIP model: a hub id in this machine's cache, or a local folder; for the "
            f"videos of the package's own world, '{JUDGE}'. Default: {CLIP_MODEL}; of a benchmark "
            f"{BENCHMARK_CLIP_MODEL}."
        ),
    ] = None,
    model: EditModel = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    run: RunOptions = DEFAULTS,
) -> None:
    """Judge an edit by fidelity, by CLIP and along the source's flow; or a benchmark's edits.

    --frames, --size, --deinterlace and --tone-map are those that the edit was made with; the source
    is read by them. No metric is downloaded: one whose weights are not here is listed with the
    command that gets them. The options of a model are for --against dense. Under torchrun processes
    share the frames of two videos.
    """
    if against != DENSE:
        reason = "it goes with --against dense, which runs a model"
        refuse(context, dict.fromkeys(_of_models(), reason))
    if json is not None:
        check_output_file(json)
    if source.is_dir():
        one_process("evaluate BENCHMARK")
        reason = f"it is for two videos, and {source} is a folder"
        refuse(context, dict.fromkeys(_OF_TWO_VIDEOS, reason))
        found: BenchmarkEvaluation | Evaluation = _benchmark(source, edit, clip, run)
    else:
        if not prompt.strip():
            raise typer.BadParameter(
                "it is needed for two videos: describe the edited one", param_hint="--prompt"
            )
        from ..distributed import Ranks

        with ranks(run.device) as group:
            prompts = (source_prompt, prompt)
            found = _two_videos(source, edit, prompts, against, flow, clip, model, run, group)
            json = json if Ranks(group).main else None
    if json is not None:
        from ..report.files import write_json

        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, {**dataclasses.asdict(found), "provenance": _provenance()})
        say(json)


def _benchmark(folder: Path, edits: Path, clip: str | None, run: RunOptions) -> BenchmarkEvaluation:
    from ..models import check_device
    from ..workflows.benchmark import evaluate_benchmark

    check_device(run.device)
    quieten_libraries()
    judge = _judge(clip or BENCHMARK_CLIP_MODEL)
    found = evaluate_benchmark(folder, edits, clip=judge, device=run.device)
    print_benchmark(found)
    return found


def _two_videos(
    source: Path,
    edit: Path,
    prompts: tuple[str, str],
    against: str | None,
    flow: str | None,
    clip: str | None,
    model: str | None,
    run: RunOptions,
    group: dist.ProcessGroup | None,
) -> Evaluation:
    from ..video import read_video
    from ..workflows.evaluation import evaluate

    device = rank_device(run.device)
    check_run_device(run, device)
    if edit.is_dir():
        edit = edit / "edit.mp4"
    before = read_video(source, **read_options(run), multiple_of=1)
    after = read_video(edit, multiple_of=1)
    before = _cropped_alike(before, after)
    for path, video in ((source, before), (edit, after)):
        for note in video.notes:
            say(f"{path.name}: {note}")
    quieten_libraries()  # CLIP is one of transformers
    other = None
    if against == DENSE:
        other = _dense(before, edit, model, run, group)
    elif against is not None:
        other = read_video(against, multiple_of=1)
        other = dataclasses.replace(other, name=Path(against).name)
    judge = _judge(clip or CLIP_MODEL)
    found = evaluate(
        before, after, *prompts, flow=flow, clip=judge, device=device, against=other, group=group
    )
    print_evaluation(found)
    return found


def _dense(
    source: Video,
    edit: Path,
    model: str | None,
    run: RunOptions,
    group: dist.ProcessGroup | None,
) -> Video:
    """The edit once more under all-frame attention, made where it is not there yet."""
    from ..video import read_video
    from ..workflows.dense import dense_edit, open_edit

    made = open_edit(edit)
    made.check_source(source)
    origin = source_of(made.inversion, model, run)
    dtype = run.dtype or made.inversion.settings["dtype"]
    with run.parking(made.files.folder.parent):
        pipeline = load(origin, rank_device(run.device), dtype, run.offloading)
        found = dense_edit(pipeline, made, source, group=group)
    say(f"{DENSE}{', reused' if found.reused else ''}: {found.files.video}")
    return dataclasses.replace(read_video(found.files.video, multiple_of=1), name="dense attention")


def _judge(clip: str) -> str | WorldJudge:
    from ..metrics import WorldJudge

    return WorldJudge() if clip == JUDGE else clip


def _of_models() -> tuple[str, ...]:
    """Parameters of a model, which is run for --against dense alone."""
    names = [field.name for field in dataclasses.fields(RunOptions)]
    others = {*_OF_SOURCE, *_OF_NETWORKS, "prompt"}
    return tuple(name for name in names if name not in others)


def print_evaluation(found: Evaluation) -> None:
    """Print the figures, and what is missing with what gets it."""
    console.print(evaluation_table(found))
    for line in missing_lines(found):
        say(line)


def evaluation_table(found: Evaluation) -> Table:
    """A row for each metric, beside what it was measured by."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{found.num_frames} frames, {found.width}x{found.height}")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("measured by")
    for figure in found.figures:
        value = "missing" if figure.value is None else f"{figure.value:.4g}"
        arrow = "↑" if figure.higher_is_better else "↓"
        # Names of files are in both; brackets in them are no markup.
        table.add_row(escape(f"{figure.metric} {arrow}"), value, escape(figure.measured_by))
    return table


def missing_lines(found: Evaluation) -> list[str]:
    """What is missing and what gets it, a line for each reason."""
    missing = (figure for figure in found.figures if figure.value is None)
    by_reason = grouped(missing, lambda figure: (figure.missing, figure.remedy))
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
