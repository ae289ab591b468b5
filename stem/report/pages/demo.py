"""What a report shows of a demonstration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...metrics import Interval
from ..documents import Document, number, read_document
from ..files import shown_name
from .comparison import comparison_note, comparison_row, comparison_section
from .details import provenance_of
from .edits import edits_section
from .page import Report, Section, Table

_WORLD_FIGURES = (("psnr", 2), ("ssim", 3))  # and their decimals


def demo_report(document: Document) -> Report:
    """The report of a demonstration, from demo-....json."""
    names = document["comparisons"]
    comparisons = {name: read_document(document.located(path)) for name, path in names.items()}
    edit = read_document(document.located(document["edit"]))
    sections = [
        _summary(document, comparisons),
        *(comparison_section(found, name, "") for name, found in comparisons.items()),
        edits_section([edit], "Edit", [document["evaluation"]]),
    ]
    facts = [
        f"{len(names)} videos of {document['frames']} frames, "
        f"{document['pixels']}×{document['pixels']}",
        f"{document['num_steps']} steps",
        f"model {document['model']}",
    ]
    return Report("Demonstration", "Inversions and an edit", facts, document["note"], sections)


def _summary(document: Document, comparisons: Mapping[str, Document]) -> Section:
    *world, natural = comparisons
    rows = []
    for row in map(comparison_row, comparisons[natural]["rows"]):
        means = [_interval(document[name][row.method], digits) for name, digits in _WORLD_FIGURES]
        rows.append((shown_name(row.method), *means, f"{row.psnr:.2f}", f"{row.ssim:.3f}"))
    headings = ["method", "world PSNR dB", "world SSIM", f"{natural} PSNR dB", f"{natural} SSIM"]
    counted = f"{len(world)} world videos" if len(world) > 1 else "1 world video"
    note = f"Over {counted}, drawn on the spot, and one natural clip, {natural}."
    if len(world) > 1:
        note += " ±: 95 % interval of the mean over the world videos."
    notes = [note, comparison_note(comparisons[natural])]
    table = Table("Reconstructions against the source", headings, rows, notes)
    details = {"Provenance": {"": provenance_of(document["provenance"], None)}}
    return Section("All videos", tables=[table], details=details)


def _interval(content: Sequence[Any], digits: int) -> str:
    interval = Interval(*map(number, content))
    if interval.half_width != interval.half_width:  # nan: one video has no interval
        return f"{interval.mean:.{digits}f}"
    return f"{interval:.{digits}f}"
