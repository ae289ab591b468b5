"""What a report shows of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..cells import COMPARISON_HEADINGS, comparison_cells
from ..documents import Document, number
from ..files import comparison_files, shown_name
from ..rows import Row
from .details import method_settings, provenance_of, rate, run_settings
from .page import Pane, Player, Report, Section, Table, curve_of
from .panes import every_nth, read_panes


def comparison_report(document: Document) -> Report:
    """The report of a comparison, from compare.json."""
    video = document["video"]
    title = video["name"] or "a video"
    facts = [
        f"{video['frames']} frames, {video['width']}×{video['height']}, {rate(video['fps'])}",
        f"{document['num_steps']} steps",
        f"model {document['model'] or 'not named'}",
        document["device"],
    ]
    sections = [comparison_section(document, "Reconstructions", comparison_note(document))]
    return Report("Comparison", title, facts, document["note"], sections)


def comparison_section(document: Document, title: str, note: str) -> Section:
    """The part of a report that shows one comparison.

    Args:
        document: Document compare.json.
        title: Heading of the part.
        note: Paragraph below the table, or "".
    """
    video, rows = document["video"], [comparison_row(row) for row in document["rows"]]
    clip = comparison_files(document.path.parent)[2]
    count, shape = len(rows) + 1, (video["frames"], video["width"], video["height"])
    every = every_nth(count, *shape)
    frames = read_panes(clip, count, *shape[1:], every)
    panes = [Pane("source", frames[0])]
    for row, taken in zip(rows, frames[1:], strict=True):
        figures = [number(value) for value in document["psnr_by_frame"][row.method]]
        panes.append(Pane(shown_name(row.method), taken, figures[::every], "dB"))
    curve = curve_of("PSNR to the source by frame, dB", panes)
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
    return Section(title, lines, player, tables=[table], details=details)


def comparison_note(document: Document) -> str:
    """What the figures of a comparison are."""
    return (
        f"PSNR and SSIM ({document['ssim_variant']}) are means over the frames; latent error is "
        "|x − x0| / |x0| of the latents; extra MiB is the peak above the start of each method "
        f"({document['peak_memory']}). “vae alone” is the round trip through the autoencoder, "
        "without diffusion: the ceiling."
    )


def comparison_row(content: Mapping[str, Any]) -> Row:
    """A row of compare.json."""
    figures = {name: number(content[name]) for name in ("psnr", "ssim", "latent_error")}
    return Row(**{**content, **figures})
