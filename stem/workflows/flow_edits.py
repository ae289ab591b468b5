"""Edits of one video through a video transformer by several prompts, as files to look at."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..diffusion.pipeline import VAE_FRAMES
from ..editing import run_flow_edit
from ..editing.checks import check_numbers
from ..editing.flowedit import METHOD, check_flow_edit, flow_edit_options
from ..flow import VelocityModel
from ..inversion import InversionFolder, reconstruct_video
from ..inversion.records import check_same_size, versions
from ..names import FLOW_SOURCE
from ..report.pictures import shown_frames
from ..storage import check_output, remove_stale
from ..video import Video, VideoFile
from ..video.writing import most_bytes
from .edit_plan import check_prompts, check_texts
from .edits import (
    BACK,
    THROUGH_VAE,
    Clock,
    Edits,
    edit_document,
    planned_files,
)


@dataclass(frozen=True)
class FlowEditPlan:
    """What edits of one video by FlowEdit share; checked as far as that needs no source.

    Args:
        prompts: Prompts of the edits.
        options: Fields of `FlowEditOptions`.
        negative_prompt: Negative prompt of all edits.
        guidance: Guidance scale of the target; None: the method's own.
        seed: Seed of the noise.

    Raises:
        TypeError: prompts of another type.
        ValueError: no prompt or an empty one, one that comes twice, or an option that does not fit.
    """

    prompts: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str = ""
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_texts("prompts", self.prompts)
        check_prompts(self.prompts)
        flow_edit_options(self.options)
        check_numbers(self.guidance, self.seed)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `run_flow_edit` beside the prompt."""
        return {
            "negative_prompt": self.negative_prompt,
            "guidance": self.guidance,
            "seed": self.seed,
            "options": flow_edit_options(self.options),
        }

    def check_space(self, out: Path, num_frames: int, height: int, width: int) -> None:
        """Raise OSError if `out` cannot be written, or has no space for the videos."""
        check_output(out, len(self.prompts) * most_bytes(num_frames, height, width))

    def check(self, source: InversionFolder, out: Path, *, has_video: bool) -> None:
        """Raise before any work if one of the edits could not be made.

        Args:
            source: Source of the edits.
            out: Folder of everything written.
            has_video: Whether the video is there, to be shown beside the edits.

        Raises:
            TypeError, ValueError, OSError: with the reason.
        """
        for prompt in self.prompts:
            check_flow_edit(source, prompt, **self.arguments)
        if not has_video and source.settings["method"] == FLOW_SOURCE:
            raise ValueError(
                f"{source.path} holds no inversion to show beside the edit; name the video that it "
                "is of (stem edit VIDEO --method flowedit)"
            )
        video = source.settings["video"]
        self.check_space(out, video["num_frames"], video["height"], video["width"])

    def shaped_by(self, source: InversionFolder, prompt: str) -> str:
        """Everything that shapes an edit's files; of the source its name, which holds the rest.

        Args:
            source: Source of the edits.
            prompt: Prompt of the edit.
        """
        shaped = {
            "inversion": source.path.resolve().name,
            "prompt": prompt,
            **self.arguments,
            "options": asdict(flow_edit_options(self.options)),
            "versions": versions(),
        }
        return json.dumps(shaped, sort_keys=True)


def write_flow_edits(
    model: VelocityModel,
    source: InversionFolder,
    plan: FlowEditPlan,
    out: str | Path,
    *,
    video: Video | VideoFile | None = None,
    progress: bool = True,
) -> Edits:
    """Edit a video by every prompt, and write a video and a sheet of each, as `write_edits` does.

    Files that are there and whole are of equal settings, versions included, and are reused.

    Args:
        model: Model that the source was encoded with.
        source: What `stem.inversion.keep_source` kept, or an inversion by `invert_video`.
        plan: Prompts and options.
        out: Folder below which every edit gets one of its own, named by what shaped it.
        video: Video that is edited, which the sheets show beside what the VAE makes of it; None,
            with an inversion alone: they show its reconstruction.
        progress: Whether to show progress.

    Raises:
        ValueError: settings that do not fit the source, or no video where there is no inversion;
            before anything is computed.
        InversionError: a source that is incomplete or was made with another model.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    plan.check(source, out, has_video=video is not None)
    shaped = {(prompt, METHOD): plan.shaped_by(source, prompt) for prompt in plan.prompts}
    results, together, complete = planned_files(out, shaped)
    beside = _Beside(model, source, video, progress)
    lines: dict[str, torch.Tensor] = {}
    for result in results:
        if result.reused and complete:
            continue
        clock = Clock()
        edit = run_flow_edit(
            model,
            source,
            result.prompt,
            **plan.arguments,
            progress=progress,
            on_step=clock.step,
        )
        clock.stop(model.device)
        frames = model.decode(edit.latents)
        label = " ".join(f"{METHOD}: {result.prompt}".split())
        lines[label] = frames[beside.numbers]
        if result.reused:
            continue
        remove_stale(result.files.folder)
        result.files.write(
            METHOD,
            {**beside.videos, METHOD: frames},
            beside.fps,
            {**beside.lines, label: lines[label]},
            beside.numbers,
            edit_document(source, result, edit, clock, ""),
        )
    if together is not None and not complete:
        document = {"note": "", "edits": [str(result.files.json) for result in results]}
        together.write({**beside.lines, **lines}, beside.numbers, document)
    return Edits(results, together)


class _Beside:
    """What the sheets show beside the edits; made when it is first asked for."""

    def __init__(
        self,
        model: VelocityModel,
        source: InversionFolder,
        video: Video | VideoFile | None,
        progress: bool,
    ) -> None:
        about = source.settings["video"]
        self.fps = Fraction(about["fps"])
        self.numbers = shown_frames(about["num_frames"])
        self._model, self._source, self._video, self._progress = model, source, video, progress
        if video is not None:
            check_same_size(video, about, "source", "encoded")

    @functools.cached_property
    def videos(self) -> dict[str, torch.Tensor]:
        """All frames by label, uint8 [N, H, W, 3]."""
        through_vae = self._model.decode(self._source.x0())
        if self._video is not None:
            source = torch.cat(list(self._video.parts(VAE_FRAMES)))
            return {"source": source, THROUGH_VAE: through_vae}
        back = reconstruct_video(self._model, self._source, progress=self._progress)
        return {THROUGH_VAE: through_vae, BACK: back}

    @functools.cached_property
    def lines(self) -> dict[str, torch.Tensor]:
        """The frames shown by label, uint8 [k, H, W, 3]."""
        return {label: frames[self.numbers] for label, frames in self.videos.items()}
