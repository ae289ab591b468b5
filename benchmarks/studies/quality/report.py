"""The quality study's table and plots, from its results file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from stem.inversion import METHODS
from stem.metrics import Interval, mean_interval

from .variants import CEILING, FRAMES, VARIANTS, base_of


def is_world(name: str) -> bool:
    return name.startswith("world ")


def values(results: dict[str, Any], variant: str, figure: str, *, world: bool) -> list[float]:
    """A figure of all world videos, or of all natural ones, in the order of the videos."""
    figures = results["rows"][variant][figure]
    named = zip(results["order"], figures, strict=True)
    return [value for name, value in named if is_world(name) == world]


def differences(results: dict[str, Any], variant: str, against: str, figure: str) -> Interval:
    """By how much a variant is above another on the same world videos."""
    ours, theirs = (values(results, name, figure, world=True) for name in (variant, against))
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def is_compared(results: dict[str, Any], name: str) -> bool:
    """Whether there is another variant to compare with: a run may be of a few variants only."""
    base = base_of(name)
    return name != base and base in results["rows"]


def in_order(results: dict[str, Any]) -> list[str]:
    """The rows that there are, in the study's order."""
    return [name for name in (CEILING, *VARIANTS) if name in results["rows"]]


def table(results: dict[str, Any], names: Iterable[str] | None = None) -> str:
    """The study in Markdown: rows `names`, or all."""
    lines = [
        "| | PSNR dB, world | against stem | SSIM, world | PSNR dB, natural | latent error | "
        "warped similarity | off all-frame attention | seconds a video |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in in_order(results) if names is None else names:
        world = partial(values, results, name, world=True)
        against = ""
        if is_compared(results, name):
            against = f"{differences(results, name, base_of(name), 'psnr'):+.2f}"
        cells = [
            f"{mean_interval(world('psnr')):.2f}",
            against,
            f"{mean_interval(world('ssim')):.3f}",
            f"{statistics.fmean(values(results, name, 'psnr', world=False)):.2f}",
        ]
        if name == CEILING:
            cells += ["", "", "", ""]
        else:
            cells += [
                f"{statistics.fmean(world('latent_error')):.4f}",
                f"{statistics.fmean(world('similarity')):.4f}",
                f"{mean_interval(world('attention_error')):.3f}",
                f"{statistics.median(world('seconds')):.1f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_intervals(axes: Any, intervals: dict[str, Interval]) -> None:
    axes.errorbar(
        [interval.mean for interval in intervals.values()],
        list(intervals),
        xerr=[interval.half_width for interval in intervals.values()],
        fmt="o",
        capsize=3,
    )
    axes.invert_yaxis()


def draw(results: dict[str, Any], path: Path) -> None:
    """By variant fidelity and nearness to all-frame attention, its price, similarity in time."""
    from matplotlib.figure import Figure

    videos = sum(is_world(name) for name in results["order"])
    figure = Figure(figsize=(17, 15), layout="constrained")
    (fidelity, nearness), (features, price) = figure.subplots(2, 2)
    compared = [name for name in in_order(results) if is_compared(results, name)]
    plot_intervals(
        fidelity, {name: differences(results, name, base_of(name), "psnr") for name in compared}
    )
    fidelity.axvline(0, color="black", linestyle=":")
    fidelity.set(
        title=f"reconstruction of {videos} world videos, video by video",
        xlabel="PSNR above stem's, dB (95 % interval); 16 frames: above global bases'",
    )
    errors = {
        name: mean_interval(values(results, name, "attention_error", world=True))
        for name in in_order(results)
        if name not in (CEILING, "inflated")
    }
    plot_intervals(nearness, errors)
    nearness.set(
        title="self-attentions against all-frame attention",
        xlabel="relative error (95 % interval)",
        xscale="log" if errors else "linear",  # without a point an axis cannot be logarithmic
    )
    for name, curve in results["curves"].items():
        features.plot([int(timestep) for timestep in curve], list(curve.values()), label=name)
    features.set(title="features warped by the true flow", xlabel="timestep of the inversion")
    features.set_ylabel("cosine similarity, last self-attention")
    if results["curves"]:
        features.legend()
    for name, error in errors.items():
        if VARIANTS[name].frames == FRAMES:
            seconds = statistics.median(values(results, name, "seconds", world=True))
            price.plot(seconds, error.mean, "o", color="C1" if name in METHODS else "C0")
            price.annotate(name, (seconds, error.mean), fontsize=7)
    price.set(
        title=f"{FRAMES} frames, there and back",
        xlabel="seconds",
        ylabel="relative error against all-frame attention",
        yscale="log" if price.lines else "linear",
    )
    figure.savefig(path, dpi=110)
