"""One edit of a benchmark judged: which frames, by which metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ...metrics import (
    Embedder,
    Lpips,
    Tracker,
    UnmeasuredError,
    bounding_box,
    clip_score,
    inside,
    matched_motion_fidelity,
    motion_fidelity,
    mse,
    outside,
    psnr,
    ssim,
)
from ...metrics.fidelity import SSIM_VARIANT
from ...video import VideoError
from ..figures import Figure, Sheet, attempt, given
from .folders import Task
from .frames import Frames, read_masks, resized

_FIVE_STRIDE, _FIVE_GRID, _IVEBENCH_GRID = 8, 55, 10


@dataclass(frozen=True)
class JudgedEdit:
    """The figures of one edit.

    Args:
        name: Name of the edit in the benchmark.
        kind: Kind of the edit.
        edit: Path of the edit.
        source_prompt: Prompt that describes the source.
        prompt: Prompt of the edit.
        num_frames: Number of the edit's frames.
        figures: Figures, of a benchmark always of the same metrics in the same order.
    """

    name: str
    kind: str
    edit: str
    source_prompt: str
    prompt: str
    num_frames: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class _Shot:
    """One frame of a source and of its edit, uint8 [1, H, W, 3]; its mask, bool [1, H, W]."""

    source: torch.Tensor
    edit: torch.Tensor
    mask: torch.Tensor | None
    source_text: torch.Tensor | UnmeasuredError
    text: torch.Tensor | UnmeasuredError

    @property
    def known_mask(self) -> torch.Tensor:
        """The mask of a benchmark that has masks."""
        assert self.mask is not None
        return self.mask


@dataclass(frozen=True)
class _Measure:
    """A metric of frames: what gives a frame's value, or None where the frame does not count."""

    metric: str
    measured_by: str
    compute: Callable[[_Shot], float | None]
    higher_is_better: bool = True


class Judge(ABC):
    """What judges the edits of one benchmark."""

    network: Literal["alex", "squeeze"]
    stride: int

    def __init__(
        self,
        clip: Embedder | UnmeasuredError,
        clip_name: str,
        lpips: Lpips | UnmeasuredError,
        tracker: Tracker | UnmeasuredError,
    ) -> None:
        self.clip, self.clip_name, self.lpips, self.tracker = clip, clip_name, lpips, tracker

    @property
    def tracker_name(self) -> str:
        return "CoTracker3" if isinstance(self.tracker, UnmeasuredError) else self.tracker.name

    def __call__(self, task: Task) -> JudgedEdit:
        """Judge an edit that is there.

        Raises:
            VideoError, OSError: it cannot be read, or does not fit its source.
        """
        assert task.edit is not None
        source, edit = Frames(task.source), Frames(task.edit)
        self.check_counts(source, edit)
        measures = self.measures()
        found: list[list[float] | UnmeasuredError] = [[] for _ in measures]
        for shot in self._shots(task, source, edit):
            for number, measure in enumerate(measures):
                values = found[number]
                if isinstance(values, UnmeasuredError):
                    continue
                value = attempt(partial(measure.compute, shot))
                if isinstance(value, UnmeasuredError):
                    found[number] = value
                elif value is not None:
                    values.append(value)
        sheet = Sheet()
        for measure, values in zip(measures, found, strict=True):
            sheet.add(
                measure.metric,
                measure.measured_by,
                partial(_mean, values),
                measure.higher_is_better,
            )
        self.add_motion(sheet, task, source, edit)
        return JudgedEdit(
            task.name,
            task.kind,
            str(task.edit),
            task.source_prompt,
            task.prompt,
            edit.num_frames,
            tuple(sheet.figures),
        )

    def _shots(self, task: Task, source: Frames, edit: Frames) -> Iterator[_Shot]:
        count = edit.num_frames
        texts = [attempt(partial(self._text, text)) for text in (task.source_prompt, task.prompt)]
        pairs = zip(source.every(self.stride, count), edit.every(self.stride, count), strict=True)
        masks = None
        if task.masks is not None:
            masks = read_masks(task.masks, source, self.stride, count)
        for before, after in pairs:
            mask = None if masks is None else next(masks)
            if mask is not None and mask.shape != before.shape[:2]:
                raise VideoError(
                    f"{task.masks}: a mask is {mask.shape[1]}x{mask.shape[0]} pixels, and the "
                    f"source {before.shape[1]}x{before.shape[0]}"
                )
            yield _Shot(
                before[None],
                resized(after, before)[None],
                None if mask is None else mask[None],
                texts[0],
                texts[1],
            )

    def _text(self, text: str) -> torch.Tensor:
        return given(self.clip).embed_texts([text])[0]

    def score(self, frames: torch.Tensor, text: torch.Tensor | UnmeasuredError) -> float:
        """The CLIP score of frames, uint8 [1, H, W, 3], and a text's embedding."""
        return clip_score(given(self.clip).embed_frames(frames), given(text))

    @abstractmethod
    def check_counts(self, source: Frames, edit: Frames) -> None:
        """Raise VideoError where the numbers of frames do not fit."""

    @abstractmethod
    def measures(self) -> list[_Measure]:
        """The metrics of frames, in the order of the figures."""

    @abstractmethod
    def add_motion(self, sheet: Sheet, task: Task, source: Frames, edit: Frames) -> None:
        """Add the metrics of motion."""


class FiveJudge(Judge):
    network: Literal["alex", "squeeze"] = "squeeze"
    stride = _FIVE_STRIDE

    def check_counts(self, source: Frames, edit: Frames) -> None:
        if edit.num_frames > source.num_frames:
            raise VideoError(_counts(edit, source, "FiVE takes at most as many"))

    def measures(self) -> list[_Measure]:
        every = f"every {_FIVE_STRIDE}th frame"
        masked = f"to the source, both black inside the mask, over all pixels; {every}"
        by_clip = f"{self.clip_name}; {every}"
        network = self.lpips.variant if isinstance(self.lpips, Lpips) else "SqueezeNet"

        return [
            _Measure("PSNR dB outside", masked, _outside(psnr)),
            _Measure(
                "LPIPS x1000 outside",
                f"{masked}; {network}",
                _outside(lambda ours, theirs: 1000 * given(self.lpips)(ours, theirs)),
                higher_is_better=False,
            ),
            _Measure(
                "MSE x10000 outside",
                masked,
                _outside(lambda ours, theirs: 10_000 * mse(ours, theirs)),
                higher_is_better=False,
            ),
            _Measure(
                "SSIM x100 outside",
                f"{masked}; SSIM: {SSIM_VARIANT}",
                _outside(lambda ours, theirs: 100 * ssim(ours, theirs)),
            ),
            _Measure(
                "CLIP-source x100",
                f"the source and its prompt: {by_clip}",
                lambda shot: self.score(shot.source, shot.source_text),
            ),
            _Measure("CLIP-text x100", by_clip, lambda shot: self.score(shot.edit, shot.text)),
            _Measure("CLIP-text x100 inside", f"black outside the mask: {by_clip}", self._within),
        ]

    def _within(self, shot: _Shot) -> float | None:
        mask = shot.known_mask
        return self.score(inside(shot.edit, mask), shot.text) if mask.any() else None

    def add_motion(self, sheet: Sheet, task: Task, source: Frames, edit: Frames) -> None:
        def fidelity(where: torch.Tensor | None) -> float:
            tracker, count = given(self.tracker), edit.num_frames
            ours = tracker(edit.all(count), _FIVE_GRID, where)
            theirs = tracker(source.all(count), _FIVE_GRID, where)
            return 100 * motion_fidelity(ours.places, theirs.places)

        def in_box() -> float:
            given(self.tracker)
            assert task.masks is not None
            masks = read_masks(task.masks, source, _FIVE_STRIDE, source.num_frames)
            return fidelity(bounding_box(torch.stack(list(masks))))

        by = f"directions of tracks; {self.tracker_name}, {_FIVE_GRID}x{_FIVE_GRID} points"
        sheet.add("Motion x100", by, lambda: fidelity(None))
        sheet.add("Motion x100 in the box", f"{by}, those in the masks' box", in_box)


class IVEBenchJudge(Judge):
    network: Literal["alex", "squeeze"] = "alex"
    stride = 1

    def check_counts(self, source: Frames, edit: Frames) -> None:
        if edit.num_frames != source.num_frames:
            raise VideoError(_counts(edit, source, "compare the frames that were edited"))

    def measures(self) -> list[_Measure]:
        network = self.lpips.variant if isinstance(self.lpips, Lpips) else "AlexNet"
        return [
            _Measure("PSNR dB", "to the source", lambda shot: psnr(shot.edit, shot.source)),
            _Measure(
                "SSIM",
                f"to the source; SSIM: {SSIM_VARIANT}",
                lambda shot: ssim(shot.edit, shot.source),
            ),
            _Measure(
                "LPIPS",
                f"to the source; {network}",
                lambda shot: given(self.lpips)(shot.edit, shot.source),
                higher_is_better=False,
            ),
            _Measure(
                "CLIP-text x100", self.clip_name, lambda shot: self.score(shot.edit, shot.text)
            ),
        ]

    def add_motion(self, sheet: Sheet, task: Task, source: Frames, edit: Frames) -> None:
        def fidelity() -> float:
            tracker = given(self.tracker)
            if not task.keeps_motion:
                raise UnmeasuredError(
                    "IVEBench measures no motion where an edit is to change it",
                    "nothing is to be done",
                )
            before = source.all(source.num_frames)
            after = torch.stack([resized(f, before[0]) for f in edit.every(1, edit.num_frames)])
            ours, theirs = (tracker(frames, _IVEBENCH_GRID) for frames in (after, before))
            return matched_motion_fidelity(ours.places, ours.seen, theirs.places, theirs.seen)

        grid = f"{_IVEBENCH_GRID}x{_IVEBENCH_GRID} points"
        sheet.add("Motion", f"places of tracks, one to one; {self.tracker_name}, {grid}", fidelity)


def _mean(found: list[float] | UnmeasuredError) -> float:
    values = given(found)
    if not values:
        raise UnmeasuredError("the masks leave no frame to measure", "look at the masks")
    return sum(values) / len(values)


def _counts(edit: Frames, source: Frames, fix: str) -> str:
    return f"{edit.path}: has {edit.num_frames} frames, and the source {source.num_frames}; {fix}"


def _outside(compute: Callable[[torch.Tensor, torch.Tensor], float]) -> Callable[..., float | None]:
    """A metric of two videos for what is outside the masks; none where that is nothing."""

    def value(shot: _Shot) -> float | None:
        mask = shot.known_mask
        if mask.all():
            return None
        return compute(outside(shot.edit, mask), outside(shot.source, mask))

    return value
