"""The documents that a report is made of: found, checked, read."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .edit_files import EditFiles, EditsFiles
from .files import comparison_files, comparison_is_whole

COMPARISON, EDIT, EDITS, DEMO = "compare.json", "edit.json", "edits.json", "demo-*.json"
_SHOWN = 5  # folders that an error names


class ReportError(ValueError):
    """A folder that no report can be made of."""


@dataclass(frozen=True)
class Document:
    """A document of results.

    Args:
        path: File that it was read from.
        root: Folder of everything that its run wrote, the command's --out.
        content: Content, as JSON types.
    """

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
    """The document of what `stem compare`, `stem edit` or `stem demo` wrote into a folder.

    Args:
        folder: Folder, or the document itself.

    Raises:
        OSError: there is no such folder.
        ReportError: it holds no document, or several.
    """
    if folder.is_file():
        if any(folder.match(name) for name in (COMPARISON, EDIT, EDITS, DEMO)):
            return folder
        raise ReportError(
            f"{folder} is none of {COMPARISON}, {EDIT}, {EDITS} and {DEMO}; name one of these, or "
            "the folder that holds it"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR,
            f"{folder} is no folder; name one that stem compare, stem edit or stem demo wrote",
        )
    found = [folder / name for name in (COMPARISON, EDIT, EDITS) if (folder / name).is_file()]
    found = found or sorted(folder.glob(DEMO))
    if len(found) > 1:
        raise ReportError(f"{folder} holds several runs; name one of {_listed(found)}")
    if not found:
        names = (COMPARISON, EDIT, EDITS)
        below = {path.parent for name in names for path in folder.glob(f"*/{name}")}
        advice = (
            f"name one of the folders in it, {_listed(sorted(below))}"
            if below
            else "name a folder that stem compare, stem edit or stem demo wrote"
        )
        raise ReportError(f"{folder} holds no {COMPARISON}, {EDIT}, {EDITS} or {DEMO}; {advice}")
    return found[0]


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more


def read_document(path: Path) -> Document:
    """A document and where its run lies, once the files that it tells of are as it says.

    Raises:
        ReportError: one of them is missing or damaged.
    """
    folder = path.parent
    root = folder if path.match(DEMO) else folder.parent
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ReportError(f"{path} is missing; run the command again that wrote it") from error
    except ValueError as error:
        raise ReportError(f"{path} is damaged; run the command again that wrote it") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} is damaged; run the command again that wrote it")
    edit, edits = EditFiles(folder), EditsFiles(folder)
    told, whole = {
        COMPARISON: (comparison_files(folder), comparison_is_whole(folder)),
        EDIT: ((edit.video, edit.beside, edit.sheet), edit.whole),
        EDITS: ((edits.sheet,), edits.whole),
    }.get(path.name, ((), True))
    missing = [file.name for file in told if not file.is_file()]
    if missing:
        raise ReportError(
            f"{folder} holds {path.name}, but not {', '.join(missing)}; run the command again that "
            "wrote it"
        )
    if not whole:
        raise ReportError(
            f"the files beside {path} are not those that it was written with; run the command "
            "again that wrote them"
        )
    return Document(path, root, content)


def number(value: Any) -> float:
    """A number of a document: JSON has no infinity, so inf and nan are texts, and nan is null."""
    return math.nan if value is None else float(value)
