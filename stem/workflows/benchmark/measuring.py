"""A benchmark's edits judged one by one, and the means of their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...metrics import Clip, CoTracker, Embedder, Lpips, Tracker
from ...models import check_device
from ...names import BENCHMARK_CLIP_MODEL
from ...progress import steps
from ...video import VideoError
from ..figures import attempt
from .folders import FIVE, read_benchmark
from .judging import FiveJudge, IVEBenchJudge, JudgedEdit

ALL = "all"
"""The kind that stands for all kinds of edits."""


@dataclass(frozen=True)
class MeanFigure:
    """The means of one metric.

    Args:
        metric: Name of the metric, with its factor or unit.
        measured_by: Variant or model that it depends on.
        higher_is_better: Whether more is better.
        means: Mean by kind of edit, and of "all"; None where no edit has a value.
        counts: Number of edits with a value, likewise.
    """

    metric: str
    measured_by: str
    higher_is_better: bool
    means: Mapping[str, float | None]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class BenchmarkEvaluation:
    """The figures of a benchmark's edits.

    Args:
        benchmark: Name of the benchmark.
        folder: Folder of the benchmark.
        edits_folder: Folder of the edits.
        asked: Number of edits that the benchmark asks for, by kind, and of "all".
        means: Means over the edits that were judged.
        edits: Edits that were judged.
        absent: Names of those that are not there.
        problems: Texts on those that could not be read or compared, one for each.
    """

    benchmark: str
    folder: str
    edits_folder: str
    asked: Mapping[str, int]
    means: tuple[MeanFigure, ...]
    edits: tuple[JudgedEdit, ...]
    absent: tuple[str, ...]
    problems: tuple[str, ...]


def evaluate_benchmark(
    folder: str | Path,
    edits: str | Path,
    *,
    clip: str | Embedder = BENCHMARK_CLIP_MODEL,
    tracker: Tracker | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> BenchmarkEvaluation:
    """Judge the edits of FiVE's or IVEBench's videos that are in a folder.

    If the package or the weights of a metric are not on this machine, its figures have no value
    and say how to get them; nothing is downloaded.

    Args:
        folder: Folder of the benchmark, as its authors hand it out.
        edits: Folder of the edits, see `read_benchmark`.
        clip: CLIP model, a hub id or a local folder, or another embedder.
        tracker: What follows points; None: `CoTracker`.
        device: Device of the networks; None: "cuda" if there is a GPU, else "cpu".
        progress: Whether to show progress.

    Raises:
        ValueError: neither benchmark, no edit, none that can be judged, or a model or a device that
            does not exist.
        NotADirectoryError: one of the two is no folder.

    Source: FiVE, arXiv 2503.13684; IVEBench, arXiv 2510.11647.
    """
    found = read_benchmark(Path(folder), Path(edits))
    where = check_device(device)
    kind = FiveJudge if found.name == FIVE else IVEBenchJudge
    judge = kind(
        attempt(lambda: Clip(clip, where) if isinstance(clip, str) else clip),
        f"CLIP {clip}" if isinstance(clip, str) else clip.name,
        attempt(lambda: Lpips(kind.network, where)),
        attempt(lambda: tracker or CoTracker(where)),
    )
    judged, absent, problems = [], [], []
    with steps(len(found.tasks), name=f"evaluate {found.name}", show=progress) as bar:
        for task in found.tasks:
            if task.edit is None:
                absent.append(task.name)
            else:
                try:
                    judged.append(judge(task))
                except (OSError, VideoError) as error:
                    problems.append(str(error))
            bar.update()
    if not judged:
        raise ValueError(f"no edit of {found.name} in {edits} can be judged: {problems[0]}")
    kinds = list(dict.fromkeys(task.kind for task in found.tasks))
    asked = {each: sum(task.kind == each for task in found.tasks) for each in kinds}
    return BenchmarkEvaluation(
        found.name,
        str(folder),
        str(edits),
        {**asked, ALL: len(found.tasks)},
        _means(judged, kinds),
        tuple(judged),
        tuple(absent),
        tuple(problems),
    )


def _means(judged: Sequence[JudgedEdit], kinds: Sequence[str]) -> tuple[MeanFigure, ...]:
    means = []
    for number, first in enumerate(judged[0].figures):
        values = {
            kind: [
                value
                for edit in judged
                if kind in (edit.kind, ALL) and (value := edit.figures[number].value) is not None
            ]
            for kind in (*kinds, ALL)
        }
        means.append(
            MeanFigure(
                first.metric,
                first.measured_by,
                first.higher_is_better,
                {kind: sum(v) / len(v) if v else None for kind, v in values.items()},
                {kind: len(v) for kind, v in values.items()},
            )
        )
    return tuple(means)
