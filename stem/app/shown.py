"""Parts of the page as HTML; every text from outside is escaped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from .commands import shell_line
from .estimate import Estimate, shown_bytes, shown_seconds
from .jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job
from .state import Result

_SHOWN_JOBS = 8  # those that have ended: the last few
_SHOWN_LINES = 12
_WORDS = {
    WAITING: "waits",
    RUNNING: "runs",
    DONE: "done",
    FAILED: "failed",
    CANCELLED: "cancelled; finished steps are kept",
}


def notice(text: str, *, bad: bool = False) -> str:
    """A line below a form; "" shows nothing.

    Args:
        text: Text of the line.
        bad: Whether it says that something was refused.
    """
    if not text:
        return ""
    kind, role = ("bad", "alert") if bad else ("good", "status")
    return f'<p class="notice {kind}" role="{role}">{escape(text)}</p>'


def strip(pictures: Sequence[tuple[int, str]], first: int, stop: int) -> str:
    """Thumbnails of a video; those outside a range of frames are dim.

    Args:
        pictures: Numbers of frames, and data URIs.
        first: Number of the first frame taken.
        stop: Number of the frame after the last one taken.
    """
    if not pictures:
        return ""
    shown = []
    for number, uri in pictures:
        inside = first <= number < stop
        alt = f"frame {number}, {'taken' if inside else 'not taken'}"
        kind = ' class="in"' if inside else ""
        shown.append(
            f'<figure{kind}><img src="{escape(uri)}" alt="{alt}">'
            f'<figcaption aria-hidden="true">{number}</figcaption></figure>'
        )
    label = f"Frames {first} to {stop - 1} are taken"
    return f'<div class="strip" role="group" aria-label="{label}">{"".join(shown)}</div>'


def estimated(found: Estimate | None, what: str) -> str:
    """What a job is expected to take.

    Args:
        found: Estimate, or None where nothing can be said yet.
        what: Word for the job.
    """
    if found is None:
        return ""
    parts = [f"{found.width}×{found.height} pixels"]
    if found.memory is None:
        why = "the model's" if found.here else "the model is not on this machine yet, so its"
        parts.append(
            f"{why} memory is not known before it is loaded ({shown_bytes(found.free)} may be used)"
        )
    else:
        parts.append(
            f"memory: at least {shown_bytes(found.memory)} of the {shown_bytes(found.free)} that "
            "may be used"
        )
    if found.disk is not None:
        parts.append(f"disk: {shown_bytes(found.disk)} of {shown_bytes(found.free_disk)}")
    parts.append(
        "time: known once a first step is timed"
        if found.seconds is None
        else f"time: about {shown_seconds(found.seconds)}"
    )
    text = escape(f"The {what}: {'; '.join(parts)}.")
    if found.advice:
        text += f" <strong>It does not fit: {escape(found.advice)}.</strong>"
    kind = "bad" if found.advice else "expected"
    return f'<p class="notice {kind}" role="{"alert" if found.advice else "status"}">{text}</p>'


def job_list(jobs: Sequence[Job]) -> str:
    """The jobs that wait, run, and the last ones that have ended.

    Args:
        jobs: Jobs, the oldest first.
    """
    going = [job for job in jobs if job.state in (WAITING, RUNNING)]
    ended = [job for job in jobs if job.state not in (WAITING, RUNNING)]
    shown = [*going, *sorted(ended, key=lambda job: -(job.ended or 0))[:_SHOWN_JOBS]]
    if not shown:
        return '<p class="quiet">No job yet. Choose a video, and invert it.</p>'
    return f'<ul class="jobs" aria-label="Jobs">{"".join(map(_job, shown))}</ul>'


def _job(job: Job) -> str:
    head = (
        f'<span class="number">{int(job.number)}</span> <span class="title">{escape(job.title)}'
        f'</span> <span class="state {job.state}">{_WORDS[job.state]}</span>'
    )
    parts = [f"<div>{head}</div>"]
    if job.state == RUNNING:
        parts.append(_progress(job))
    if job.state == FAILED:
        parts.append(f'<p class="notice bad">{escape(job.last_line())}</p>')
    if job.state == DONE and job.started and job.ended:
        parts.append(f'<p class="quiet">took {shown_seconds(job.ended - job.started)}</p>')
    return f'<li data-job="{job.number}" data-state="{job.state}">{"".join(parts)}</li>'


def _progress(job: Job) -> str:
    step = job.step()
    since = shown_seconds(time.time() - (job.started or time.time()))
    if step is None:
        return f'<p class="quiet">loading the model and the video, {since}</p>'
    name = escape(step.name)
    if step.done == step.total:
        text = f"{name}: all {step.total} steps, {since} in all; writing"
    else:
        left = step.seconds_left
        rest = "timing the first step" if left is None else f"{shown_seconds(left)} left"
        text = f"{name}: {step.done} of {step.total} steps, {rest}"
    return (
        f'<progress max="{step.total}" value="{step.done}" aria-label="{name}"></progress>'
        f'<p class="quiet">{text}</p>'
    )


def command_lines(job: Job) -> str:
    """The command lines of a job, as a shell takes them.

    Args:
        job: Job.
    """
    return "\n".join(shell_line(command) for command in job.commands)


def log_end(job: Job) -> str:
    """The last lines of a job's log.

    Args:
        job: Job.
    """
    return "\n".join(job.printed()[-_SHOWN_LINES:])


def player(page: Path) -> str:
    """A report's page within this one.

    Args:
        page: Path of the report.
    """
    return (
        f'<iframe class="player" title="Results, playing in step" src="{file_url(page)}" '
        'onload="stemFit(this)"></iframe>'
    )


def downloads(results: Sequence[Result], page: Path | None) -> str:
    """Links to the files of results.

    Args:
        results: Results.
        page: Path of their report, or None.
    """
    files = [
        (result.folder / name, f"{result.label}: {name}")
        for result in results
        for name in ("edit.mp4", "beside.mp4", "sheet.png", "edit.json")
    ]
    if page is not None:
        files.append((page, "this page: report.html"))
    items = "".join(
        f'<li><a href="{file_url(path)}" download="{escape(path.name)}">{escape(text)}</a></li>'
        for path, text in files
        if path.is_file()
    )
    return f'<ul class="downloads" aria-label="Downloads">{items}</ul>' if items else ""


def file_url(path: Path) -> str:
    """The address of a file below --out, relative to the page's.

    Args:
        path: Absolute path of the file.
    """
    return f"gradio_api/file={quote(str(path))}"


def report_line(results: Sequence[Result], out: Path) -> str:
    """The command line that shows results side by side.

    Args:
        results: Results.
        out: File that it writes.
    """
    folders = [str(result.folder) for result in results]
    return shlex.join(["stem", "report", *folders, "--out", str(out)])
