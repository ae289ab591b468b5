"""What a benchmark's folder asks for, and where the edits lie in a folder of edits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIVE, IVEBENCH = "FiVE", "IVEBench"
FIVE_KINDS = {
    "1": "1 rigid object",
    "2": "2 other object",
    "3": "3 colour",
    "4": "4 material",
    "5": "5 addition",
    "6": "6 removal",
}
"""Kinds of FiVE's edits by editing_type_id."""
_WITHOUT_MOTION = ("subject_motion_editing", "camera_motion_editing")
_EFFECT = "event effect"
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Task:
    """One edit that a benchmark asks for.

    Args:
        name: Name of the edit.
        kind: Kind of the edit.
        source: Folder of pictures, or video file.
        masks: Folder of masks, named as the source's pictures; None: the benchmark has none.
        edit: Folder of pictures, or video file; None: it is not there.
        source_prompt: Prompt that describes the source.
        prompt: Prompt of the edit.
        keeps_motion: Whether the edit is to keep the source's motion.
    """

    name: str
    kind: str
    source: Path
    masks: Path | None
    edit: Path | None
    source_prompt: str
    prompt: str
    keeps_motion: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and the edits that it asks for.

    Args:
        name: FIVE or IVEBENCH.
        tasks: Edits, in the benchmark's order.
    """

    name: str
    tasks: tuple[Task, ...]


def read_benchmark(folder: Path, edits: Path) -> Benchmark:
    """What a benchmark's folder asks for, with the edits of it that are there.

    Args:
        folder: Folder of FiVE (it has edit_prompt/edit1_FiVE.json ...) or of IVEBench (it has one
            list in JSON with src_video_name).
        edits: Folder of the edits: VIDEO_NAME/SAVE_DIR/ of pictures, or VIDEO_NAME/SAVE_DIR.mp4,
            for FiVE; NAME/ of pictures, or NAME.mp4, for IVEBench. A folder may hold an edit.mp4
            in the place of pictures, as `stem edit` writes it.

    Raises:
        ValueError: a folder of neither, lists that cannot be read, or no edit at all.
        NotADirectoryError: one of the two is no folder.
    """
    for path in (folder, edits):
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is no folder; a benchmark takes two: its own, EDITS")
    lists = sorted((folder / "edit_prompt").glob("edit*_FiVE.json"))
    if lists:
        found = Benchmark(FIVE, _five(folder, lists, edits))
    else:
        found = Benchmark(IVEBENCH, _ivebench(folder, edits))
    if not any(task.edit for task in found.tasks):
        first = found.tasks[0].name if found.tasks else "NAME"
        raise ValueError(
            f"{edits} holds none of the {len(found.tasks)} edits of {found.name}; the first is "
            f"looked for at {edits / first}, a folder of pictures, and at {edits / first}.mp4"
        )
    return found


def _five(folder: Path, lists: list[Path], edits: Path) -> tuple[Task, ...]:
    for part in ("images", "bmasks"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}; unpack its {part}.zip there")
    tasks = []
    for file in lists:
        for item in _items(file):
            text = _texts(file, item, "video_name", "save_dir", "source_prompt", "target_prompt")
            video, save_dir, source_prompt, prompt = text
            (kind,) = _texts(file, item, "editing_type_id")
            tasks.append(
                Task(
                    f"{video}/{save_dir}",
                    FIVE_KINDS.get(kind, kind),
                    folder / "images" / video,
                    folder / "bmasks" / video,
                    _edit(edits / video / save_dir),
                    _plain(source_prompt),
                    _plain(prompt),
                )
            )
    return tuple(tasks)


def _ivebench(folder: Path, edits: Path) -> tuple[Task, ...]:
    # Parts of frame folders are not looked into: they hold thousands of pictures.
    found = [*folder.glob("*.json"), *folder.glob("*/*.json")]
    lists = sorted(file for file in found if _is_list_of_videos(file))
    if len(lists) != 1:
        named = ", ".join(str(file.relative_to(folder)) for file in lists)
        raise ValueError(
            f"{folder} holds neither edit_prompt/edit1_FiVE.json, as FiVE does, nor one list in "
            f"JSON with src_video_name, as IVEBench does ({named or 'there is none'})"
        )
    tasks = []
    for item in _items(lists[0]):
        keys = ("src_video_name", "source_prompt", "target_prompt")
        name, source_prompt, prompt = _texts(lists[0], item, *keys)
        kind = str(item.get("category") or "no category")
        name = Path(name).stem if Path(name).suffix.lower() in _VIDEOS else name
        tasks.append(
            Task(
                name,
                kind,
                _source(folder, name),
                None,
                _edit(edits / name),
                source_prompt,
                prompt,
                kind not in _WITHOUT_MOTION and item.get("subcategory") != _EFFECT,
            )
        )
    return tuple(tasks)


def _is_list_of_videos(file: Path) -> bool:
    try:
        items = json.loads(file.read_bytes())
    except ValueError:
        return False
    first = items[0] if isinstance(items, list) and items else None
    return isinstance(first, dict) and "src_video_name" in first


def _items(file: Path) -> list[Mapping[str, Any]]:
    try:
        items = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); fetch it again") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{file} is no list of edits; fetch it again")
    return items


def _texts(file: Path, item: Mapping[str, Any], *keys: str) -> list[str]:
    found = [item.get(key) for key in keys]
    for key, value in zip(keys, found, strict=True):
        if not isinstance(value, str | int) or value == "":
            raise ValueError(f"{file}: an edit's {key} is {value!r}; it must be a text")
    return [str(value) for value in found]


def _plain(prompt: str) -> str:
    """A prompt without the brackets that mark its changed words."""
    return prompt.replace("[", "").replace("]", "")


def _source(folder: Path, name: str) -> Path:
    """A source video in the folder or one level below; the first of them where there is none."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    candidates = [place / f"{name}{end}" for place in places for end in ("", ".mp4")]
    return next((path for path in candidates if path.exists()), candidates[0])


def _edit(path: Path) -> Path | None:
    """A folder of pictures or a video file of an edit; None where there is neither."""
    candidates = (path / "edit.mp4", path, path.with_name(f"{path.name}.mp4"))
    return next((found for found in candidates if found.exists()), None)
