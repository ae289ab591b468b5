"""The figures of `stem evaluate` in a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..documents import Document, ReportError, number
from .page import Table

EVALUATION = "evaluation.json"
"""Name under which `stem evaluate --json` leaves the figures of an edit in its folder."""


def evaluation_beside(edit: Document) -> Mapping[str, Any] | None:
    """The evaluation in an edit's folder; None where there is none.

    Raises:
        ReportError: it is damaged, or of another edit.
    """
    file = edit.path.parent / EVALUATION
    if not file.is_file():
        return None
    try:
        content: Mapping[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ReportError(f"{file} is damaged; run stem evaluate again") from error
    if content["prompt"] != edit["prompt"]:
        raise ReportError(
            f"{file} judges an edit to {content['prompt']!r}, and the one beside it is to "
            f"{edit['prompt']!r}; remove that file, or run stem evaluate on this edit"
        )
    return content


def evaluation_table(content: Mapping[str, Any], caption: str) -> Table:
    """A row for each metric, beside what it was measured by; what is missing is in the note.

    Args:
        content: `Evaluation` as JSON types.
        caption: Caption above the table.
    """
    rows, missing = [], dict[str, list[str]]()
    for figure in content["figures"]:
        arrow = "↑" if figure["higher_is_better"] else "↓"
        value = "missing" if figure["value"] is None else f"{number(figure['value']):.4g}"
        rows.append((f"{figure['metric']} {arrow}", value, figure["measured_by"]))
        if figure["value"] is None:
            reason = f"{figure['missing']}; {figure['remedy']}"
            missing.setdefault(reason, []).append(figure["metric"])
    notes = [f"Missing: {', '.join(names)}: {reason}" for reason, names in missing.items()]
    notes.insert(0, "↑: more is better; ↓: less is better.")
    return Table(caption, ["metric", "value", "measured by"], rows, notes, texts=1)
