"""The paper's Figure 5 on the embedded model: `python -m benchmarks.studies.features`.

Inverts 5 unseen videos of the procedural world and a natural clip by every method, and follows the
last self-attention's features along the flow, exact on the world and OpenCV's DIS on the clip.
Writes benchmarks/results/features.json, .png (a plot) and features-pca.png; an interrupted run goes
on with the next video.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem import load_pipeline
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import encode_frames
from stem.diffusion.schedule import inverse_scheduler
from stem.inversion import METHODS
from stem.metrics import Flow, estimate_flow, world_flow
from stem.report.analysis_files import PCA, Shown, feature_picture
from stem.report.files import write_picture
from stem.workflows.analysis import FeatureCurve, feature_curve
from stem.world import sample_scene
from stem_kernels.info import provenance

from ... import records
from ..quality.measure import FACTOR, FIRST_SEED, SIZE, Source, sources

OUT = records.RESULTS / "features.json"
SEEDS = range(FIRST_SEED, FIRST_SEED + 5)
CLIP = "carphone_pristine.mp4"
PICTURED = f"world {FIRST_SEED}"
FRAMES = 8
STEPS = 50
PAPER = {
    "ddim": (0.9642, 0.9612, 0.9623, 0.9635, 0.9648, 0.9654, 0.9671, 0.9688, 0.9708, 0.9678),
    "stem": (0.9818, 0.9816, 0.9806, 0.9792, 0.9814, 0.9834, 0.9853, 0.9877, 0.9912, 0.9936),
}
"""Read off the plot of Figure 5, at t = 0, 100, ..., 900: another model, videos and flow."""


def flow_of(name: str, source: Source) -> Flow:
    """The exact flow of a world video at the features' size; else DIS on the frames."""
    if source.flow is None:
        return estimate_flow(source.frames, "dis")
    scene = sample_scene(int(name.removeprefix("world ")))
    return world_flow(scene, len(source.frames), SIZE // FACTOR)


def curves_of(
    pipeline: Any, source: Source, flow: Flow, steps: int, timestep: int
) -> dict[str, FeatureCurve]:
    """The features of one video along its flow, by method."""
    latents = encode_frames(pipeline, source.frames)
    return {
        method: feature_curve(
            pipeline, latents, source.prompt, method, flow, timestep=timestep, num_steps=steps
        )
        for method in METHODS
    }


def run(out: Path, steps: int) -> dict[str, Any]:
    """Measure the videos that `out` does not hold yet, and write it after each."""
    torch.set_num_threads(1)
    pipeline = load_pipeline("embedded")
    timesteps = inverse_scheduler(pipeline, steps).timesteps
    middle = int(timesteps[len(timesteps) // 2])
    every = sources(FRAMES)
    videos = {name: every[name] for name in (*(f"world {seed}" for seed in SEEDS), CLIP)}
    where = provenance("diffusers", "opencv-python-headless")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "frames": FRAMES,
        "pixels": SIZE,
        "steps": steps,
        "pictured": f"{PICTURED}, t = {middle}; PCA: {PCA}",
        "model": fingerprint(pipeline),
        "provenance": where,
        "flows": {},
        "commits": {},
        "curves": {},
    }
    results = records.taken_up(out, results, ["flows", "commits", "curves"])
    for name, source in videos.items():
        if name in results["curves"]:
            continue
        flow = flow_of(name, source)
        found = curves_of(pipeline, source, flow, steps, middle)
        if name == PICTURED:
            maps = {method: curve.features for method, curve in found.items()}
            picture = feature_picture(source.frames, Shown(maps, flow, middle))
            write_picture(picture_path(out), picture)
        results["flows"][name] = flow.name
        results["commits"][name] = commit
        results["curves"][name] = {
            method: {str(t): float(f"{value:.7g}") for t, value in curve.similarity.items()}
            for method, curve in found.items()
        }
        records.write(results, out)
        means = {method: f"{curve.mean:.4f}" for method, curve in found.items()}
        print(name, flow.name, means, flush=True)
    return results


def picture_path(out: Path) -> Path:
    """Where the picture of `PICTURED` goes."""
    return out.with_name(f"{out.stem}-pca.png")


def world_curves(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By method the mean curve over the world videos."""
    world = [curves for name, curves in results["curves"].items() if name.startswith("world ")]
    return {
        method: {
            t: statistics.fmean(curves[method][t] for curves in world) for t in world[0][method]
        }
        for method in METHODS
    }


def table(results: dict[str, Any]) -> str:
    """Means over the timesteps, in Markdown."""
    lines = ["| | world, exact flow | " + f"{CLIP}, DIS | the paper's plot |", "|---|---|---|---|"]
    world, clip = world_curves(results), results["curves"][CLIP]
    for method in METHODS:
        paper = f"{statistics.fmean(PAPER[method]):.4f}" if method in PAPER else ""
        ours = [statistics.fmean(curve[method].values()) for curve in (world, clip)]
        lines.append(f"| {method} | {ours[0]:.4f} | {ours[1]:.4f} | {paper} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """The curves: world videos, the clip, and what the paper's plot shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    world, clip, paper = figure.subplots(1, 3)
    for axes, title, curves in (
        (world, f"{len(SEEDS)} world videos, exact flow", world_curves(results)),
        (clip, f"{CLIP}, {results['flows'][CLIP]}", results["curves"][CLIP]),
    ):
        for method, curve in curves.items():
            axes.plot([int(t) for t in curve], list(curve.values()), label=method)
        axes.set(title=title, xlabel="timestep of the inversion")
    world.set_ylabel("cosine similarity with the former frame's, warped")
    for method, values in PAPER.items():
        paper.plot(
            range(0, 1000, 100), values, label=method, color=f"C{list(METHODS).index(method)}"
        )
    paper.set(title="read off the paper's plot (SD 1.5, its own videos)", xlabel="timestep")
    for axes in (world, clip, paper):
        axes.legend()
    figure.savefig(path, dpi=80)


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; the pictures go beside it.")] = OUT,
    steps: Annotated[int, typer.Option(help="DDIM steps of each inversion.")] = STEPS,
) -> None:
    """Follow the embedded model's features along the flow."""
    results = run(out, steps)
    draw(results, out.with_suffix(".png"))
    print(table(results))
