"""The documents that a report is made of: found, checked, read."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import REPORTED
from .ablation_files import ablation_files
from .analysis_files import analysis_files
from .edit_files import EditFiles, EditsFiles
from .files import are_whole, comparison_files

COMPARISON, EDIT, EDITS, DEMO = "compare.json", "edit.json", "edits.json", "demo-*.json"
ANALYSIS, ABLATION = "analysis.json", "ablation.json"
KINDS: dict[str, Callable[[Path], Sequence[Path]]] = {
    COMPARISON: lambda folder: comparison_files(folder)[1:],
    EDIT: lambda folder: EditFiles(folder).documented,
    EDITS: lambda folder: (EditsFiles(folder).sheet,),
    DEMO: lambda folder: (),
    ANALYSIS: lambda folder: analysis_files(folder)[1:],
    ABLATION: lambda folder: ablation_files(folder)[1:],
}
"""By the name of a kind of document, the files in its folder that it holds the hashes of."""
_SHOWN = 5  # folders that an error names


class ReportError(ValueError):
    """A folder that no report can be made of."""


@dataclass(frozen=True)
class Document:
    """A document of results.

    Args:
        kind: Name of its kind, a key of KINDS.
        path: File that it was read from.
        root: Folder of everything that its run wrote, the command's --out.
        content: Content, as JSON types.
    """

    kind: str
    path: Path
    root: Path
    content: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    def located(self, recorded: str) -> Path:
        """Where a file or folder lies now that lay two names below --out when it was recorded.

        Args:
            recorded: Path then; whoever moves --out as a whole keeps its last two names.
        """
        path = Path(recorded)
        moved = self.root / path.parent.name / path.name
        return moved if moved.exists() or not path.exists() else path


def find_document(folder: Path) -> Path:
    """The document of what one of REPORTED wrote into a folder.

    Args:
        folder: Folder, or the document itself.

    Raises:
        OSError: there is no such folder.
        ReportError: it holds no document, or several.
    """
    *others, last = KINDS
    names = ", ".join(others)
    if folder.is_file():
        if _kind_of(folder) is not None:
            return folder
        raise ReportError(
            f"{folder} is none of {names} and {last}; name one of these, or the folder that holds "
            "it"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{folder} is no folder; name one that {REPORTED} wrote"
        )
    found = _documents(folder)
    if len(found) > 1:
        raise ReportError(f"{folder} holds several runs; name one of {_listed(found)}")
    if not found:
        below = [inner for inner in sorted(folder.glob("*/")) if _documents(inner)]
        advice = (
            f"name one of the folders in it, {_listed(below)}"
            if below
            else f"name a folder that {REPORTED} wrote"
        )
        raise ReportError(f"{folder} holds no {names} or {last}; {advice}")
    return found[0]


def _documents(folder: Path) -> list[Path]:
    return [path for name in KINDS for path in sorted(folder.glob(name)) if path.is_file()]


def _kind_of(path: Path) -> str | None:
    return next((name for name in KINDS if path.match(name)), None)


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more


def read_document(path: Path) -> Document:
    """A document and where its run lies, once the files that it tells of are as it says.

    Raises:
        ReportError: one of them is missing or damaged.
    """
    folder, kind = path.parent, _kind_of(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ReportError(f"{path} is missing; run the command again that wrote it") from error
    except ValueError as error:
        raise ReportError(f"{path} is damaged; run the command again that wrote it") from error
    if kind is None or not isinstance(content, dict):
        raise ReportError(f"{path} is damaged; run the command again that wrote it")
    beside = KINDS[kind](folder)
    missing = [file.name for file in beside if not file.is_file()]
    if missing:
        raise ReportError(
            f"{folder} holds {path.name}, but not {', '.join(missing)}; run the command again that "
            "wrote it"
        )
    if beside and not are_whole(path, beside):
        raise ReportError(
            f"the files beside {path} are not those that it was written with; run the command "
            "again that wrote them"
        )
    # Absolute: "." and ".." have no parent by their names.
    whole = Path(os.path.abspath(folder))
    return Document(kind, path, whole if kind == DEMO else whole.parent, content)


def number(value: Any) -> float:
    """A number of a document: JSON has no infinity, so inf and nan are texts, and nan is null."""
    return math.nan if value is None else float(value)
