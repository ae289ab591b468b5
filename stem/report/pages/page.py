"""A report: one HTML page that needs no other file, server or network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from ... import __version__
from ...storage import write_atomically
from ..curves import Curve

_WIDTH, _GAP = 1200, 8  # CSS pixels of the page's content beside a scrollbar, and between panes
_LEAST, _LARGE, _MOST = 176, 320, 400  # CSS pixels of a pane's width; large frames have _LARGE
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Pane:
    """One of the videos that play in step.

    Args:
        label: Label above it.
        frames: Data URIs of its frames.
        figures: Figure of each frame, nan where there is none; None: the video has no figures.
        unit: Unit of the figures.
        compared: Whether its difference from the player's reference means anything.
        mask: Number of the pane that shows, white, where this one may differ; None: there is none.
    """

    label: str
    frames: Sequence[str]
    figures: Sequence[float] | None = None
    unit: str = ""
    compared: bool = True
    mask: int | None = None


@dataclass(frozen=True)
class Player:
    """Videos that play in step, under one set of controls.

    Args:
        panes: Videos, all of one length and shape.
        width: Width of their frames in pixels.
        height: Height of their frames in pixels.
        num_frames: Number of the frames that there are, here or not.
        fps: Frames per second of the frames here.
        reference: Number of the pane that the others' difference is shown from.
        every: Every so many of the source's frames are here.
        curve: Curve of the figures over the frames, or None.
        wiped: Number of the pane that a slider lays over the left part of the others; None: there
            is no slider.
    """

    panes: Sequence[Pane]
    width: int
    height: int
    num_frames: int
    fps: float
    reference: int = 0
    every: int = 1
    curve: Curve | None = None
    wiped: int | None = None

    @property
    def masked(self) -> bool:
        """Whether a pane has a mask."""
        return any(pane.mask is not None for pane in self.panes)

    @property
    def count(self) -> int:
        """The number of frames here."""
        return len(self.panes[0].frames)

    @property
    def columns(self) -> int:
        """The number of panes in a row on a wide page."""
        count = len(self.panes)
        rows = range(1, count + 1)
        found = (math.ceil(count / row) for row in rows)
        least = min(max(self.width, _LEAST), _LARGE)
        return next(columns for columns in found if columns == 1 or _share(columns) >= least)

    @property
    def pane_width(self) -> int:
        """CSS pixels of a pane's width on a wide page: whole multiples, where it is magnified."""
        width = min(_MOST, _share(self.columns))
        return width // self.width * self.width or width

    @property
    def row_width(self) -> int:
        """CSS pixels of a row of panes' width on a wide page."""
        return self.columns * (self.pane_width + _GAP) - _GAP

    def data(self) -> dict[str, object]:
        """What the page's script needs of it, as JSON types."""
        return {
            "fps": self.fps,
            "every": self.every,
            "num_frames": self.num_frames,
            "reference": self.reference,
            "wiped": self.wiped,
            "panes": [
                {
                    "label": pane.label,
                    "frames": list(pane.frames),
                    "unit": pane.unit,
                    "figures": [_figure(value) for value in pane.figures or ()],
                    "compared": pane.compared,
                    "mask": pane.mask,
                }
                for pane in self.panes
            ],
        }


def _share(columns: int) -> int:
    return (_WIDTH - _GAP * (columns - 1)) // columns


def _figure(value: float) -> float | str:
    return value if math.isfinite(value) else "exact" if value > 0 else "–"


def curve_of(title: str, panes: Sequence[Pane]) -> Curve | None:
    """The curve of the panes that have figures in dB; None where none has.

    Args:
        title: Title, with the unit.
        panes: Panes of a player, whose colours are the curve's.
    """
    series = {pane.label: pane.figures for pane in panes if pane.figures and pane.unit == "dB"}
    colours = {pane.label: index for index, pane in enumerate(panes)}
    return Curve(title, series, colours) if series else None


@dataclass(frozen=True)
class Picture:
    """A picture that stands still.

    Args:
        caption: Caption above it.
        png: Content of its file.
        note: Paragraph below it, or "".
    """

    caption: str
    png: bytes
    note: str = ""

    @property
    def uri(self) -> str:
        """Data URI of the file as it is."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Args:
        caption: Caption above it.
        headings: Headings, of the rows' names first.
        rows: Cells of each row, its name first.
        notes: Paragraphs below it.
        texts: Number of the last columns that hold texts and no figures.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: int = 0


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: Heading of the part.
        lines: Names and texts below the heading, such as prompts.
        player: Videos, or None.
        pictures: Pictures below the videos.
        tables: Tables of figures.
        details: Groups of names and values, by the heading of the group, by a heading above
            them: settings and provenance.
    """

    title: str
    lines: Sequence[tuple[str, str]] = ()
    player: Player | None = None
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    details: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Args:
        kind: What it is a report of: a comparison, an edit, ...
        title: Title of the page.
        facts: Short facts below the title.
        note: What the figures and pictures are worth, where the weights are random; or "".
        sections: Parts of the page.
    """

    kind: str
    title: str
    facts: Sequence[str]
    note: str
    sections: Sequence[Section]


def write_report(report: Report, path: Path) -> None:
    """Write a report's page, whole or not at all.

    Args:
        report: Report to write.
        path: File to write; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(report).encode())


def page(report: Report) -> str:
    """A report's page as HTML; all its texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(report=report, version=__version__)
