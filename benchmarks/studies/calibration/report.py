"""The table and the plot of the study of calibrated bases, from its results file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .variants import BASELINE, FEW, NAMES, PER_FRAME


def widest_layers(results: dict[str, Any]) -> Iterator[dict[str, dict[str, float]]]:
    """Figures by variant of the layers with the most tokens, case by case."""
    for case in results["cases"].values():
        yield from (layer["figures"] for layer in case["layers"].values() if layer["widest"])


def errors(results: dict[str, Any], variant: str) -> list[float]:
    return [figures[variant]["error"] for figures in widest_layers(results)]


def seconds(results: dict[str, Any], variant: str) -> float:
    """Median seconds of one of these layers."""
    return statistics.median(figures[variant]["seconds"] for figures in widest_layers(results))


def sharpened(results: dict[str, Any], variant: str, factor: str) -> list[float]:
    return [
        figures[variant]
        for case in results["cases"].values()
        for name, figures in case["sharpened"].items()
        if name.endswith(f" x {factor}")
    ]


def factors(results: dict[str, Any]) -> list[str]:
    """Factors of the logits that attention was sharpened by."""
    names = (name for case in results["cases"].values() for name in case["sharpened"])
    return sorted({name.rsplit(" ", 1)[1] for name in names})


def predictions(results: dict[str, Any], variant: str) -> list[float]:
    return [case["unet"][variant] for case in results["cases"].values() if case["unet"]]


def percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def table(results: dict[str, Any]) -> str:
    """The study in Markdown."""
    wheres = results["provenance"]
    count = len(list(widest_layers(results)))
    tokens = {
        layer["tokens"]
        for case in results["cases"].values()
        for layer in case["layers"].values()
        if layer["widest"]
    }
    commits = ", ".join(sorted({f"`{case['commit']}`" for case in results["cases"].values()}))
    sharp = factors(results)
    heads = [
        "", "widest layers, mean", "worst", "against all tokens (worst)", "nearer than per-frame",
        "all layers, mean", *(f"logits x {factor}" for factor in sharp), "UNet's prediction",
        "CPU seconds a layer" if wheres["gpu"] is None else "seconds a layer",
    ]  # fmt: skip
    lines = [
        f"Relative error against attention over all frames; {results['frames']} frames of "
        f"{results['pixels']}x{results['pixels']} pixels, {len(results['cases'])} cases of a "
        f"video and a noise level ({', '.join(results['cases'])}), {count} widest layers of "
        f"{', '.join(f'{number:,}' for number in sorted(tokens))} tokens. {wheres['cpu']}, one "
        f"thread, torch {wheres['versions']['torch']}, commit {commits}.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    everywhere = [
        layer["figures"] for case in results["cases"].values() for layer in case["layers"].values()
    ]
    baseline, per_frame = errors(results, BASELINE), errors(results, PER_FRAME)
    for variant in NAMES:
        own = errors(results, variant)
        ratios = [error / other for error, other in zip(own, baseline, strict=True)]
        nearer = sum(error < other for error, other in zip(own, per_frame, strict=True))
        whole = predictions(results, variant)
        cells = [
            percent(statistics.fmean(own)),
            percent(max(own)),
            f"{statistics.fmean(own) / statistics.fmean(baseline):.2f} ({max(ratios):.2f})",
            "" if variant == PER_FRAME else f"{nearer} of {count}",
            percent(statistics.fmean(figures[variant]["error"] for figures in everywhere)),
            *(
                percent(statistics.fmean(sharpened(results, variant, factor)))
                if variant in FEW
                else ""
                for factor in sharp
            ),
            percent(statistics.fmean(whole)) if whole else "",
            f"{seconds(results, variant):.2f}",
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_of_lengths(results)]) + "\n"


def _of_lengths(results: dict[str, Any]) -> list[str]:
    """A table of the mean errors and times by length of the video."""
    by_length: dict[str, list[dict[str, dict[str, float]]]] = {}
    for name, case in results["lengths"].items():
        layers = [figures for layer, figures in case.items() if layer != "commit"]
        by_length.setdefault(name.rsplit(", ", 1)[1], []).extend(layers)
    if not by_length:
        return []
    heads = ["", *by_length]
    lines = [
        "",
        f"Of longer videos, the widest layers of {', '.join(results['lengths'])}: mean error, "
        "seconds a layer.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for variant in FEW:
        cells = []
        for layers in by_length.values():
            own = [figures[variant] for figures in layers]
            error = statistics.fmean(figures["error"] for figures in own)
            taken = statistics.median(figures["seconds"] for figures in own)
            cells.append(f"{percent(error)}, {taken:.2f} s")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Error against time; the line joins the variants that none is both nearer and faster than."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    points = {
        name: (seconds(results, name), statistics.fmean(errors(results, name))) for name in NAMES
    }
    for name, (cost, error) in points.items():
        calibrated = "joint" in name or "moments" in name
        axes.plot(cost, error, "o", color="C1" if calibrated else "C0")
        axes.annotate(name, (cost, error), fontsize=8, xytext=(4, 4), textcoords="offset points")
    front: list[tuple[float, float]] = []
    for point in sorted(points.values()):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    axes.plot(*zip(*front, strict=True), color="grey", linewidth=0.8)
    axes.set(
        title="self-attentions with the most tokens, against attention over all frames",
        xlabel="seconds a layer",
        ylabel="relative error, mean",
        xscale="log",
        yscale="log",
    )
    figure.savefig(path, dpi=110)
