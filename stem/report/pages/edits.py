"""What a report shows of one edit, or of several of one video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..documents import EDITS, Document, ReportError, number, read_document
from ..edit_files import EditFiles
from .details import method_settings, provenance_of, rate, run_settings, settings_of
from .evaluations import evaluation_beside, evaluation_table
from .page import Pane, Player, Report, Section, Table, curve_of
from .panes import every_nth, read_panes

_MASK = "may change"
_BY_FRAME = "psnr_to_exact_by_frame"


def edits_report(*documents: Document) -> Report:
    """The report of one edit or of several of one video, from edit.json or edits.json.

    Args:
        documents: Documents, at least one.

    Raises:
        ReportError: they are of different videos.
    """
    edits = [edit for document in documents for edit in _edits_of(document)]
    other = next((edit for edit in edits if _video_of(edit) != _video_of(edits[0])), None)
    if other is not None:
        raise ReportError(
            f"{other.path} is an edit of another video than {edits[0].path}, or of other frames of "
            "it; name edits of one video"
        )
    note = next(filter(None, (document["note"] for document in documents)), "")
    prompts = list(dict.fromkeys(edit["prompt"] for edit in edits))
    title = prompts[0] if len(prompts) == 1 else f"{len(edits)} edits"
    video = _video_of(edits[0])
    facts = [
        f"{video['num_frames']} frames, {video['width']}×{video['height']}, {rate(video['fps'])}",
        ", ".join(dict.fromkeys(edit["method"] for edit in edits)),
        "model " + ", ".join(dict.fromkeys(map(_model_of, edits))),
    ]
    kind = "Edit" if len(edits) == 1 else "Edits"
    section = edits_section(edits, "Side by side", [evaluation_beside(edit) for edit in edits])
    return Report(kind, title, facts, note, [section])


def _edits_of(document: Document) -> list[Document]:
    if document.kind == EDITS:
        return [read_document(document.located(path)) for path in document["edits"]]
    return [document]


def _video_of(edit: Document) -> Mapping[str, Any]:
    video: Mapping[str, Any] = edit["inversion_settings"]["video"]
    return video


def _model_of(edit: Document) -> str:
    return edit["inversion_settings"]["model"]["name"] or "not named"


def edits_section(
    edits: Sequence[Document], title: str, evaluations: Sequence[Mapping[str, Any] | None]
) -> Section:
    """The part of a report that shows edits of one video.

    Args:
        edits: Documents edit.json.
        title: Heading of the part.
        evaluations: Evaluation of each edit, or None.
    """
    several = len(edits) > 1
    names = [
        f"{edit['method']} {n + 1}" if several else edit["method"] for n, edit in enumerate(edits)
    ]
    lines = _grouped("source", names, [edit["source_prompt"] or "no prompt" for edit in edits])
    rows, judged, settings, provenance = [], [], {}, {}
    for name, edit, evaluation in zip(names, edits, evaluations, strict=True):
        lines.append((name if several else "edit", edit["prompt"]))
        rows.append((name, *_edit_cells(edit)))
        if evaluation is not None:
            judged.append(evaluation_table(evaluation, f"{name}, judged"))
        settings[name] = settings_of(edit["settings"])
        inverted = edit["inversion_settings"]
        provenance[name if several else ""] = provenance_of(edit["provenance"], inverted)
    inversions = _grouped("Inversion", names, [edit["inversion_settings"] for edit in edits])
    for whose, inverted in inversions:
        run = [("method", inverted["method"]), *run_settings(inverted, ())]
        settings[whose] = run + method_settings(inverted)
    details = {"Settings": settings, "Provenance": provenance}
    player = _player(names, edits, len(inversions) == 1)
    headings = ["edit", "PSNR to exact dB", "may change", "seconds", "steps in them"]
    note = (
        "May change: the share of the video within the edit's mask, white; gray is the rim by "
        "which it was widened."
    )
    if player.curve is None:
        note += " No exact answer is known, so there is no PSNR."
    tables = [Table("Figures", headings, rows, [note]), *judged]
    return Section(title, lines, player, tables=tables, details=details)


def _grouped(what: str, names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Each value once, behind the names that have it, where not all of them have the same."""
    whose: list[tuple[list[str], Any]] = []
    for name, value in zip(names, values, strict=True):
        known = next((owners for owners, other in whose if other == value), None)
        if known is None:
            whose.append(([name], value))
        else:
            known.append(name)
    if len(whose) == 1:
        return [(what, values[0])]
    return [(f"{what} of {', '.join(owners)}", value) for owners, value in whose]


def _player(names: Sequence[str], edits: Sequence[Document], of_one: bool) -> Player:
    """The videos of edits in step.

    Args:
        names: Names of the edits.
        edits: Documents edit.json.
        of_one: Whether all of them are of one inversion.
    """
    several, video = len(edits) > 1, _video_of(edits[0])
    size = (video["width"], video["height"])
    second = _second_shown(edits)
    count = 1 + sum(len(edit["beside"]) - 2 + own for edit, own in zip(edits, second, strict=True))
    every = every_nth(count, video["num_frames"], *size)
    panes: list[Pane] = []
    reference = 0
    for name, edit, own in zip(names, edits, second, strict=True):
        labels = edit["beside"]
        frames = read_panes(EditFiles(edit.path.parent).beside, len(labels), *size, every)
        if not panes:
            panes.append(Pane(labels[0], frames[0]))
        if own:
            reference = len(panes) if _is_exact(edit) else reference
            label = labels[1] if of_one or _is_exact(edit) else f"{labels[1]}, {name}"
            panes.append(Pane(label, frames[1]))
        by_frame = edit.content.get(_BY_FRAME)
        figures = by_frame and [number(value) for value in by_frame[::every]]
        mask = len(panes) + 1 if len(labels) > 3 else None
        panes.append(Pane(name, frames[2], figures, "dB", mask=mask))
        if mask is not None:
            label = f"{_MASK}, {name}" if several else _MASK
            shares = [100 * share for share in edit["share_by_frame"][::every]]
            panes.append(Pane(label, frames[3], shares, "%", compared=False))
    return Player(
        panes,
        *size,
        video["num_frames"],
        float(Fraction(video["fps"])) / every,
        reference=reference,
        every=every,
        curve=curve_of("PSNR to the exact answer by frame, dB", panes),
        wiped=0,
    )


def _is_exact(edit: Document) -> bool:
    """Whether the second of an edit's videos is the exact answer, not the reconstruction."""
    return _BY_FRAME in edit.content


def _second_shown(edits: Sequence[Document]) -> list[bool]:
    """Whether the second video of each edit is shown: one exact answer, and one reconstruction of
    each inversion."""
    known: list[Any] = []
    shown = []
    for edit in edits:
        kind = None if _is_exact(edit) else edit["inversion_settings"]
        shown.append(kind not in known)
        known.append(kind)
    return shown


def _edit_cells(edit: Document) -> list[str]:
    exact, share = edit.content.get("psnr_to_exact"), edit["share_that_may_change"]
    durations = edit["durations"]
    return [
        "–" if exact is None else f"{number(exact):.2f}",
        "everything" if share is None else f"{share:.1%}",
        f"{durations['edit_seconds']:.1f}",
        str(durations["steps_done_in_them"]),
    ]
