"""The files of edits: a video, a contact sheet and a document for each; a sheet of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..video import write_video, writing_video
from .files import are_whole, write_picture, write_with_hashes
from .pictures import labelled_lines, side_by_side

_RIM, _CORE = 128, 255  # gray values


@dataclass(frozen=True)
class EditFiles:
    """Where the files of one edit are.

    Args:
        folder: Folder of their own.
    """

    folder: Path

    @property
    def video(self) -> Path:
        """Path of the edited video."""
        return self.folder / "edit.mp4"

    @property
    def beside(self) -> Path:
        """Path of the video that shows the source, what is beside it, the edit, its masks."""
        return self.folder / "beside.mp4"

    @property
    def sheet(self) -> Path:
        """Path of the contact sheet of the same."""
        return self.folder / "sheet.png"

    @property
    def preview(self) -> Path:
        """Path of the sheet that is there while the edit runs."""
        return self.folder / "preview.png"

    @property
    def json(self) -> Path:
        """Path of the document with everything that shaped the edit."""
        return self.folder / "edit.json"

    @property
    def whole(self) -> bool:
        """Whether the files are there, and are those that were written together."""
        return are_whole(self.json, self.documented)

    @property
    def documented(self) -> tuple[Path, ...]:
        """Paths of the files that the document tells of."""
        return self.video, self.beside, self.sheet

    def write_preview(self, lines: Mapping[str, torch.Tensor], numbers: Sequence[int]) -> None:
        """Write a sheet of the lines, as `write` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_picture(self.preview, labelled_lines(lines, numbers))

    def write(
        self,
        edited: str,
        videos: Mapping[str, Iterable[torch.Tensor]],
        fps: Fraction,
        lines: Mapping[str, torch.Tensor],
        numbers: Sequence[int],
        document: Mapping[str, Any],
    ) -> None:
        """Write them, the document last, and remove the preview.

        Args:
            edited: Label of the edit among the videos.
            videos: Frames of the videos to show at once, by label, as for `side_by_side`; they are
                gone through once.
            fps: Frames per second.
            lines: Lines of the sheet by label, uint8 [k, H, W, 3].
            numbers: Numbers of the k frames shown.
            document: Document, as JSON types; the videos' labels are added as "beside".
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing_video(self.video, fps) as append:

            def appended() -> Iterator[torch.Tensor]:
                for frame in videos[edited]:
                    append(frame[None])
                    yield frame

            both = side_by_side({**videos, edited: appended()})
            write_video(self.beside, (frame[None] for frame in both), fps)
        write_picture(self.sheet, labelled_lines(lines, numbers))
        write_with_hashes(self.json, {**document, "beside": list(videos)}, self.documented)
        self.preview.unlink(missing_ok=True)


@dataclass(frozen=True)
class EditsFiles:
    """Where the files of several edits of one video are.

    Args:
        folder: Folder of their own.
    """

    folder: Path

    @property
    def sheet(self) -> Path:
        """Path of the contact sheet of all of them."""
        return self.folder / "edits.png"

    @property
    def json(self) -> Path:
        """Path of the document that names each of them."""
        return self.folder / "edits.json"

    @property
    def whole(self) -> bool:
        """Whether the files are there, and are those that were written together."""
        return are_whole(self.json, (self.sheet,))

    def write(
        self,
        lines: Mapping[str, torch.Tensor],
        numbers: Sequence[int],
        document: Mapping[str, Any],
    ) -> None:
        """Write them, as `EditFiles.write` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_picture(self.sheet, labelled_lines(lines, numbers))
        write_with_hashes(self.json, document, (self.sheet,))


def mask_pictures(
    masks: torch.Tensor, cores: torch.Tensor | None, height: int, width: int
) -> torch.Tensor:
    """Masks to look at: white where the edit may change the video, black where it may not.

    Args:
        masks: Masks, bool [k, h, w].
        cores: Masks before they were widened, bool [k, h, w]; what was added is gray then.
        height: Height of the pictures in pixels.
        width: Width of the pictures in pixels.

    Returns:
        uint8 [k, height, width, 3].
    """
    gray = masks.float() * _CORE
    if cores is not None:
        gray[masks & ~cores] = _RIM
    shown = torch.nn.functional.interpolate(gray[:, None], (height, width), mode="nearest")
    return shown.to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu()
