"""The Markdown of the study on trained weights."""

from __future__ import annotations

import statistics
from typing import Any

from stem.metrics import mean_interval

from .trained import INVERTED, OUT, SOLVERS


def table(results: dict[str, Any]) -> str:
    """The Markdown of the velocities, the samples and the inversions."""
    where, path, size = results["provenance"], f"benchmarks/results/{OUT.name}", results["size"]
    frames = [f"velocity, {count} frames" for count in size["frames"]]
    lines = [
        f"Source: [{path}]({path}) ({where['cpu']}, {where['threads']} thread, "
        f"torch {where['versions']['torch']}, commit `{where['commit']}`). The embedded video "
        "transformer, float32. FLOPs are those of the matrix products over those of exact "
        "attention. Best clusters: the form of Sparse VideoGen2 (arXiv 2505.18875); with the rest "
        "by means that of SVG-EAR (arXiv 2603.08982), without and with groups chosen by their "
        "estimated error; radial: the mask of arXiv 2506.19852, narrow with a quarter of its "
        "width. All are written from the papers' formulas, on the groups of `video_bases`.",
        "",
        f"The velocity's error, relative to exact attention's: {size['clips']} unseen clips, mean "
        f"of the noise levels {', '.join(map(str, results['levels']))}.",
        "",
        "| |" + "".join(f" FLOPs, {count} frames | off |" for count in size["frames"]),
        "|---" * (1 + 2 * len(frames)) + "|",
    ]
    for name in results[frames[0]]:
        cells = [
            f" {100 * row['flops']:.1f} % | {100 * mean_error(row):.1f} % |"
            for row in (results[key][name] for key in frames)
        ]
        lines.append(f"| {name} |{''.join(cells)}")
    lines += [
        "",
        f"Where the defaults' error comes from, {size['frames'][-1]} frames, {size['taken_apart']} "
        "clips: the velocity's error with one block not exact, and of that block's heads the error "
        "of the output and the share of keys that hold 90 % of a query's weight.",
        "",
        "| block | velocity off | heads off | keys for 90 % |",
        "|---|---|---|---|",
    ]
    for number, block in enumerate(results["blocks"]):
        heads, keys = (
            ", ".join(f"{100 * part:.2g}" for part in block[key]) for key in ("heads", "keys")
        )
        lines.append(f"| {number} | {100 * block['alone']:.1f} % | {heads} % | {keys} % |")
    lines += [
        "",
        f"Samples of {size['sampling_steps']} steps, {size['frames'][0]} frames, {size['samples']} "
        "seeds, without guidance, against those of exact attention from the same noise; the "
        "decoded videos, 95 % intervals.",
        "",
        "| | PSNR dB | SSIM |",
        "|---|---|---|",
    ]
    for name, rows in results["samples"].items():
        near = [mean_interval([row[key] for row in rows]) for key in ("psnr", "ssim")]
        lines.append(f"| {name} | {near[0]:.1f} | {near[1]:.3f} |")
    lines += [
        "",
        f"Inversion and reconstruction, {size['inversion_steps']} steps each, "
        f"{size['frames'][0]} frames, {size['inverted']} unseen clips: PSNR to the clip's latents, "
        "and of the decoded videos.",
        "",
        "| |" + "".join(f" {name}: latents dB | videos dB |" for name in INVERTED),
        "|---" * (1 + 2 * len(INVERTED)) + "|",
    ]
    for solver in SOLVERS:
        decibels = [
            f"{statistics.fmean(results['inversions'][f'{name}, {solver}'][key]):.1f}"
            for name in INVERTED
            for key in ("latents", "frames")
        ]
        lines.append(f"| {solver} | {' | '.join(decibels)} |")
    return "\n".join(lines) + "\n"


def mean_error(row: dict[str, Any]) -> float:
    """Mean of a form's errors over clips and noise levels."""
    return statistics.fmean(error for errors in row["errors"] for error in errors)
