"""What makes a new shape: `python -m benchmarks.studies.editing.shapes`; a stopped run goes on.

Edits of shapes of the editing study by fusion, with one option or two of its preset changed at a
time. Writes benchmarks/results/editing-shapes.json and .md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from stem import Video
from stem.diffusion.fingerprint import fingerprint
from stem.editing import run_edit, run_zoomed_edit
from stem.editing.pasting import edited_frames
from stem.metrics import mean_interval
from stem.world import world_edit
from stem_kernels.info import provenance

from ... import records
from ..quality import measure as quality_measure
from .measure import FIRST_SEED, FPS, STEPS, Edited, Row, figures, inversions

OUT = records.RESULTS / "editing-shapes.json"
DEFAULT = "the preset"
NOT_NARROWED, IN_A_WINDOW = "the mask is not narrowed", "small things in a window"
NO_RESTARTS = "no restarts"
WINDOW_NO_RESTARTS = f"{IN_A_WINDOW}, {NO_RESTARTS}"
FORMS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "guidance 5": {"guidance": 5.0},
    "guidance 10": {"guidance": 10.0},
    NO_RESTARTS: {"restarts": 0},
    "four restarts": {"restarts": 4},
    "no consensus": {"consensus": False},
    "all steps take the mean": {"consensus_until": 1.0},
    "all steps go a part of the way": {"consensus_until": 0.0},
    NOT_NARROWED: {"narrowing": False},
    IN_A_WINDOW: {"zoom": True},
    WINDOW_NO_RESTARTS: {"zoom": True, "restarts": 0},
}
"""Changes to the preset "shape" by what the table calls them; guidance and zoom are the edit's own.
"""


def measure(seed: int, frames: int, root: Path, forms: list[str]) -> dict[str, Row]:
    """The figures of a scene's edits by form.

    Args:
        seed: Seed of the scene.
        frames: Number of frames.
        root: Folder for the inversion.
        forms: Names in FORMS.
    """
    edit = world_edit(seed, "shape", frames)
    pipeline = quality_measure.model()
    folder = inversions(edit.source, root, pipeline)("stem")
    rows = {}
    for form in forms:
        options = {"preset": "shape", **FORMS[form]}
        settings: dict[str, Any] = {
            "guidance": options.pop("guidance", None), "resume": False, "progress": False,
        }  # fmt: skip
        if options.pop("zoom", False):
            found = run_zoomed_edit(
                pipeline,
                folder,
                edit.exact.caption,
                root,
                video=Video(edit.source.frames, FPS),
                zoom_prompt=_as_seen(edit.exact.caption),
                zoom_source=_as_seen(edit.source.caption),
                options=options,
                **settings,
            )
        else:
            found = run_edit(pipeline, folder, edit.exact.caption, options=options, **settings)
        pictures = edited_frames(pipeline, folder, found, edit.source.frames)
        rows[form] = figures(edit, Edited(pictures, found.masks, found.cores))
    return rows


def measure_all(results: dict[str, Any], seeds: Iterable[int], out: Path) -> None:
    """Put the rows that `results` lacks into it, and write it to `out` after every scene."""
    rows = results["rows"]
    for seed in seeds:
        left = [form for form in rows if str(seed) not in rows[form]]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for form, row in measure(seed, results["frames"], Path(folder), left).items():
                rows[form][str(seed)] = row
        records.write(results, out)
        print(f"{seed}: {len(left)} edits", flush=True)


def _as_seen(caption: str) -> str:
    """A caption of what a window shows: what is small in the video is large there."""
    return caption.replace("small", "large")


def report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where, scenes = results["provenance"], len(results["rows"][DEFAULT])
    lines = [
        "# Edits of shapes",
        "",
        f"`fusion` with the preset `shape` on {scenes} world videos that no training saw, "
        f"{results['frames']} frames of {results['pixels']}x{results['pixels']} pixels, "
        f"{results['steps']} steps there and back, the embedded model. {where['cpu']}, torch "
        f"{where['versions']['torch']}, one thread, commit `{where['commit']}`.",
        "",
        "Judge: share of the frames in which it sees the new shape. PSNR in dB is to the exact "
        "answer, whose size and turn the prompt does not say; Warp-Err (x 1000) under the exact "
        "flow. ± and +: 95 % interval of the mean, of the differences from the preset scene by "
        "scene. In a window: `run_zoomed_edit`; there the prompts say large for small.",
        "",
        *table(results["rows"]),
    ]
    return "\n".join(lines) + "\n"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table of forms, each beside `DEFAULT`."""
    lines = [
        "| | judge % | against it | dB | against it | Warp-Err | against it |",
        "|---|---|---|---|---|---|---|",
    ]
    for form, found in rows.items():
        cells = [form]
        for figure, factor, digits in (
            ("shape", 100, ".0f"),
            ("all", 1, ".2f"),
            ("warp", 1, ".2f"),
        ):
            here, before = (
                [factor * row[figure] for row in each.values()] for each in (found, rows[DEFAULT])
            )
            apart = [one - other for one, other in zip(here, before, strict=True)]
            cells.append(f"{mean_interval(here):{digits}}")
            cells.append("" if form == DEFAULT else f"{mean_interval(apart):+{digits}}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md goes beside it.")] = OUT,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 20,
    frames: Annotated[int, typer.Option(help="Number of frames of a video.")] = 8,
) -> None:
    """Edit shapes, with the embedded model."""
    results: dict[str, Any] = {
        "frames": frames,
        "pixels": quality_measure.SIZE,
        "steps": STEPS,
        "forms": {form: repr(changes) for form, changes in FORMS.items()},
        "model": fingerprint(quality_measure.model()),
        "provenance": provenance("diffusers"),
        "rows": {form: {} for form in FORMS},
    }
    results = records.taken_up(out, results, ["rows"])
    measure_all(results, range(FIRST_SEED, FIRST_SEED + scenes), out)
    out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    typer.run(main)
