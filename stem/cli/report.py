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
    folder: Annotated[Path, typer.Argument(help=f"A folder that {REPORTED} wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="An HTML file. Default: report.html in the folder.")
    ] = None,
) -> None:
    """One HTML page of results: videos in step or pictures, figures, settings, provenance.

    It needs no other file and no network; nothing is computed again.
    """
    from ..report.contents import read_report
    from ..report.page import write_report

    path = out or (folder.parent if folder.is_file() else folder) / "report.html"
    check_output_file(path)
    found = read_report(folder)
    write_report(found, path)
    say(f"{path}, {path.stat().st_size / 2**20:.1f} MiB")
