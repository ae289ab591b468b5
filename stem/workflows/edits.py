"""Edits of one inversion by several prompts and methods, as files a person can look at."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stem_kernels.info import provenance

from ..diffusion.pipeline import (
    VAE_FRAMES,
    decode_latents,
    decoded_in_turns,
    execution_device,
)
from ..distributed import Ranks
from ..editing import Edit, edited_parts, run_edit, run_zoomed_edit
from ..editing.pasting import edited_frames
from ..editing.run import Preview
from ..inversion import InversionFolder, reconstruct_latents
from ..inversion.records import check_same_size
from ..names import WINDOWS
from ..report.edit_files import EditFiles, EditsFiles, mask_pictures
from ..report.files import psnr_by_frame
from ..report.pictures import shown_frames
from ..storage import remove_stale
from ..video import Video, VideoFile
from .comparison import result_name
from .edit_plan import EditPlan

logger = logging.getLogger("stem")

THROUGH_VAE, BACK = "source, through the VAE", "reconstruction"
"""Labels of what sheets show beside the edits."""
_EXACT = "exact answer"


@dataclass(frozen=True)
class EditResult:
    """One edit and its files.

    Args:
        prompt: Prompt of the edit.
        method: Name of its method.
        files: Paths of its files.
        reused: Whether they are of an earlier run.
    """

    prompt: str
    method: str
    files: EditFiles
    reused: bool


@dataclass(frozen=True)
class Edits:
    """What `write_edits` wrote.

    Args:
        results: Edits, by prompt, then by method.
        files: Paths of the files of all edits together; None where there is one edit.
    """

    results: list[EditResult]
    files: EditsFiles | None


def write_edits(
    pipeline: Any,
    inversion: InversionFolder,
    plan: EditPlan,
    out: str | Path,
    *,
    video: Video | VideoFile | None = None,
    exact: torch.Tensor | None = None,
    note: str = "",
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Edits:
    """Edit an inversion by every prompt and method, and write a video and a sheet of each.

    Files that are there and whole are of equal settings, versions included, and are reused. Only
    the frames shown are held as pixels: any length of video can be edited that can be inverted.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to edit, complete.
        plan: Prompts, methods and their options.
        out: Folder below which every edit gets one of its own, named by what shaped it.
        video: Video that was inverted, for the sheets; None: they show what the VAE makes of the
            inversion's own latents.
        exact: Exact answer to the edit, where it is known: uint8 [N, H, W, 3], shown in place of
            the reconstruction.
        note: Note for the documents, where the weights are random.
        group: Process group whose ranks share the frames; all ranks make this call. Its first
            rank alone reads and writes files.
        progress: Whether to show progress.

    Raises:
        ValueError: settings that do not fit the inversion, or a video or an answer of another
            shape; before anything is computed.
        InversionError: an inversion that is incomplete or was made with another model.
        OSError: `out` cannot be written.
    """
    out, ranks = Path(out), Ranks(group)
    results, together, complete = ranks.from_main(
        partial(_planned, pipeline, inversion, plan, out, exact, has_video=video is not None)
    )
    beside = _Beside(pipeline, inversion, video, exact, group, progress)
    suffix = ", random weights" if note else ""
    lines: dict[str, torch.Tensor] = {}

    def write(result: EditResult, edit: Edit, clock: Clock) -> None:
        label = " ".join(f"{result.method}{suffix}: {result.prompt}".split())
        lines[label] = beside.shown(edit)
        if result.reused:
            return
        own = {**beside.lines, label: lines[label], **beside.masks(edit)}
        remove_stale(result.files.folder)
        result.files.write(
            result.method,
            beside.videos(edit, result.method),
            beside.fps,
            own,
            beside.numbers,
            {**edit_document(inversion, result, edit, clock, note), **beside.figures(edit)},
        )

    def look(result: EditResult, done: int, total: int, clean: torch.Tensor) -> None:
        label = f"{result.method}, predicted after {done} of {total} steps"
        lines = {**beside.source, label: decode_latents(pipeline, clean)}
        result.files.write_preview(lines, beside.numbers)
        logger.info("%s: after %d of %d steps", result.files.preview, done, total)

    for result in results:
        if result.reused and complete:
            continue
        clock = Clock()
        settings: dict[str, Any] = {
            **plan.arguments_with_control(result.method),
            "group": group,
            "progress": progress,
            "on_step": clock.step,
            "preview": Preview(beside.numbers, partial(look, result)),
        }
        if plan.zoom:
            settings.pop("method")
            edit = run_zoomed_edit(
                pipeline,
                inversion,
                result.prompt,
                out / WINDOWS,
                video=video,
                zoom_prompt=plan.zoom_prompt(result.prompt),
                zoom_source=plan.zoom_source,
                **settings,
            )
        else:
            edit = run_edit(pipeline, inversion, result.prompt, **settings)
        clock.stop(execution_device(pipeline))
        if exact is None:
            # By all ranks, before the first one alone writes it.
            _ = beside.reconstruction
        ranks.from_main(partial(write, result, edit, clock))

    def write_together() -> None:
        if together is not None and not complete:
            document = {"note": note, "edits": [str(result.files.json) for result in results]}
            together.write({**beside.lines, **lines}, beside.numbers, document)

    ranks.from_main(write_together)
    return Edits(results, together)


def _planned(
    pipeline: Any,
    inversion: InversionFolder,
    plan: EditPlan,
    out: Path,
    exact: torch.Tensor | None,
    *,
    has_video: bool,
) -> tuple[list[EditResult], EditsFiles | None, bool]:
    """Every edit, the files of all together, and whether these are whole or not wanted."""
    plan.check(inversion, out)
    plan.check_pipeline(pipeline)
    shaped = {
        (prompt, method): plan.shaped_by(inversion, prompt, method, exact, has_video=has_video)
        for prompt in plan.prompts
        for method in plan.methods
    }
    return planned_files(out, shaped)


def planned_files(
    out: Path, shaped: Mapping[tuple[str, str], str]
) -> tuple[list[EditResult], EditsFiles | None, bool]:
    """Every edit, the files of all together, and whether these are whole or not wanted.

    Args:
        out: Folder below which every edit has one of its own.
        shaped: What shapes an edit's files, by prompt and method.
    """
    results = []
    for (prompt, method), text in shaped.items():
        files = EditFiles(out / result_name(f"{method}-{prompt}", [text]))
        results.append(EditResult(prompt, method, files, files.whole))
    together = None
    if len(results) > 1:
        names = [result.files.folder.name for result in results]
        together = EditsFiles(out / result_name("edits", names))
    return results, together, together is None or together.whole


class _Beside:
    """What the sheets show beside the edits; each line is made when it is first asked for."""

    def __init__(
        self,
        pipeline: Any,
        inversion: InversionFolder,
        video: Video | VideoFile | None,
        exact: torch.Tensor | None,
        group: dist.ProcessGroup | None,
        progress: bool,
    ) -> None:
        about = inversion.settings["video"]
        self.fps = Fraction(about["fps"])
        self.numbers = shown_frames(about["num_frames"])
        self._size = about["height"], about["width"]
        self._pipeline, self._inversion, self._progress = pipeline, inversion, progress
        self._video, self._exact, self._group = video, exact, group
        shape = (about["num_frames"], *self._size)
        if video is not None:
            check_same_size(video, about)
        if exact is not None and (exact.dtype != torch.uint8 or exact.shape != (*shape, 3)):
            raise ValueError(
                f"exact is {exact.dtype} {list(exact.shape)}; it must be uint8 {[*shape, 3]}"
            )

    def shown(self, edit: Edit) -> torch.Tensor:
        """The frames of an edit that its sheet shows, uint8 [k, H, W, 3]."""
        (source,) = self.source.values()
        chosen = edit.of_frames(self.numbers)
        return edited_frames(self._pipeline, self._inversion, chosen, source)

    @functools.cached_property
    def source(self) -> dict[str, torch.Tensor]:
        """Frames of the source by its label, uint8 [k, H, W, 3]."""
        if self._video is not None:
            return {"source": _picked(self._video.parts(VAE_FRAMES), self.numbers)}
        x0 = self._inversion.x0()[self.numbers]
        return {THROUGH_VAE: decode_latents(self._pipeline, x0)}

    @functools.cached_property
    def lines(self) -> dict[str, torch.Tensor]:
        """Frames by label, uint8 [k, H, W, 3]."""
        lines = dict(self.source)
        if self._exact is not None:
            lines[_EXACT] = self._exact[self.numbers].cpu()
        else:
            lines[BACK] = decode_latents(self._pipeline, self.reconstruction[self.numbers])
        return lines

    def videos(self, edit: Edit, method: str) -> dict[str, Iterable[torch.Tensor]]:
        """All frames of what an edit's sheet shows some of, by label, uint8 [H, W, 3]."""
        source, below = self._source_parts(), None
        if edit.pasted:
            source, below = itertools.tee(source)
        (label,) = self.source
        videos: dict[str, Iterable[torch.Tensor]] = {label: _frames(source)}
        if self._exact is not None:
            videos[_EXACT] = self._exact.cpu()
        else:
            videos[BACK] = _frames(decoded_in_turns(self._pipeline, self.reconstruction))
        videos[method] = _frames(edited_parts(self._pipeline, self._inversion, edit, below))
        if edit.masks is not None:
            cores = edit.masks if edit.cores is None else edit.cores
            parts = zip(edit.masks.split(VAE_FRAMES), cores.split(VAE_FRAMES), strict=True)
            videos["mask"] = _frames(mask_pictures(*part, *self._size) for part in parts)
        return videos

    def _source_parts(self) -> Iterator[torch.Tensor]:
        """The frames that `source` has some of, in parts [n, H, W, 3], uint8."""
        if self._video is not None:
            return iter(self._video.parts(VAE_FRAMES))
        return decoded_in_turns(self._pipeline, self._inversion.x0())

    @functools.cached_property
    def reconstruction(self) -> torch.Tensor:
        """The reconstruction's latents [N, c, h, w]; all ranks ask for them first."""
        return reconstruct_latents(
            self._pipeline, self._inversion, group=self._group, progress=self._progress
        )

    def figures(self, edit: Edit) -> dict[str, Any]:
        """Figures of an edit by frame, and PSNR in dB to the exact answer, where that is known."""
        found: dict[str, Any] = {}
        if edit.masks is not None:
            found["share_by_frame"] = edit.masks.float().mean((1, 2)).tolist()
        if self._exact is not None:
            parts = edited_parts(self._pipeline, self._inversion, edit, self._source_parts())
            by_frame = psnr_by_frame(torch.cat(list(parts)), self._exact.cpu())
            found["psnr_to_exact"] = sum(by_frame) / len(by_frame)
            found["psnr_to_exact_by_frame"] = by_frame
        return found

    def masks(self, edit: Edit) -> dict[str, torch.Tensor]:
        """The line of an edit's masks; none where it has none."""
        if edit.masks is None:
            return {}
        cores = None if edit.cores is None else edit.cores[self.numbers]
        pictures = mask_pictures(edit.masks[self.numbers], cores, *self._size)
        return {"where it may change the video": pictures}


def _frames(parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    return itertools.chain.from_iterable(parts)


def _picked(parts: Iterable[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """The frames of some numbers, ascending, out of a video in parts: uint8 [k, H, W, 3]."""
    found, first = [], 0
    for part in parts:
        found += [part[n - first] for n in numbers if first <= n < first + part.shape[0]]
        first += part.shape[0]
    return torch.stack(found)


class Clock:
    """Seconds of an edit, and how many steps were done in them.

    Attributes:
        steps: Number of steps done.
        seconds: Seconds from the making of this object to `stop`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._start = time.perf_counter()

    def step(self) -> None:
        """Count one more step."""
        self.steps += 1

    def stop(self, device: torch.device) -> None:
        """Note the seconds, once the device has done its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - self._start


def edit_document(
    inversion: InversionFolder, result: EditResult, edit: Edit, clock: Clock, note: str
) -> dict[str, Any]:
    """What an edit's document says of it, as JSON types.

    Args:
        inversion: Inversion that was edited.
        result: Edit and its files.
        edit: Edit.
        clock: Clock that ran meanwhile.
        note: Note, where the weights are random.
    """
    where = provenance("diffusers")
    del where["commit"]
    return {
        "note": note,
        "method": result.method,
        "prompt": result.prompt,
        "inversion": str(inversion.path),
        "source_prompt": inversion.settings["prompt"],
        "inversion_settings": inversion.settings,
        "settings": edit.settings,
        "pivots": None if edit.pivots is None else edit.pivots.tolist(),
        "share_that_may_change": None if edit.masks is None else float(edit.masks.float().mean()),
        "durations": {
            "edit_seconds": clock.seconds,
            "steps_done_in_them": clock.steps,
        },
        "provenance": where,
    }
