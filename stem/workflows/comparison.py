"""Several inversions of one video, side by side: figures, a contact sheet and a video."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..control import Control
from ..distributed import Ranks
from ..inversion import InversionFolder
from ..names import INVERSIONS
from ..report.files import comparison_files, comparison_is_whole, write_comparison
from ..report.rows import Row
from ..storage import check_output, remove_stale
from ..video import Video
from .measuring import measure


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, and the files it wrote.

    Args:
        rows: Figures, "vae" first, then one row a method.
        json: Path of the figures' file.
        sheet: Path of the contact sheet.
        video: Path of the video of all methods at once.
    """

    rows: list[Row]
    json: Path
    sheet: Path
    video: Path


def compare(
    pipeline: Any,
    video: Video,
    prompt: str,
    out: str | Path,
    methods: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    num_steps: int = 50,
    chunk: int | str | None = "auto",
    model: str | Mapping[str, Any] = "",
    control: Control | Sequence[Control] | None = None,
    note: str = "",
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Comparison:
    """Invert and reconstruct a video by each method, and write compare.json, .png and .mp4.

    Args:
        pipeline: Pipeline, as for `invert`.
        video: Video to invert.
        prompt: Prompt that describes it.
        out: Folder below which the three files get a folder of their own. Its name depends on the
            video and on everything else that the inversions depend on, so that other results are
            not overwritten. The inversions go to `out`/inversions and are reused.
        methods: Names of METHODS.
        options: Fields of the methods' configurations, by method.
        num_steps: Number of steps of each inversion and reconstruction.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
        model: Name of the pipeline, for the record, or more, as for `invert`.
        control: What the pipeline's ControlNets are shown, as for `invert`.
        note: Note that the weights are random, for compare.json; the pictures then say so, too.
        group: Process group whose ranks share the chunks; all ranks make this call.
        progress: Whether to show progress.

    Raises:
        TypeError: `video`, `prompt` or `methods` is of another type.
        ValueError: a method or option is unknown, the frames are too small for SSIM, or the
            pipeline or number of steps cannot be inverted. It is raised before anything is
            computed.
        OSError: `out` cannot be written.
    """
    if not isinstance(video, Video):
        raise TypeError(f"video is {video!r}; pass a Video, such as read_video gives")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is {prompt!r}; pass one text, for the whole video")
    out, options = Path(out), options or {}
    check_output(out / INVERSIONS)
    measured = measure(
        pipeline,
        video,
        prompt,
        out / INVERSIONS,
        methods,
        options=options,
        num_steps=num_steps,
        chunk=chunk,
        model=model,
        control=control,
        group=group,
        progress=progress,
    )
    inversions = [Path(row.inversion).name for row in measured.rows if row.inversion]
    folder = out / result_name(video.name, inversions)
    files = comparison_files(folder)
    if not Ranks(group).main:
        return Comparison(measured.rows, *files)
    remove_stale(folder)
    # Where all was reused, these results are of an earlier run, which took the time.
    if measured.worked or not comparison_is_whole(folder):
        settings = {
            "note": note,
            "model": model,
            "prompt": prompt,
            "num_steps": num_steps,
            "options": {method: dict(options.get(method, {})) for method in methods},
            "inversions": {
                row.method: InversionFolder.open(row.inversion).settings
                for row in measured.rows
                if row.inversion
            },
        }
        write_comparison(folder, measured, video, settings)
    return Comparison(measured.rows, *files)


def result_name(name: str, parts: Sequence[str]) -> str:
    """A name for results that no other results have.

    Args:
        name: Name of the video, to be recognized by; it may be empty.
        parts: Names that settle what the results are of. An inversion's is one: frames, prompt,
            weights and every setting are in its hash.

    Returns:
        The name, as a file system takes it, and ten digits of a hash over the parts.
    """
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
    readable = re.sub(r"[^\w.-]+", "-", name)[:48].strip(".-") or "video"
    return f"{readable}-{digest}"
