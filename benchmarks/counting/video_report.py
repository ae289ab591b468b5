"""The table of `video` in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import records

OUT = records.RESULTS / "video-counted.json"
GOAL = 0.25
"""Share of exact attention's floor that the whole attention may take."""
SAID = {
    "directions": "EM: tokens for a start",
    "many_mass": "EM: log-sum-exps",
    "many_sums": "EM: sums",
    "update": "EM: bases",
    "nearest_narrow": "assignment",
    "means": "means of bases",
    "products_of_tokens": "moments",
    "window_attention": "window, bases and moments in one softmax",
}
TORCH = "torch's own, a sort among them"


def table(results: Mapping[str, Any]) -> str:
    """The section in docs/video-transformers.md."""
    where, shape = results["provenance"], results["shape"]
    floor, totals, of_forms = results["floor_us"], results["total_us"], results["rows"]
    lines = [
        f"Counted, **not measured on a GPU**: machine code for sm_90 in the model of "
        "[counted.md](benchmarks/results/counted.md), which leaves out caches and the second "
        "level's bandwidth, or the bytes at 3.0 TB/s where that is more. Source: "
        "[benchmarks/results/video-counted.json](benchmarks/results/video-counted.json) "
        f"(Triton {where['versions']['triton']}, commit `{where['commit']}`). Wan 2.1 at 480p: "
        f"{shape['frames']} x {shape['height']} x {shape['width']} = {shape['tokens']:,} tokens, "
        f"{shape['heads']} heads of {shape['channels']} channels, {shape['dtype']}, no text.",
        "",
        "| kernel | launches |" + "".join(f" {form}: model, us | bytes, us |" for form in of_forms),
        "|---" * (2 + 2 * len(of_forms)) + "|",
    ]
    for of_kernel in zip(*of_forms.values(), strict=True):
        name = of_kernel[0]["kernel"]
        said = f"{SAID[name]} (`{name}`)" if name in SAID else TORCH
        cells = "".join(
            f" {'' if row['model_us'] is None else format(row['model_us'], '.0f')} | "
            f"{row['memory_us']:.0f} |"
            for row in of_kernel
        )
        lines.append(f"| {said} | {of_kernel[0]['launches']} |{cells}")
    shares = ", ".join(
        f"{form} {total:.0f} us, {total / floor:.2f}" for form, total in totals.items()
    )
    met = "met by all" if max(totals.values()) <= GOAL * floor else "not met by all"
    lines += [
        "",
        f"In all, the larger of both for each launch, and as a share of exact attention's floor: "
        f"{shares}. The floor is 4 n² d FLOPs a head at 798 TFLOP/s, the rate of a large product: "
        f"{floor:.0f} us. The goal, {GOAL}, is {met}. Small kernels count {results['torch_us']} us "
        f"each, torch's sort as {results['sort_kernels']} of them, which is assumed and not "
        "counted.",
    ]
    return "\n".join(lines)
