"""The editing study: `python -m benchmarks.studies.editing`; an interrupted run goes on.

Edits unseen videos of the procedural world, whose exact answers are known: one object's colour,
texture or shape, by every method, by fusion's steps one after the other, and from every inversion,
with the embedded model. Writes benchmarks/results/editing.json, .md and .png, and pictures of the
best and of the worst edit, editing-best.png and editing-worst.png.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from stem import load_pipeline
from stem.diffusion.fingerprint import fingerprint
from stem.world import EDIT_KINDS
from stem_kernels.info import provenance

from ... import records
from ..quality import measure as quality_measure
from .measure import FIRST_SEED, STEPS, Editor, Job, Row, measure, with_stem
from .pictures import draw, draw_cases
from .report import report
from .variants import LONG_FRAMES, VARIANTS, Series, wanted, wanted_of_long

OUT = records.RESULTS / "editing.json"


def run(
    out: Path, frames: int, jobs: Sequence[Job], processes: int, editor: Editor
) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every job.

    Args:
        out: File of the results.
        frames: Number of frames of most videos.
        jobs: All that the study wants, whether it is measured already or not.
        processes: Number of processes, of one thread each; 1: this one.
        editor: Editor to measure.
    """
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "videos": f"World videos of one object that no training saw, seeds from {FIRST_SEED}",
        "frames": frames,
        "pixels": quality_measure.SIZE,
        "steps": STEPS,
        "processes": processes,
        "model": fingerprint(load_pipeline("embedded")),
        "provenance": where,
        "variants": {name: repr(variant) for name, variant in VARIANTS.items()},
        "commits": {},
        "rows": {},
    }
    if out.is_file():
        take_up(results, records.read(out), out)
    undone = [left for job in jobs if (left := without_done(job, results["rows"])).series]
    for job, found in zip(undone, measured(undone, processes, editor), strict=True):
        for name, row in found.items():
            results["rows"].setdefault(name, {})[str(job.seed)] = row
            commits = results["commits"].setdefault(name, [])
            if commit not in commits:
                commits.append(commit)
        records.write(results, out)
        first = job.series[0]
        print(f"{job.seed}, {first.kind}, {first.frames} frames: {len(found)} edits", flush=True)
    return results


def measured(jobs: Sequence[Job], processes: int, editor: Editor) -> Iterator[dict[str, Row]]:
    """The rows of every job, in order, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        one = partial(measure, root=Path(folder), editor=editor)
        if processes == 1:
            yield from map(one, jobs)
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        with ProcessPoolExecutor(processes, context) as pool:
            yield from pool.map(one, jobs)


def without_done(job: Job, rows: dict[str, dict[str, Row]]) -> Job:
    """The part of a job that has no row yet."""
    left = (series for series in job.series if str(job.seed) not in rows.get(series.name, {}))
    return Job(job.seed, tuple(left))


def take_up(results: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """Put the rows of an earlier run into `results`, but for variants that have changed since.

    Raises:
        SystemExit: the earlier run is of another model, machine or setting.
    """
    settings = [name for name in results if name not in ("variants", "commits", "rows")]
    records.require_same(earlier, results, settings, out)
    now, then = results["variants"], earlier["variants"]
    changed = [name for name in then if then[name] != now.get(name)]
    for name in changed:
        print(f"{name} has changed: {then[name]} in {out} is left out", flush=True)
    for name, row in earlier["rows"].items():
        if not any(name.startswith((f"{variant} on ", f"{variant},")) for variant in changed):
            results["rows"][name] = row
            results["commits"][name] = earlier["commits"][name]


def plan(scenes: int, frames: int, crossed: int, long: int, only: Sequence[str]) -> list[Job]:
    """What the study wants, scene by scene, so that an early look has all variants.

    Args:
        scenes: Number of scenes.
        frames: Number of frames of a video.
        crossed: Number of scenes on which most methods are tried on every inversion.
        long: Number of scenes of LONG_FRAMES frames.
        only: Names of the variants; empty: all.
    """

    def kept(series: Series) -> bool:
        return not only or series.variant in only or series.variant not in VARIANTS

    jobs = []
    for scene in range(scenes):
        found = [wanted(kind, frames, scene < crossed) for kind in EDIT_KINDS]
        if scene < long:
            found += [wanted_of_long(kind) for kind in EDIT_KINDS]
        jobs += [Job(FIRST_SEED + scene, tuple(filter(kept, series))) for series in found]
    return jobs


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md and pictures go beside it.")] = OUT,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 20,
    frames: Annotated[int, typer.Option(help="Number of frames of a video.")] = 8,
    crossed: Annotated[
        int, typer.Option(help="Number of scenes for most methods on every inversion.")
    ] = 2,
    long: Annotated[int, typer.Option(help=f"Number of scenes of {LONG_FRAMES} frames.")] = 2,
    only: Annotated[str, typer.Option(help="Comma-separated variants. Default: all.")] = "",
    processes: Annotated[int, typer.Option(help="Number of processes, of one thread each.")] = 1,
) -> None:
    """Run the editing study with the embedded model."""
    names = [name.strip() for name in only.split(",")] if only else []
    for name in names:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(VARIANTS)}")
    study(out, frames, plan(scenes, frames, crossed, long, names), processes, with_stem)


def study(out: Path, frames: int, jobs: Sequence[Job], processes: int, editor: Editor) -> None:
    """Run the jobs as `run` does, and write the report and the pictures."""
    results = run(out, frames, jobs, processes, editor)
    text = report(results)
    out.with_suffix(".md").write_text(text)
    draw(results, out.with_suffix(".png"))
    draw_cases(results, out, editor)
    print(text)
