"""An edit by bases made once more with all-frame attention, for the two to be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..control import Control
from ..inversion import InversionFolder, invert
from ..inversion.methods import inversion_attention
from ..inversion.records import frames_sha256
from ..inversion.runs import check_same_pipeline
from ..names import INVERSIONS
from ..report.edit_files import EditFiles
from ..video import Video, VideoFile, read_pictures, read_video
from .edit_plan import EditPlan
from .edits import EditResult, write_edits

_WITH_BASES, _DENSE = "stem", "inflated"  # methods of inversions
DENSE = "dense"
"""Folder of edits that are made once more, beside the edits themselves."""
_NEEDED = "--against dense (dense_edit) makes an edit of `stem edit` again"


@dataclass(frozen=True)
class RecordedEdit:
    """An edit of `stem edit`, and the inversion that it was made of; made by `open_edit`.

    Args:
        files: Files of the edit.
        document: Content of its edit.json.
        inversion: Inversion, by STEM.
    """

    files: EditFiles
    document: Mapping[str, Any]
    inversion: InversionFolder

    def check_source(self, source: Video | VideoFile) -> None:
        """Raise ValueError where a video is not the one that was inverted."""
        if frames_sha256(source) != self.inversion.settings["video"]["frames_sha256"]:
            about = self.inversion.settings["video"]
            raise ValueError(
                f"the source's frames are not those that {self.inversion.path} was made of "
                f"({about['num_frames']} of {about['width']}x{about['height']}); give the video "
                "and the --frames, --size, --deinterlace and --tone-map of the edit"
            )


def open_edit(path: str | Path) -> RecordedEdit:
    """The edit in a folder that `stem edit` wrote.

    Args:
        path: The folder, or the edit.mp4 in it.

    Raises:
        ValueError: no such edit, one whose files have changed, or one of an inversion without
            bases.
        InversionError: its inversion is gone, or damaged.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if folder.name in ("", ".."):  # it has no parent by its name
        path, folder = (Path(os.path.abspath(each)) for each in (path, folder))
    files = EditFiles(folder)
    if not files.json.is_file() or path not in (folder, files.video):
        raise ValueError(
            f"{path} is no edit.mp4 beside an edit.json; {_NEEDED}. Another video is compared by "
            "--against FILE"
        )
    if not files.whole:
        raise ValueError(
            f"the files in {folder} are not those that its edit.json tells of; {_NEEDED}. Run "
            "`stem edit` again"
        )
    document = json.loads(files.json.read_bytes())
    recorded = Path(document["inversion"])
    beside = folder.parent / INVERSIONS / recorded.name
    moved = beside.is_dir() and not recorded.is_dir()
    inversion = InversionFolder.open(beside if moved else recorded)
    method = inversion.settings["method"]
    if method != _WITH_BASES:
        raise ValueError(
            f"{folder} was made of an inversion by {method}, which has no bases; {_NEEDED} where "
            f"that was made of one by {_WITH_BASES}"
        )
    return RecordedEdit(files, document, inversion)


def dense_edit(
    pipeline: Any,
    edit: RecordedEdit | str | Path,
    source: Video | VideoFile,
    *,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> EditResult:
    """Make an edit once more with attention of every frame to all frames in the place of bases.

    The source is inverted by the method "inflated" with the prompt, the steps, the chunk and the
    control of the edit's inversion, and edited with all settings of the edit. Beside the edit's
    folder, the new files lie in `dense` and the inversion in `inversions`; what is there already
    is continued or reused.

    Args:
        pipeline: Pipeline that the edit was made with.
        edit: Folder that `stem edit` wrote, or the edit.mp4 in it, or what `open_edit` gave.
        source: Video that was inverted.
        group: Process group whose ranks share the frames; all ranks make this call.
        progress: Whether to show progress.

    Returns:
        The files of the new edit.

    Raises:
        ValueError: as `open_edit`; another source; control pictures of the edit that are gone.
        InversionError: the inversion is gone, or was made with another pipeline.
    """
    made = edit if isinstance(edit, RecordedEdit) else open_edit(edit)
    made.check_source(source)
    if made.document["settings"].get("zoom"):
        raise ValueError(
            f"{made.files.folder} was edited in a window (zoom), which another attention would "
            "place elsewhere; edit without a zoom to compare"
        )
    check_same_pipeline(pipeline, made.inversion)
    of_source, settings = made.inversion.settings, made.document["settings"]
    out = made.files.folder.parent
    plan = EditPlan(
        [settings["prompt"]],
        [settings["method"]],
        {settings["method"]: settings["options"]},
        settings["negative_prompt"],
        settings["guidance"],
        settings["seed"],
        _control(made),
    )
    inversion = invert(
        pipeline,
        source,
        of_source["prompt"],
        out / INVERSIONS,
        method=_DENSE,
        num_steps=of_source["num_steps"],
        chunk=of_source["attention"]["chunk"],
        cuts=inversion_attention(made.inversion).cuts,
        model=made.inversion.model_source.record(),
        control=made.inversion.control(),
        group=group,
        progress=progress,
    )
    note = made.document["note"]
    edits = write_edits(
        pipeline,
        inversion,
        plan,
        out / DENSE,
        video=source,
        note=note,
        group=group,
        progress=progress,
    )
    return edits.results[0]


def _control(made: RecordedEdit) -> list[Control] | None:
    """What the edit's ControlNets were shown; None: the same as in the inversion."""
    records = made.document["settings"].get("control")
    if records is None:
        return None
    about = made.inversion.settings["video"]
    kept = {each.record()["pictures_sha256"]: each.pictures for each in made.inversion.control()}
    found = []
    for record in records:
        pictures = kept.get(record["pictures_sha256"])
        if pictures is None and Path(record["source"]).exists():
            read = read_pictures if Path(record["source"]).is_dir() else read_video
            size = (about["width"], about["height"])
            pictures = read(record["source"], size=size, multiple_of=1).frames
        if pictures is None or Control.of(record, pictures).record() != record:
            raise ValueError(
                f"the edit's control pictures {record['source']!r} are gone, or have changed; "
                "put them back"
            )
        found.append(Control.of(record, pictures))
    return found
