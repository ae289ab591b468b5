"""Small things edited: `python -m benchmarks.studies.editing.small_things`; a stopped run goes on.

They get a new shape by fusion, in whole frames and in a window that follows them, on scenes
that no other study has. Writes benchmarks/results/editing-small-things.json and .md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stem.diffusion.fingerprint import fingerprint
from stem.world import world_edit
from stem_kernels.info import provenance

from ... import records
from ..quality import measure as quality_measure
from .measure import STEPS
from .shapes import (
    DEFAULT,
    IN_A_WINDOW,
    NO_RESTARTS,
    NOT_NARROWED,
    WINDOW_NO_RESTARTS,
    measure_all,
    table,
)

OUT = records.RESULTS / "editing-small-things.json"
FIRST_SEED = 43_000_000
FORMS = [DEFAULT, NO_RESTARTS, NOT_NARROWED, IN_A_WINDOW, WINDOW_NO_RESTARTS]


def small_scenes(count: int, frames: int) -> Iterator[int]:
    """Seeds of edits whose source's caption says small."""
    seed = FIRST_SEED
    while count:
        if " small " in f" {world_edit(seed, 'shape', frames).source.caption} ":
            yield seed
            count -= 1
        seed += 1


def report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where, scenes = results["provenance"], len(results["rows"][DEFAULT])
    lines = [
        "# Edits of small things",
        "",
        f"`fusion` with the preset `shape` on {scenes} world videos of a small thing that no "
        f"training and no other study saw, {results['frames']} frames of "
        f"{results['pixels']}x{results['pixels']} pixels, {results['steps']} steps there and back, "
        f"the embedded model. {where['cpu']}, torch {where['versions']['torch']}, one thread, "
        f"commit `{where['commit']}`. Figures as in [the study of shapes](editing-shapes.md).",
        "",
        *table(results["rows"]),
    ]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md goes beside it.")] = OUT,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 30,
    frames: Annotated[int, typer.Option(help="Number of frames of a video.")] = 8,
) -> None:
    """Edit shapes of small things, with the embedded model."""
    results: dict[str, Any] = {
        "frames": frames,
        "pixels": quality_measure.SIZE,
        "steps": STEPS,
        "model": fingerprint(quality_measure.model()),
        "provenance": provenance("diffusers"),
        "rows": {form: {} for form in FORMS},
    }
    results = records.taken_up(out, results, ["rows"])
    measure_all(results, small_scenes(scenes, frames), out)
    out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    typer.run(main)
