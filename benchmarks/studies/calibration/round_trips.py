"""Reconstruction and editing with bases of a sample, calibrated or not: `python -m
benchmarks.studies.calibration.round_trips`; an interrupted run goes on where it stopped.

Unseen videos of the procedural world at 64x64 pixels, where a base stands for 128 tokens of the
embedded model's widest layers at K = 16, and for 8 at K = 256. Every video is inverted and
reconstructed, and its object's colour, texture and shape are edited by fusion; an edit of an
inversion with calibrated bases goes on without a calibration. Writes
benchmarks/results/calibration-runs.json and .md.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from stem import InflatedConfig, PerFrameConfig, StemConfig, Video, invert, load_pipeline
from stem.config import AttentionConfig
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.editing import edit_options, run_edit
from stem.inversion import round_trip
from stem.metrics import mean_interval, pooled_psnr, psnr, warp_error
from stem.world import EDIT_KINDS, render, sample_scene, world_edit
from stem_kernels.info import provenance

from ... import records
from ...cases.layers import of_frames
from ..editing import measure as editing_measure
from ..quality import measure as quality_measure

OUT = records.RESULTS / "calibration-runs.json"
FRAMES = 8
DIGITS = 4
STEPS = 20
"""Of a reconstruction; edits take the editing study's."""
ALL_TOKENS: dict[str, Any] = {"sample_per_base": None, "calibration": "none"}
SAMPLED: dict[str, Any] = {"sample_per_base": 22, "calibration": "moments"}
FORMS = {"all tokens": ALL_TOKENS, "22 a base, moments": SAMPLED}
STEM_OPTIONS: dict[str, dict[str, Any]] = {
    f"K={count}, {form}": {"num_bases": count, **options}
    for count in (16, 256)
    for form, options in FORMS.items()
}
REFERENCES: dict[str, AttentionConfig] = {
    "per-frame": PerFrameConfig(),
    "all-frame": InflatedConfig(),
}


def measure(index: int) -> dict[str, dict[str, float]]:
    """The figures of one video and its edits, by variant."""
    found = {
        name: {"reconstruction, dB": decibel} for name, decibel in reconstructed(index).items()
    }
    for kind in EDIT_KINDS:
        for name, (decibel, warp) in edited(index, kind).items():
            found[name] |= {f"{kind}, dB": decibel, f"{kind}, Warp-Err": warp}
    return found


def reconstructed(index: int) -> dict[str, float]:
    """PSNR in dB of a video's reconstructions, by variant."""
    pipeline = quality_measure.model()
    clip = render(sample_scene(quality_measure.FIRST_SEED + index), FRAMES, quality_measure.SIZE)
    latents = encode_frames(pipeline, clip.frames)
    found = {}
    made = {name: StemConfig(**options) for name, options in STEM_OPTIONS.items()}
    for name, config in {**REFERENCES, **made}.items():
        back = round_trip(pipeline, latents, clip.caption, STEPS, of_frames(config, FRAMES))
        found[name] = round(psnr(decode_latents(pipeline, back), clip.frames), DIGITS)
    return found


def edited(index: int, kind: str) -> dict[str, tuple[float, float]]:
    """PSNR in dB to the exact answer and Warp-Err of one edit, by variant of its inversion."""
    pipeline = quality_measure.model()
    edit = world_edit(editing_measure.FIRST_SEED + index, kind, FRAMES)
    found = {}
    for name, options in STEM_OPTIONS.items():
        with tempfile.TemporaryDirectory() as root:
            folder = invert(
                pipeline,
                Video(edit.source.frames, editing_measure.FPS),
                edit.source.caption,
                Path(root),
                method="stem",
                options=options,
                num_steps=editing_measure.STEPS,
                chunk=None,
                progress=False,
            )
            made = run_edit(
                pipeline,
                folder,
                edit.exact.caption,
                method="fusion",
                options=edit_options("fusion", {"preset": kind}),
                resume=False,
                progress=False,
            )
        frames, exact = decode_latents(pipeline, made.latents), edit.exact
        found[name] = (
            round(pooled_psnr(frames, exact.frames), DIGITS),
            round(warp_error(frames, exact.flow, exact.occlusion), DIGITS),
        )
    return found


def run(out: Path, videos: int) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every video."""
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "frames": FRAMES,
        "pixels": quality_measure.SIZE,
        "steps": {"reconstruction": STEPS, "edit": editing_measure.STEPS},
        "variants": STEM_OPTIONS,
        "model": fingerprint(load_pipeline("embedded")),
        "provenance": where,
        "commits": [],
        "rows": {},
    }
    results = records.taken_up(out, results, ["commits", "rows"])
    for index in range(videos):
        if str(index) in results["rows"]:
            continue
        results["rows"][str(index)] = measure(index)
        results["commits"] = list(dict.fromkeys([*results["commits"], commit]))
        records.write(results, out)
        print(f"video {index}", flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """The results in Markdown: means, and differences from bases of all tokens."""
    where, rows = results["provenance"], results["rows"].values()
    commits = ", ".join(f"`{commit}`" for commit in results["commits"])
    figures = list(next(iter(rows))[next(iter(STEM_OPTIONS))])
    lines = [
        f"{len(rows)} world videos that no training saw, {results['frames']} frames of "
        f"{results['pixels']}x{results['pixels']} pixels, the embedded model; {where['cpu']}, "
        f"torch {where['versions']['torch']}, commit {commits}. Means; of the others "
        "the difference from as many bases of all tokens without calibration, with its 95 % "
        "interval over videos. Edits are fusion's, against the exact answer.",
        "",
        f"|  | {' | '.join(figures)} |",
        f"|{'---|' * (1 + len(figures))}",
    ]
    for name in (*REFERENCES, *STEM_OPTIONS):
        base = name if name in REFERENCES else f"{name.split(',')[0]}, {next(iter(FORMS))}"
        cells = []
        for figure in figures:
            if name in REFERENCES and figure not in next(iter(rows))[name]:
                cells.append("")
            elif name == base:
                cells.append(f"{statistics.fmean(row[name][figure] for row in rows):.4g}")
            else:
                gained = mean_interval([row[name][figure] - row[base][figure] for row in rows])
                cells.append(f"{gained:+.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md goes beside it.")] = OUT,
    videos: Annotated[int, typer.Option(help="Number of videos.")] = 20,
) -> None:
    """Reconstruct and edit with calibrated bases and without."""
    results = run(out, videos)
    out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
