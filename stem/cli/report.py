"""The command that shows results, `stem report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import REPORTED
from ..storage import check_output_file
from .app import app, say


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help=f"A folder that {REPORTED} wrote; or several of edits of one video, which are "
            "shown side by side.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="An HTML file. Default: report.html in the (first) folder.")
    ] = None,
) -> None:
    """One HTML page of results: videos in step or pictures, figures, settings, provenance.

    It needs no other file and no network; nothing is computed again.
    """
    from ..report.pages.contents import read_report
    from ..report.pages.page import write_report

    folder, *others = folders
    path = out or (folder.parent if folder.is_file() else folder) / "report.html"
    check_output_file(path)
    found = read_report(folder, *others)
    write_report(found, path)
    say(f"{path}, {path.stat().st_size / 2**20:.1f} MiB")
