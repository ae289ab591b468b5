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
from .panes import read_panes

_MASK = "may change"


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
            "it; name edits of one inversion"
        )
    note = next(filter(None, (document["note"] for document in documents)), "")
    prompts = list(dict.fromkeys(edit["prompt"] for edit in edits))
    title = prompts[0] if len(prompts) == 1 else f"{len(edits)} edits"
    inverted = edits[0]["inversion_settings"]
    video = inverted["video"]
    facts = [
        f"{video['num_frames']} frames, {video['width']}×{video['height']}, {rate(video['fps'])}",
        ", ".join(dict.fromkeys(edit["method"] for edit in edits)),
        f"model {inverted['model']['name'] or 'not named'}",
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
    lines = [("source", edits[0]["source_prompt"] or "no prompt")]
    panes: list[Pane] = []
    rows, judged, settings, provenance = [], [], {}, {}
    for index, (edit, evaluation) in enumerate(zip(edits, evaluations, strict=True)):
        inverted = edit["inversion_settings"]
        video, labels = inverted["video"], edit["beside"]
        shape = (video["num_frames"], video["width"], video["height"])
        clip = EditFiles(edit.path.parent).beside
        frames, every = read_panes(clip, len(labels), *shape, among=len(edits))
        name = f"{edit['method']} {index + 1}" if several else edit["method"]
        lines.append((name if several else "edit", edit["prompt"]))
        shown = [Pane(label, taken) for label, taken in zip(labels[:2], frames, strict=False)]
        by_frame = edit.content.get("psnr_to_exact_by_frame")
        figures = by_frame and [number(value) for value in by_frame[::every]]
        number_of_mask = len(panes) + (3 if index == 0 else 1)
        mask = number_of_mask if len(labels) > 3 else None
        shown.append(Pane(name, frames[2], figures, "dB", mask=mask))
        if mask is not None:
            label = f"{_MASK}, {name}" if several else _MASK
            shares = [100 * share for share in edit["share_by_frame"][::every]]
            shown.append(Pane(label, frames[3], shares, "%", compared=False))
        panes += shown if index == 0 else shown[2:]
        rows.append((name, *_edit_cells(edit)))
        if evaluation is not None:
            judged.append(evaluation_table(evaluation, f"{name}, judged"))
        settings[name] = settings_of(edit["settings"])
        provenance[name if several else ""] = provenance_of(edit["provenance"], inverted)
    inversion = [("method", inverted["method"]), *run_settings(inverted, ())]
    inversion += method_settings(inverted)
    details = {"Settings": {**settings, "Inversion": inversion}, "Provenance": provenance}
    curve = curve_of("PSNR to the exact answer by frame, dB", panes)
    player = Player(
        panes,
        *shape[1:],
        shape[0],
        float(Fraction(video["fps"])) / every,
        reference=1 if curve else 0,
        every=every,
        curve=curve,
        wiped=0,
    )
    headings = ["edit", "PSNR to exact dB", "may change", "seconds", "steps in them"]
    note = (
        "May change: the share of the video within the edit's mask, white; gray is the rim by "
        "which it was widened."
    )
    if curve is None:
        note += " No exact answer is known, so there is no PSNR."
    tables = [Table("Figures", headings, rows, [note]), *judged]
    return Section(title, lines, player, tables=tables, details=details)


def _edit_cells(edit: Document) -> list[str]:
    exact, share = edit.content.get("psnr_to_exact"), edit["share_that_may_change"]
    durations = edit["durations"]
    return [
        "–" if exact is None else f"{number(exact):.2f}",
        "everything" if share is None else f"{share:.1%}",
        f"{durations['edit_seconds']:.1f}",
        str(durations["steps_done_in_them"]),
    ]
