"""The editing study's tables, from its results file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from stem.inversion import METHODS as INVERSIONS
from stem.metrics import Interval, mean_interval
from stem.world import EDIT_KINDS

from .variants import (
    ABLATION,
    BASELINE,
    CEILING,
    CROSSED,
    LONG,
    LONG_FRAMES,
    OURS,
    UNEDITED,
    VARIANTS,
    Series,
    series_of,
)

HEADS = (
    "| {} | scenes | all dB | against pnp | inside | outside | Warp-Err | against pnp | "
    "colour % | shape % | IoU | seconds | MiB |"
)
STEPS = [name for name, _ in ABLATION.values() if len(VARIANTS[name].kinds) == 1]


def rows_of(results: dict[str, Any], kind: str) -> dict[str, Series]:
    """The rows of one kind's table by label; the ablation's own rows are not among them."""
    names = [CEILING, UNEDITED, *(name for name in VARIANTS if name not in STEPS)]
    rows = {name: series_of(results["frames"], kind, name) for name in names}
    rows["fatezero on stem"] = series_of(results["frames"], kind, "fatezero", "stem")
    return {label: series for label, series in rows.items() if is_there(results, series)}


def values(results: dict[str, Any], series: Series, figure: str) -> dict[str, float]:
    """A figure by scene, without the scenes that do not have it; empty for an unknown series."""
    row = results["rows"].get(series.name, {})
    return {seed: found[figure] for seed, found in row.items() if found[figure] is not None}


def differences(
    results: dict[str, Any], series: Series, against: Series, figure: str
) -> Interval | None:
    """By how much a series is above another, scene by scene; None without a common scene."""
    ours, theirs = (values(results, each, figure) for each in (series, against))
    common = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return mean_interval(common) if common else None


def is_there(results: dict[str, Any], series: Series) -> bool:
    return series.name in results["rows"]


def report(results: dict[str, Any]) -> str:
    """The study in Markdown."""
    frames = results["frames"]
    lines = ["# Edits of world videos", "", *introduction(results), ""]
    for kind in EDIT_KINDS:
        lines += table(results, f"{kind}, {frames} frames", rows_of(results, kind))
    ablation = {label: series_of(frames, "colour", *row) for label, row in ABLATION.items()}
    if steps := table(results, f"colour, {frames} frames", ablation):
        lines += ["Fusion's steps, one after the other, on colour edits:", "", *steps]
    for kind in EDIT_KINDS:
        rows = {name: series_of(LONG_FRAMES, kind, name) for name in (CEILING, UNEDITED, *LONG)}
        lines += table(results, f"{kind}, {LONG_FRAMES} frames", rows)
    lines += crossed_tables(results)
    return "\n".join(lines)


def introduction(results: dict[str, Any]) -> list[str]:
    where = results["provenance"]
    commits = dict.fromkeys(commit for found in results["commits"].values() for commit in found)
    named = ", ".join(f"`{commit}`" for commit in commits)
    side = results["pixels"]
    return [
        f"{results['videos']}; {side}x{side} pixels, {results['steps']} steps there and back, "
        f"embedded model. Source: {where['cpu']}, torch {where['versions']['torch']}, one thread, "
        f"processes at a time: {results['processes']}, commit {named}.",
        "",
        "PSNR is against the exact answer, the edited scene as it is rendered: of all pixels of a "
        "video, of those that the edit changes, and of the others. Warp-Err is under the exact "
        "flow of the edited scene. Colour and shape: share of the frames in which the judge sees "
        "what the target prompt says. IoU: of the mask before it is dilated and the latent cells "
        "that the object touches before or after the edit. ±: 95 % interval of the mean; against "
        "pnp: of the differences scene by scene. Seconds (median) and MiB (largest peak above the "
        f"loaded model) are of the edit alone. {CEILING}: the exact answer through the "
        f"autoencoder; {UNEDITED}: the source through it. The inversion is the one that a method "
        "was published with: "
        + ", ".join(f"{name} {variant.inversion}" for name, variant in VARIANTS.items())
        + ".",
    ]


def table(results: dict[str, Any], head: str, rows: dict[str, Series]) -> list[str]:
    """Lines of a table, without the series that are not measured; none at all if none is."""
    there = {label: series for label, series in rows.items() if is_there(results, series)}
    if not there:
        return []
    lines = [HEADS.format(head), "|---" * (HEADS.count("|") - 1) + "|"]
    for label, series in there.items():
        lines.append(f"| {label} | {' | '.join(cells(results, series))} |")
    return [*lines, ""]


def cells(results: dict[str, Any], series: Series) -> Iterable[str]:
    def interval(figure: str, digits: int) -> str:
        found = list(values(results, series, figure).values())
        return f"{mean_interval(found):.{digits}f}" if found else ""

    def against(figure: str) -> str:
        base = series_of(series.frames, series.kind, BASELINE)
        found = None if series == base else differences(results, series, base, figure)
        return "" if found is None else f"{found:+.2f}"

    def share(figure: str) -> str:
        return f"{100 * statistics.fmean(values(results, series, figure).values()):.0f}"

    seconds, peaks = (values(results, series, name).values() for name in ("seconds", "mebibytes"))
    return [
        str(len(results["rows"][series.name])),
        interval("all", 2),
        against("all"),
        interval("inside", 2),
        interval("outside", 2),
        interval("warp", 2),
        against("warp"),
        share("colour"),
        share("shape"),
        interval("overlap", 2),
        f"{statistics.median(seconds):.1f}" if seconds else "",
        f"{max(peaks):.0f}" if peaks else "",
    ]


def crossed_tables(results: dict[str, Any]) -> list[str]:
    """Methods by inversions: PSNR and Warp-Err, and what STEM inversion adds to each."""
    lines = []
    for figure, unit in (("all", "dB, all"), ("warp", "Warp-Err")):
        rows = []
        for kind in EDIT_KINDS:
            for name in CROSSED:
                by_inversion = {
                    inversion: series_of(results["frames"], kind, name, inversion)
                    for inversion in INVERSIONS
                }
                if all(is_there(results, series) for series in by_inversion.values()):
                    rows.append(crossed_row(results, f"{kind}, {name}", by_inversion, figure))
        if rows:
            heads = [f"{unit}, on {inversion}" for inversion in INVERSIONS]
            more = [f"stem over {inversion}" for inversion in INVERSIONS if inversion != "stem"]
            lines += [f"| | scenes | {' | '.join(heads + more)} |", "|---" * 9 + "|", *rows, ""]
    if lines:
        note = (
            "Each method on each inversion: means of the scenes that all four were tried on, and "
            "differences on all scenes that both were tried on."
        )
        lines = [note, "", *lines]
    return lines


def crossed_row(
    results: dict[str, Any], label: str, by_inversion: dict[str, Series], figure: str
) -> str:
    found = {name: values(results, series, figure) for name, series in by_inversion.items()}
    common = set.intersection(*(set(by_seed) for by_seed in found.values()))
    means = [
        f"{mean_interval([by_seed[seed] for seed in sorted(common)]):.2f}"
        for by_seed in found.values()
    ]
    over = [
        f"{differences(results, by_inversion['stem'], series, figure):+.2f}"
        for name, series in by_inversion.items()
        if name != "stem"
    ]
    return f"| {label} | {len(common)} | {' | '.join(means + over)} |"


def gains(results: dict[str, Any]) -> dict[tuple[str, int], float]:
    """By how many dB fusion is above pnp, by kind and seed, where both are measured."""
    found = {}
    for kind in EDIT_KINDS:
        series = (series_of(results["frames"], kind, name) for name in (OURS, BASELINE))
        ours, theirs = (values(results, each, "all") for each in series)
        for seed in ours:
            if seed in theirs:
                found[kind, int(seed)] = ours[seed] - theirs[seed]
    return found
