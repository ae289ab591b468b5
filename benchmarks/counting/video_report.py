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
    floor, total = results["floor_us"], results["total_us"]
    lines = [
        f"Counted, **not measured on a GPU**: machine code for sm_90 in the model of "
        "[counted.md](benchmarks/results/counted.md), which leaves out caches and the second "
        "level's bandwidth, or the bytes at 3.0 TB/s where that is more. Source: "
        "[benchmarks/results/video-counted.json](benchmarks/results/video-counted.json) "
        f"(Triton {where['versions']['triton']}, commit `{where['commit']}`). Wan 2.1 at 480p: "
        f"{shape['frames']} x {shape['height']} x {shape['width']} = {shape['tokens']:,} tokens, "
        f"{shape['heads']} heads of {shape['channels']} channels, {shape['dtype']}, "
        f"{shape['num_bases']:,} bases, window 1, no text.",
        "",
        "| kernel | launches | model, us | bytes, us | counted, us |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        model = "" if row["model_us"] is None else f"{row['model_us']:.0f}"
        name = f"{SAID[row['kernel']]} (`{row['kernel']}`)" if row["kernel"] in SAID else TORCH
        lines.append(
            f"| {name} | {row['launches']} | {model} | {row['memory_us']:.0f} | "
            f"{row['counted_us']:.0f} |"
        )
    met = "met" if total <= GOAL * floor else "not met"
    lines += [
        f"| all | {sum(row['launches'] for row in results['rows'])} | | | {total:.0f} |",
        "",
        f"Exact attention's 4 n² d FLOPs a head take {floor:.0f} us at 798 TFLOP/s, the rate of a "
        f"large product, so this is {total / floor:.2f} of its floor; the goal, {GOAL}, is {met}. "
        f"Torch's own kernels count {results['torch_us']} us each, its sort as "
        f"{results['sort_kernels']} of them, which is assumed and not counted.",
    ]
    return "\n".join(lines)
