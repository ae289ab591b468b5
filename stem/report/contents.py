"""What a report shows of a comparison, of edits, or of a demonstration; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .. import __version__
from ..measuring import Row
from ..metrics import Interval
from .curves import Curve
from .details import method_settings, provenance_of, run_settings, settings_of
from .documents import (
    COMPARISON,
    DEMO,
    EDIT,
    Document,
    ReportError,
    find_document,
    number,
    read_document,
)
from .edit_files import EditFiles
from .evaluations import evaluation_beside, evaluation_table
from .files import comparison_files, shown_name
from .page import Pane, Player, Report, Section, Table
from .panes import read_panes
from .tables import COMPARISON_HEADINGS, comparison_cells

_WORLD_FIGURES = (("psnr", 2), ("ssim", 3))  # and their decimals
_MASK = "may change"


def read_report(folder: Path) -> Report:
    """The report of what `stem compare`, `stem edit` or `stem demo` wrote.

    Args:
        folder: Folder of a comparison, of one edit or of several, or of a demonstration; or the
            document in it.

    Raises:
        OSError: there is no such folder.
        ReportError: it holds none of these, or several, or is incomplete, damaged or of another
            version of this package.
    """
    document = read_document(find_document(folder))
    try:
        if document.path.name == COMPARISON:
            return _comparison_report(document)
        if document.path.match(DEMO):
            return _demo_report(document)
        if document.path.name == EDIT:
            return _edits_report(document, [document])
        parts = [read_document(document.located(path)) for path in document["edits"]]
        return _edits_report(document, parts)
    except KeyError as error:
        raise ReportError(
            f"{document.path}, or a document that it names, has no {error}: another version wrote "
            "it; remove its folder and run the command again"
        ) from error


def _comparison_report(document: Document) -> Report:
    video = document["video"]
    title = video["name"] or "a video"
    facts = [
        f"{video['frames']} frames, {video['width']}×{video['height']}, {_rate(video['fps'])}",
        f"{document['num_steps']} steps",
        f"model {document['model'] or 'not named'}",
        document["device"],
    ]
    sections = [_comparison(document, "Reconstructions", _comparison_note(document))]
    return Report("Comparison", title, facts, document["note"], sections, __version__)


def _demo_report(document: Document) -> Report:
    names = document["comparisons"]
    comparisons = {name: read_document(document.located(path)) for name, path in names.items()}
    edit = read_document(document.located(document["edit"]))
    sections = [
        _demo_summary(document, comparisons),
        *(_comparison(found, name, "") for name, found in comparisons.items()),
        _edits([edit], "Edit", [document["evaluation"]]),
    ]
    facts = [
        f"{len(names)} videos of {document['frames']} frames, "
        f"{document['pixels']}×{document['pixels']}",
        f"{document['num_steps']} steps",
        f"model {document['model']}",
    ]
    return Report(
        "Demonstration", "Inversions and an edit", facts, document["note"], sections, __version__
    )


def _edits_report(document: Document, edits: Sequence[Document]) -> Report:
    prompts = list(dict.fromkeys(edit["prompt"] for edit in edits))
    title = prompts[0] if len(prompts) == 1 else f"{len(edits)} edits"
    inverted = edits[0]["inversion_settings"]
    video = inverted["video"]
    facts = [
        f"{video['num_frames']} frames, {video['width']}×{video['height']}, {_rate(video['fps'])}",
        ", ".join(dict.fromkeys(edit["method"] for edit in edits)),
        f"model {inverted['model']['name'] or 'not named'}",
    ]
    kind = "Edit" if len(edits) == 1 else "Edits"
    section = _edits(edits, "Side by side", [evaluation_beside(edit) for edit in edits])
    return Report(kind, title, facts, document["note"], [section], __version__)


def _comparison(document: Document, title: str, note: str) -> Section:
    video, rows = document["video"], [_row(row) for row in document["rows"]]
    clip = comparison_files(document.path.parent)[2]
    shape = (video["frames"], video["width"], video["height"])
    frames, every = read_panes(clip, len(rows) + 1, *shape)
    panes = [Pane("source", frames[0])]
    for row, taken in zip(rows, frames[1:], strict=True):
        figures = [number(value) for value in document["psnr_by_frame"][row.method]]
        panes.append(Pane(shown_name(row.method), taken, figures[::every], "dB"))
    curve = _curve("PSNR to the source by frame, dB", panes)
    fps = float(Fraction(video["fps"])) / every
    player = Player(panes, *shape[1:], shape[0], fps, every=every, curve=curve)
    table = Table(
        "Reconstructions against the source",
        ["method", *COMPARISON_HEADINGS],
        [(shown_name(row.method), *comparison_cells(row)) for row in rows],
        [note] if note else [],
    )
    inversions = document["inversions"]
    model = next(iter(inversions.values()))
    details = {
        "Settings": {
            "Run": run_settings(model, video["notes"]),
            **{method: method_settings(inverted) for method, inverted in inversions.items()},
        },
        "Provenance": {"": provenance_of(document["provenance"], model)},
    }
    lines = [("prompt", document["prompt"])] if document["prompt"] else []
    return Section(title, lines, player, [table], details)


def _comparison_note(document: Document) -> str:
    return (
        f"PSNR and SSIM ({document['ssim_variant']}) are means over the frames; latent error is "
        "|x − x0| / |x0| of the latents; extra MiB is the peak above the start of each method "
        f"({document['peak_memory']}). “vae alone” is the round trip through the autoencoder, "
        "without diffusion: the ceiling."
    )


def _demo_summary(document: Document, comparisons: Mapping[str, Document]) -> Section:
    *world, natural = comparisons
    rows = []
    for row in map(_row, comparisons[natural]["rows"]):
        means = [_interval(document[name][row.method], digits) for name, digits in _WORLD_FIGURES]
        rows.append((shown_name(row.method), *means, f"{row.psnr:.2f}", f"{row.ssim:.3f}"))
    headings = ["method", "world PSNR dB", "world SSIM", f"{natural} PSNR dB", f"{natural} SSIM"]
    counted = f"{len(world)} world videos" if len(world) > 1 else "1 world video"
    note = f"Over {counted}, drawn on the spot, and one natural clip, {natural}."
    if len(world) > 1:
        note += " ±: 95 % interval of the mean over the world videos."
    notes = [note, _comparison_note(comparisons[natural])]
    table = Table("Reconstructions against the source", headings, rows, notes)
    details = {"Provenance": {"": provenance_of(document["provenance"], None)}}
    return Section("All videos", tables=[table], details=details)


def _edits(
    edits: Sequence[Document], title: str, evaluations: Sequence[Mapping[str, Any] | None]
) -> Section:
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
        shown.append(Pane(name, frames[2], figures, "dB"))
        if len(labels) > 3:
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
    curve = _curve("PSNR to the exact answer by frame, dB", panes)
    player = Player(
        panes,
        *shape[1:],
        shape[0],
        float(Fraction(video["fps"])) / every,
        reference=1 if curve else 0,
        every=every,
        curve=curve,
    )
    headings = ["edit", "PSNR to exact dB", "may change", "seconds", "steps in them"]
    note = (
        "May change: the share of the video within the edit's mask, white; gray is the rim by "
        "which it was widened."
    )
    if curve is None:
        note += " No exact answer is known, so there is no PSNR."
    tables = [Table("Figures", headings, rows, [note]), *judged]
    return Section(title, lines, player, tables, details)


def _edit_cells(edit: Document) -> list[str]:
    exact, share = edit.content.get("psnr_to_exact"), edit["share_that_may_change"]
    durations = edit["durations"]
    return [
        "–" if exact is None else f"{number(exact):.2f}",
        "everything" if share is None else f"{share:.1%}",
        f"{durations['edit_seconds']:.1f}",
        str(durations["steps_done_in_them"]),
    ]


def _curve(title: str, panes: Sequence[Pane]) -> Curve | None:
    """The curve of the panes that have figures, in the panes' colours; None where none has."""
    series = {pane.label: pane.figures for pane in panes if pane.figures and pane.unit == "dB"}
    colours = {pane.label: index for index, pane in enumerate(panes)}
    return Curve(title, series, colours) if series else None


def _row(content: Mapping[str, Any]) -> Row:
    figures = {name: number(content[name]) for name in ("psnr", "ssim", "latent_error")}
    return Row(**{**content, **figures})


def _interval(content: Sequence[Any], digits: int) -> str:
    interval = Interval(*map(number, content))
    if interval.half_width != interval.half_width:  # nan: one video has no interval
        return f"{interval.mean:.{digits}f}"
    return f"{interval:.{digits}f}"


def _rate(fps: str) -> str:
    return f"{float(Fraction(fps)):.5g} frames a second"
