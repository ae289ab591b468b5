"""The quality study: `python -m benchmarks.studies.quality`; an interrupted run goes on.

Inverts and reconstructs 20 unseen videos of the procedural world and 3 natural clips with the
embedded model, by every method and, for stem, with its options changed one at a time, from the
defaults and from the paper's. Writes benchmarks/results/quality.json, .md and .png; `StemConfig`'s
defaults are chosen from them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import typer

from stem import load_pipeline
from stem.diffusion.fingerprint import fingerprint
from stem.inversion import METHODS
from stem.metrics import mean_interval
from stem.metrics.fidelity import SSIM_VARIANT
from stem.world.training.data import TRAINING_CLIP
from stem_kernels.info import provenance

from ... import records
from . import measure as quality_measure
from .measure import measure, sources, vae_alone
from .report import draw, table, values
from .variants import CEILING, FRAMES, LONG_FRAMES, VARIANTS

OUT = records.RESULTS / "quality.json"
STEPS = 50
DIGITS = 7  # kept of a figure; the table shows four


def run(out: Path, names: Sequence[str], processes: int) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every variant."""
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    videos = {frames: sources(frames) for frames in (FRAMES, LONG_FRAMES)}
    results: dict[str, Any] = {
        "videos": f"{quality_measure.WORLD_VIDEOS} world videos that no training saw, and "
        f"{', '.join(quality_measure.NATURAL)} "
        f"(of which the autoencoder's training saw {TRAINING_CLIP})",
        "order": list(videos[FRAMES]),
        "pixels": quality_measure.SIZE,
        "steps": STEPS,
        "processes": processes,
        "ssim_variant": SSIM_VARIANT,
        "model": fingerprint(load_pipeline("embedded")),
        "provenance": where,
        "measured": {},
        "rows": {},
        "curves": {},
    }
    if out.is_file():
        take_up(results, records.read(out), out)
    rows = results["rows"]
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, context) as pool:
        if CEILING not in rows:
            rows[CEILING] = row_of(list(pool.map(vae_alone, videos[FRAMES].values())))
        for name in names:
            if name in rows:
                continue
            variant = VARIANTS[name]
            chosen = videos[variant.frames].values()
            found = list(pool.map(measure, chosen, repeat(variant), repeat(STEPS)))
            curves = [curve for video in found if (curve := video.pop("curve"))]
            if name in METHODS:
                results["curves"][name] = mean_curve(curves)
            rows[name] = row_of(found)
            results["measured"][name] = {"commit": commit, "variant": repr(variant)}
            records.write(results, out)
            print(
                f"{name}: {mean_interval(values(results, name, 'psnr', world=True)):.2f} dB",
                flush=True,
            )
    return results


def row_of(found: Sequence[dict[str, float | None]]) -> dict[str, list[float | None]]:
    """A list for every figure, with a number for every video."""
    return {figure: [rounded(video[figure]) for video in found] for figure in found[0]}


def mean_curve(curves: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The mean of several videos at every timestep."""
    return {key: rounded(statistics.fmean(curve[key] for curve in curves)) for key in curves[0]}


def rounded(figure: float | None) -> float | None:
    return None if figure is None else float(f"{figure:.{DIGITS}g}")


def take_up(results: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """Put the rows of an earlier run into `results`, but for variants that have changed since.

    Raises:
        SystemExit: the earlier run is of another model, machine or setting.
    """
    settings = [name for name in results if name not in ("measured", "rows", "curves")]
    records.require_same(earlier, results, settings, out)
    for name, row in earlier["rows"].items():
        if name == CEILING:
            results["rows"][name] = row
            continue
        then = earlier["measured"][name]
        if name in VARIANTS and then["variant"] == repr(VARIANTS[name]):
            results["rows"][name], results["measured"][name] = row, then
            if name in earlier["curves"]:
                results["curves"][name] = earlier["curves"][name]
        else:
            print(f"{name} has changed: {then['variant']} in {out} is left out", flush=True)


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md and .png go beside it.")] = OUT,
    only: Annotated[str, typer.Option(help="Comma-separated variants. Default: all.")] = "",
    processes: Annotated[
        int, typer.Option(help="Number of processes, of one thread each. Default: a core's worth.")
    ] = os.cpu_count() or 1,
) -> None:
    """Run the quality study with the embedded model."""
    names = [name.strip() for name in only.split(",")] if only else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(VARIANTS)}")
    results = run(out, names, processes)
    out.with_suffix(".md").write_text(table(results))
    draw(results, out.with_suffix(".png"))
    print(table(results))
