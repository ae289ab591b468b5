"""Memory of an edit over the frames: `python -m benchmarks.studies.editing.memory`.

FateZero on a STEM inversion at Stable Diffusion 1.5's shape with random weights: peak memory of the
edit alone above the loaded model, all frames in one batch and in chunks. Every point is measured in
a process of its own, which reads its own high-water mark. Writes
benchmarks/results/editing-memory.json, .md and .png; points that the file holds are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from stem import Video, invert, parking, random_pipeline
from stem.editing import edit_options, run_edit
from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory

from ... import records
from ...cases.processes import measured_apart
from ...cases.unets import sd15_unet

OUT = records.RESULTS / "editing-memory.json"
CHUNK = 4
WAYS: dict[str, tuple[int | None, str]] = {
    "one batch": (None, "never"),
    f"chunks of {CHUNK}": (CHUNK, "never"),
    f"chunks of {CHUNK} that wait in files": (CHUNK, "disk"),
}
"""Frames in a chunk and where chunks wait, see `stem.parking`."""
FRAMES = (4, 8, 16)
PIXELS = 256
STEPS = 1  # each step holds what the others do
OPTIONS = {"cross_replace": 1.0, "self_replace": 1.0}  # or the only step would fuse nothing
PROMPTS = ("a red ball", "a blue ball")


def pipeline_of_sd_shape(unet: torch.nn.Module) -> Any:
    """A pipeline around a UNet; its other parts are small, and the edit does not call the VAE."""
    pipeline = random_pipeline()
    pipeline.unet = unet
    return pipeline


def measure_point(
    pipeline: Any, frames: int, chunk: int | None, park: str = "never"
) -> dict[str, Any]:
    """Peak bytes of an edit of so many frames above the loaded model, and the operators' backend.

    Args:
        pipeline: Pipeline to edit with.
        frames: Number N of frames.
        chunk: Number of frames that go through the UNet at once; None: all.
        park: Where chunks wait.

    Raises:
        OSError: this system does not tell a process's peak.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (frames, PIXELS, PIXELS, 3)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    source, target = PROMPTS
    with tempfile.TemporaryDirectory() as folder, parking(park):
        inversion = invert(
            pipeline,
            Video(pixels, Fraction(8)),
            source,
            folder,
            num_steps=STEPS,
            chunk=chunk,
            progress=False,
        )
        options = edit_options("fatezero", OPTIONS)
        with PeakMemory() as memory:
            run_edit(
                pipeline,
                inversion,
                target,
                method="fatezero",
                options=options,
                resume=False,
                progress=False,
            )
    if memory.extra_bytes is None:
        raise OSError("this system does not tell the peak of a process's resident set")
    return {"bytes": memory.extra_bytes, "backend": inversion.settings["backend"]}


def run(out: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """Measure the points that `out` does not hold yet, and write it after each.

    Raises:
        SystemExit: the earlier points are of another machine or setting.
    """
    where = provenance("diffusers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "pixels": PIXELS,
        "steps": STEPS,
        "provenance": where,
        "rows": [],
    }
    results = records.taken_up(out, results, ["rows"])
    measured = {(row["way"], row["frames"]) for row in results["rows"]}
    for way, frames in points(lengths):
        if (way, frames) not in measured:
            found = measured_apart("benchmarks.studies.editing.memory", way, str(frames))
            results["rows"].append({"way": way, "frames": frames, **found, "commit": commit})
            records.write(results, out)
            print(f"{way}, {frames} frames: {found['bytes'] / 2**20:.0f} MiB", flush=True)
    return results


def points(lengths: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The points in order; a video no longer than a chunk is one batch."""
    for frames in lengths:
        for way, (chunk, _) in WAYS.items():
            if chunk is None or frames > chunk:
                yield way, frames


def peaks(results: dict[str, Any], way: str) -> dict[int, int]:
    """Bytes by number of frames."""
    return {row["frames"]: row["bytes"] for row in results["rows"] if row["way"] == way}


def a_frame(found: dict[int, int]) -> float | None:
    """Bytes that a frame adds, by least squares; None of fewer than two points."""
    if len(found) < 2:
        return None
    return statistics.linear_regression(list(found), list(found.values())).slope


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where = results["provenance"]
    lengths = sorted({row["frames"] for row in results["rows"]})
    commits = dict.fromkeys(row["commit"] for row in results["rows"])
    backends = dict.fromkeys(row["backend"] for row in results["rows"])
    side = results["pixels"]
    lines = [
        "# Memory of an edit",
        "",
        "FateZero on a STEM inversion (rows: source, unconditional, conditional; source maps "
        "computed again, none stored): peak memory of the edit above the loaded model, MiB. "
        f"Stable Diffusion 1.5's UNet with random weights, float32, {side}x{side} pixels, "
        f"{results['steps']} step, backend of the operators {', '.join(backends)}. "
        f"{where['cpu']}, torch {where['versions']['torch']}, commit "
        + ", ".join(f"`{commit}`" for commit in commits)
        + ".",
        "",
        f"| | {' | '.join(f'N={frames}' for frames in lengths)} | MiB a frame |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for way in WAYS:
        found = peaks(results, way)
        cells = [f"{found[n] / 2**20:.0f}" if n in found else "" for n in lengths]
        slope = a_frame(found)
        cells.append("" if slope is None else f"{slope / 2**20:.1f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Peak over the frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        if found := peaks(results, way):
            mebibytes = [peak / 2**20 for peak in found.values()]
            axes.plot(list(found), mebibytes, "o-", label=way)
    axes.set(title="FateZero on a STEM inversion", xlabel="frames N", ylabel="peak MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--frames", default=",".join(map(str, FRAMES)), help="numbers of frames")
    parser.add_argument("--point", nargs=2, metavar=("WAY", "FRAMES"), help="one point, printed")
    arguments = parser.parse_args()
    if arguments.point:
        way, frames = arguments.point
        pipeline = pipeline_of_sd_shape(sd15_unet(64))
        print(json.dumps(measure_point(pipeline, int(frames), *WAYS[way])))
        return
    lengths = [int(number) for number in arguments.frames.split(",")]
    results = run(arguments.out, lengths)
    arguments.out.with_suffix(".md").write_text(table(results))
    draw(results, arguments.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
