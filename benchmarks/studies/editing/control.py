"""Edits under control: `python -m benchmarks.studies.editing.control`; an interrupted run goes on.

Edits of the editing study without and with the embedded ControlNet on edges. Inversions are shown
the edges of the source. Edits of colours and textures are shown them, too; edits of shapes are
shown the edges of the exact answer, which nobody has: a ceiling of what control can do. Writes
benchmarks/results/editing-control.json and .md.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem import Control, load_pipeline
from stem.control import canny
from stem.diffusion.control import controlnets_of
from stem.diffusion.fingerprint import fingerprint, fingerprint_of
from stem.metrics import mean_interval
from stem.world import EDIT_KINDS, WorldEdit, world_edit
from stem_kernels.info import provenance

from ... import records
from ..quality import measure as quality_measure
from .measure import FIRST_SEED, STEPS, Row, edited_by, figures, inversions
from .variants import BASELINE, OURS, VARIANTS, Series, series_of

OUT = records.RESULTS / "editing-control.json"
WAYS = ("without", "with")
METHODS = (OURS, BASELINE)
SHOWN = {"colour": "the source", "texture": "the source", "shape": "the exact answer"}
"""By kind of edit, whose edges the edit is shown."""
HEADS = "| edges of | scenes | dB | with | | Warp-Err | with | | colour % | with | shape % | with |"


@functools.cache
def model(way: str) -> Any:
    """The embedded pipeline, without or with its ControlNet."""
    return load_pipeline("embedded", controlnets=["embedded"] if way == "with" else [])


def shown(edit: WorldEdit) -> torch.Tensor:
    """Edges that an edit is shown, uint8 [N, H, W, 3]."""
    clip = edit.exact if SHOWN[edit.kind] == "the exact answer" else edit.source
    return canny(clip.frames)


def measure(seed: int, series: Series, way: str, root: Path) -> Row:
    """The figures of an edit without or with control.

    Args:
        seed: Seed of the scene.
        series: Series of the edit.
        way: One of WAYS.
        root: Folder for the inversions.
    """
    edit = world_edit(seed, series.kind, series.frames)
    pipeline, source, target = model(way), None, None
    if way == "with":
        source, target = Control(canny(edit.source.frames)), Control(shown(edit))
    folder = inversions(edit.source, root, pipeline, source)(series.inversion)
    return figures(edit, edited_by(pipeline, series, edit, folder, target))


def name_of(series: Series, way: str) -> str:
    """The rows of a series without or with control in the file of results."""
    return f"{series.name}, {way} control"


def run(out: Path, frames: int, scenes: int, methods: Sequence[str]) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every scene.

    Args:
        out: File of the results.
        frames: Number of frames of a video.
        scenes: Number of scenes.
        methods: Names of the variants, each tried on all scenes before the next.

    Raises:
        SystemExit: the earlier run is of another model, machine or setting.
    """
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "videos": f"World videos of one object that no training saw, seeds from {FIRST_SEED}",
        "frames": frames,
        "pixels": quality_measure.SIZE,
        "steps": STEPS,
        "model": fingerprint(model("without")),
        "controlnet": fingerprint_of("controlnet", controlnets_of(model("with"))[0]),
        "provenance": where,
        "variants": {name: repr(VARIANTS[name]) for name in METHODS},
        "commits": [],
        "rows": {},
    }
    results = records.taken_up(out, results, ["commits", "rows"])
    for method, seed in itertools.product(methods, range(FIRST_SEED, FIRST_SEED + scenes)):
        left = undone(results, method, seed)
        with tempfile.TemporaryDirectory() as folder:
            found = {pair: measure(seed, *pair, Path(folder)) for pair in left}
        for pair, row in found.items():
            results["rows"].setdefault(name_of(*pair), {})[str(seed)] = row
        if found and commit not in results["commits"]:
            results["commits"].append(commit)
        records.write(results, out)
        print(f"{method}, {seed}: {len(found)} edits", flush=True)
    return results


def undone(results: dict[str, Any], method: str, seed: int) -> list[tuple[Series, str]]:
    """The series of a scene that are not measured yet, and whether with or without control."""
    return [
        (series, way)
        for way in WAYS
        for kind in EDIT_KINDS
        if str(seed)
        not in results["rows"].get(
            name_of(series := series_of(results["frames"], kind, method), way), {}
        )
    ]


def table(results: dict[str, Any]) -> str:
    """The Markdown of edits without and with control, scene by scene.

    Args:
        results: Results of `run`.
    """
    lines = [HEADS, "|---" * (HEADS.count("|") - 1) + "|"]
    for method, kind in itertools.product(METHODS, EDIT_KINDS):
        series = series_of(results["frames"], kind, method)
        found = [results["rows"].get(name_of(series, way), {}) for way in WAYS]
        if all(found):
            lines.append(line(series, *found))
    return "\n".join([*lines, ""])


def line(series: Series, without: dict[str, Row], under: dict[str, Row]) -> str:
    """A line of the table, from the rows of a series without and with control by scene."""
    seeds = [seed for seed in without if seed in under]

    def pair(figure: str) -> list[list[Any]]:
        return [[rows[seed][figure] for seed in seeds] for rows in (without, under)]

    cells = [f"{series.variant}, {series.kind}: {SHOWN[series.kind]}", str(len(seeds))]
    for figure in ("all", "warp"):
        before, after = pair(figure)
        gained = mean_interval([b - a for a, b in zip(before, after, strict=True)])
        cells += [f"{mean_interval(each):.2f}" for each in (before, after)]
        cells.append(f"{gained:+.2f}")
    for figure in ("colour", "shape"):
        cells += [f"{100 * statistics.fmean(each):.0f}" for each in pair(figure)]
    return f"| {' | '.join(cells)} |"


def report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where, side = results["provenance"], results["pixels"]
    commits = ", ".join(f"`{commit}`" for commit in results["commits"])
    return "\n".join(
        [
            "# Edits of world videos under control",
            "",
            f"{results['videos']}; {results['frames']} frames of {side}x{side} pixels, "
            f"{results['steps']} steps there and back, embedded model and ControlNet, scale 1 at "
            f"all steps. Source: {where['cpu']}, torch {where['versions']['torch']}, one thread, "
            f"commit {commits}.",
            "",
            "Inversions are shown Canny's edges of the source; edits those of the source or of the "
            "exact answer. dB: PSNR to the exact answer, of all pixels; Warp-Err under the exact "
            "flow of the edited scene; colour and shape: share of the frames in which the judge "
            "sees what the target prompt says. First without control, then with it; ±: 95 % "
            "interval of the mean; +: of the differences scene by scene.",
            "",
            table(results),
        ]
    )


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md goes beside it.")] = OUT,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 20,
    frames: Annotated[int, typer.Option(help="Number of frames of a video.")] = 8,
    methods: Annotated[str, typer.Option(help="Comma-separated variants.")] = ",".join(METHODS),
) -> None:
    """Edit under control, with the embedded model."""
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(METHODS)}")
    text = report(run(out, frames, scenes, names))
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
