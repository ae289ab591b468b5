"""What a report shows of the results in a folder; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..documents import (
    ABLATION,
    ANALYSIS,
    COMPARISON,
    DEMO,
    EDIT,
    EDITS,
    Document,
    ReportError,
    find_document,
    read_document,
)
from .ablation import ablation_report
from .analysis import analysis_report
from .comparison import comparison_report
from .demo import demo_report
from .edits import edits_report
from .page import Report

_REPORTS: dict[str, Callable[[Document], Report]] = {
    COMPARISON: comparison_report,
    EDIT: edits_report,
    EDITS: edits_report,
    DEMO: demo_report,
    ANALYSIS: analysis_report,
    ABLATION: ablation_report,
}


def read_report(folder: Path, *others: Path) -> Report:
    """The report of what one of `names.REPORTED` wrote.

    Args:
        folder: Folder that holds a document, one of `documents.KINDS`; or the document in it.
        others: More of them, of edits of the same video, which are shown side by side.

    Raises:
        OSError: there is no such folder.
        ReportError: it holds no document, or several, or is incomplete, damaged or of another
            version of this package; or there are others, and they are no edits of one video.
    """
    documents = [read_document(find_document(each)) for each in (folder, *others)]
    kinds = {document.kind for document in documents}
    if others and not kinds <= {EDIT, EDITS}:
        named = ", ".join(str(document.path) for document in documents)
        raise ReportError(f"only edits are shown side by side, and these are {named}; name one")
    try:
        if others:
            return edits_report(*documents)
        return _REPORTS[documents[0].kind](documents[0])
    except KeyError as error:
        named = " or ".join(str(document.path) for document in documents)
        raise ReportError(
            f"{named}, or a document that it names, has no {error}: another version wrote "
            "it; remove its folder and run the command again"
        ) from error
