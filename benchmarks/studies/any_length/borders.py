"""Whether chunks show in edits: `python -m benchmarks.studies.any_length.borders`.

World videos of one object are inverted and recoloured by fusion in chunks, with bases of all frames
and with bases of a few (whose chunks run by themselves). The warp errors of pairs of frames across
the borders of chunks stand beside those of all other pairs. Writes
benchmarks/results/any-length-borders.json, .md, and a .png of the border that shows most; scenes
that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import stem
from stem import InversionFolder, Video, invert
from stem.diffusion.pipeline import decode_latents
from stem.editing import run_edit
from stem.metrics import mean_interval
from stem.metrics.consistency import pair_warp_errors
from stem.report.pictures import contact_sheet
from stem.world import Clip, Scene, caption, render
from stem_kernels.info import provenance

from ... import records
from .run import CHUNK, FIT_FRAMES, PIXELS, one_object, recoloured

OUT = records.RESULTS / "any-length-borders.json"
SEEDS = range(41_100_000, 41_100_020)  # no training saw them
FORMS: dict[str, dict[str, Any]] = {"all frames": {}, "16 frames": {"fit_frames": 16}}
"""STEM's options by the frames that its bases are of."""
STEPS = 10
SHOWN = 3  # frames to each side of the border in the picture


def edited(pipeline: Any, scene: Scene, clip: Clip, form: str) -> torch.Tensor:
    """The recoloured video, uint8 [N, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        inversion: InversionFolder = invert(
            pipeline,
            Video(clip.frames, Fraction(8)),
            clip.caption,
            folder,
            options=FORMS[form],
            num_steps=STEPS,
            chunk=CHUNK,
            progress=False,
        )
        found = run_edit(
            pipeline, inversion, caption(recoloured(scene)), resume=False, progress=False
        )
    return decode_latents(pipeline, found.latents)


def measure(pipeline: Any, seed: int) -> dict[str, Any]:
    """The warp errors of one scene by form: means of pairs across borders and of the others, and
    the pair across a border that is worst."""
    scene = one_object(seed)
    clip = render(scene, FIT_FRAMES, PIXELS)
    found: dict[str, Any] = {}
    for form in FORMS:
        frames = edited(pipeline, scene, clip, form)
        errors = pair_warp_errors(frames, clip.flow, clip.occlusion)
        across = {pair: errors[pair] for pair in range(CHUNK - 1, len(errors), CHUNK)}
        worst = max(across, key=across.__getitem__)
        found[form] = {
            "border": statistics.fmean(across.values()),
            "inside": statistics.fmean(e for pair, e in enumerate(errors) if pair not in across),
            "worst_pair": worst,
            "worst": across[worst],
        }
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where, rows = results["provenance"], list(results["rows"].values())
    lines = [
        "# Borders of chunks",
        "",
        f"`fusion` recolours {len(rows)} world videos of one object, {FIT_FRAMES} frames of "
        f"{PIXELS}x{PIXELS} pixels, in chunks of {CHUNK}, {STEPS} steps. Warp error (x 1000, exact "
        "flow) of pairs of frames across the borders of chunks, of all other pairs, and the "
        f"difference video by video; ± 95 %. {where['cpu']}, torch {where['versions']['torch']}, "
        f"commit `{where['commit']}`.",
        "",
        "| bases of | across borders | elsewhere | difference |",
        "|---|---|---|---|",
    ]
    for form in FORMS:
        border, inside = ([row[form][name] for row in rows] for name in ("border", "inside"))
        apart = [one - other for one, other in zip(border, inside, strict=True)]
        cells = [f"{mean_interval(values):.3f}" for values in (border, inside, apart)]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    seed, form = worst_of(results)
    found = results["rows"][seed][form]
    lines += [
        "",
        f"The border that shows most: frames {found['worst_pair']} and {found['worst_pair'] + 1} "
        f"of scene {seed}, bases of {form}, {found['worst']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def worst_of(results: dict[str, Any]) -> tuple[str, str]:
    """The scene and the form of the border that is farthest above its video's other pairs."""
    return max(
        ((seed, form) for seed in results["rows"] for form in FORMS),
        key=lambda at: (
            results["rows"][at[0]][at[1]]["worst"] - results["rows"][at[0]][at[1]]["inside"]
        ),
    )


def draw(pipeline: Any, results: dict[str, Any], path: Path) -> None:
    """The frames to both sides of the border that shows most, source and edit."""
    seed, form = worst_of(results)
    scene = one_object(int(seed))
    clip = render(scene, FIT_FRAMES, PIXELS)
    first = results["rows"][seed][form]["worst_pair"] + 1 - SHOWN
    shown = slice(first, first + 2 * SHOWN)
    videos = {
        f"source, frames {first} to {first + 2 * SHOWN - 1}": clip.frames[shown],
        f"edit, bases of {form}; a chunk begins with the fourth": edited(
            pipeline, scene, clip, form
        )[shown],
    }
    contact_sheet(videos, 2 * SHOWN, numbered=False).save(path)


def main() -> None:
    """Measure what is missing, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    fresh = {"provenance": provenance("diffusers"), "rows": {}}
    results = records.taken_up(arguments.out, fresh, ["rows"])
    pipeline = stem.load_pipeline("embedded")
    for seed in map(str, SEEDS):
        if seed not in results["rows"]:
            results["rows"][seed] = measure(pipeline, int(seed))
            records.write(results, arguments.out)
    arguments.out.with_suffix(".md").write_text(table(results))
    draw(pipeline, results, arguments.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
