"""The commands that look after inversions on disk: `stem list`, `verify` and `clean`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from ..inversion import InversionError, InversionFolder
from ..storage import remove_stale
from .app import app, say

_DAMAGED = 1  # exit status
_IDLE_SECONDS = 3600

Root = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="An inversion's folder, or one above several.")
]


@app.command("list")
def list_command(root: Root = Path("out")) -> None:
    """The inversions below a folder: method, prompt, frames, steps done, size on disk."""
    folders = _folders(root)
    for path in folders:
        say(str(path))
        try:
            inversion = InversionFolder.open(path)
        except InversionError as error:
            say(f"  damaged: {error}")
            continue
        settings, video = inversion.settings, inversion.settings["video"]
        say(
            f"  {settings['method']}, {inversion.steps_done} of {len(inversion.timesteps)} steps, "
            f"{video['num_frames']} frames of {video['width']}x{video['height']}, "
            f"{_shown_size(_size(path))}, prompt {settings['prompt']!r}"
        )
    say(f"inversions: {len(folders)}, {_shown_size(sum(_size(path) for path in folders))}")


@app.command("verify")
def verify_command(root: Root) -> None:
    """Read every file of the inversions there against its checksum; exit with 1 if one is bad.

    Those of reconstructions and edits that start from an inversion are read, too.
    """
    damaged = False
    for path in _folders(root):
        try:
            inversion = InversionFolder.open(path)
            problems = inversion.verify(to_come=False)
        except InversionError as error:
            inversion, problems = None, [str(error)]
        damaged = damaged or bool(problems)
        for problem in problems:
            say(f"damaged: {problem}")
        if inversion is not None and not inversion.complete:
            done, total = inversion.steps_done, len(inversion.timesteps)
            say(f"unfinished: {path} has {done} of {total} steps")
        elif not problems:
            say(f"whole: {path}")
    if damaged:
        say("mend them: run the commands again that made them; they keep what is whole")
        raise typer.Exit(_DAMAGED)


@app.command("clean")
def clean_command(
    root: Root,
    incomplete: Annotated[
        bool,
        typer.Option(
            "--incomplete",
            help="Remove unfinished inversions, too. One that changed within the last hour stays "
            "unless FOLDER is its own.",
        ),
    ] = False,
) -> None:
    """Remove what killed runs left half written; complete inversions always stay."""
    removed = remove_stale(_existing(root))
    for path in _folders(root) if incomplete else []:
        try:
            inversion = InversionFolder.open(path)
        except InversionError as error:
            say(f"stays, for it is damaged: {error}")
            continue
        if inversion.complete:
            continue
        if path != root and time.time() - _last_change(path) < _IDLE_SECONDS:
            say(f"stays, for a run may be at it: {path}")
            continue
        removed.append((path, _size(path)))
        shutil.rmtree(path)
    for path, size in removed:
        say(f"removed: {path}, {size:,} bytes")
    say(f"freed: {sum(size for _, size in removed):,} bytes")


def _folders(root: Path) -> list[Path]:
    """Folders of inversions at or below `root`, those that lost their settings, too."""
    # Others write a settings.json, too: an inversion's has its steps beside it.
    found = {path for path in InversionFolder.find(_existing(root)) if (path / "steps").is_dir()}
    return sorted(found | {file.parent for file in root.rglob("x0.safetensors")})


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder; name an inversion's, or one above several")
    return root


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _last_change(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path, *path.rglob("*")))


def _shown_size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
