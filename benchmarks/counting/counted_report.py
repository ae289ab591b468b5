"""The tables of `counted` in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {
    "tensor": "products",
    "fp32": "fp32, IMAD",
    "integer": "integer",
    "exp2": "exp2, rcp",
    "shared": "shuffle, LDS, STS",
    "memory": "LDG, STG, cp.async",
    "uniform": "uniform",
    "other": "other",
    "all": "all",
}
"""Columns of the table of loops."""
SAMPLE = "em feature d=320, 22 tokens a base"
"""EM on the sample that a layer's EM reads, however long the video is."""
SPECIFIED = {
    "em key d=40": (122, 284),
    "em key d=64": (124, 268),
    "em key d=80": (148, 318),
    "em key d=160": (228, 477),
    "em feature d=320": (66, 144),
    "em feature d=640": (None, 55),
    "em feature d=1280": (None, 39),
    "basis attention d=40": (77, 207),
    "basis attention d=64": (76, 165),
    "basis attention d=80": (98, 227),
    "basis attention d=160": (181, 522),
}
"""Issue-bound and model of the kernels before, counted apart by another model."""


@dataclass(frozen=True)
class Goal:
    """A bound that the kernels shall keep: `value` of a case's row, at most `most`."""

    what: str
    case: str
    value: Callable[[Mapping[str, Any]], float]
    most: float


GOALS = (
    *(
        Goal(
            f"EM d={width}, issue-bound over floor", f"em key d={width}",
            lambda row: row["issue_us"] / row["floor_us"], 1.3,
        )
        for width in (40, 64, 80)
    ),
    Goal("EM d=40, model, us", "em key d=40", lambda row: row["model_us"], 185),
    *(
        Goal(
            f"attention d={width}, model, us", f"basis attention d={width}",
            lambda row: row["model_us"], most,
        )
        for width, most in ((40, 141), (64, 134), (80, 161), (160, 400))
    ),
    # A fifth of what EM on all of these tokens takes.
    Goal(f"{SAMPLE}, model, us", SAMPLE, lambda row: row["model_us"], 21),
)  # fmt: skip


def text(results: Mapping[str, Any]) -> str:
    """Everything that the runs counted, of the kernels before and now."""
    runs = {name: run for name in ("before", "now") if (run := results.get(name))}
    latest = list(runs.values())[-1]
    lines = ["# Counted, not measured", "", *_origins(runs), "", *INTRODUCTION, ""]
    lines += [
        "| case | floor us (limit) | memory us | " + _headings("issue-bound us", runs)
        + _headings("pipe-bound us", runs) + _headings("model us", runs) + "model over floor |",
        "|---" * (4 + 3 * len(runs)) + "|",
    ]  # fmt: skip
    for case, row in latest.items():
        if case == "provenance":
            continue
        figures = [
            f"{run[case][name]:.0f}" if case in run else ""
            for name in ("issue_us", "pipe_us", "model_us")
            for run in runs.values()
        ]
        lines.append(
            f"| {case} | {row['floor_us']:.0f} ({row['limit']}) | {row['memory_us']:.0f} | "
            + " | ".join(figures)
            + f" | {row['model_us'] / row['floor_us']:.1f} |"
        )
    lines += ["", "## Goals", "", "| what | " + _headings("", runs) + "goal | met |"]
    lines += ["|---" * (3 + len(runs)) + "|"]
    for goal in GOALS:
        found = [run.get(goal.case) for run in runs.values()]
        met = "yes" if goal.value(latest[goal.case]) <= goal.most else "**no**"
        figures = ["" if row is None else f"{goal.value(row):.3g}" for row in found]
        lines.append(f"| {goal.what} | {' | '.join(figures)} | <= {goal.most:g} | {met} |")
    for name, run in runs.items():
        lines += ["", f"## A pass of the inner loop, {name}", "", *_loops(run)]
    if "before" in runs:
        lines += ["", *_beside_another_model(runs["before"])]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "Nothing here ran on a GPU. The kernels' own launchers were called for sm_90, what they would",
    "have launched was compiled, and the machine code was counted. Shapes are the suite's: n =",
    "131,072 tokens (a quarter at C = 640, a sixteenth at 1,280), 8 heads, K = 256, float16.",
    "",
    "- floor: the operator's products at 798 TFLOP/s and bytes at 3.0 TB/s (both measured on an",
    "  H100 80GB HBM3), exponentials at 16 a clock, 132 multiprocessors and 1.98 GHz.",
    "- memory: the same bytes alone.",
    "- issue-bound: all instructions at 4 a clock and multiprocessor, 132 of them, 1.755 GHz.",
    "- pipe-bound: the pipe that is held longest, the same way.",
    "- model: a quarter of a multiprocessor that issues in order what is ready",
    "  (`benchmarks/counting/scoreboard.py`), whole programs and rounds of them; caches and",
    "  bank conflicts are left out, so it is optimistic.",
)


def _origins(runs: Mapping[str, Any]) -> list[str]:
    found = []
    for name, run in runs.items():
        where = run["provenance"]
        found.append(
            f"{name.capitalize()}: commit `{where['commit']}`, Triton "
            f"{where['versions']['triton']}; written by `python -m benchmarks.counting.counted`."
        )
    return [line for origin in found for line in (origin, "")][:-1]


def _headings(what: str, runs: Mapping[str, Any]) -> str:
    """A column a run."""
    names = list(runs) if len(runs) > 1 or not what else [""]
    return "".join(f"{', '.join(part for part in (what, name) if part)} | " for name in names)


def _loops(run: Mapping[str, Any]) -> list[str]:
    lines = [
        "| case | kernel | programs x warps | a multiprocessor | registers | passes | "
        + " | ".join(KINDS.values()) + " | local | narrow | longest pipe |",
        "|---" * (9 + len(KINDS)) + "|",
    ]  # fmt: skip
    for case, row in run.items():
        if case == "provenance":
            continue
        seen = []
        for each in row["launches"]:
            if each in seen:
                continue
            seen.append(each)
            counts = [str(each["loop"].get(kind, 0)) for kind in KINDS]
            lines.append(
                f"| {case} | {each['kernel']} | {each['programs']} x {each['warps']} | "
                f"{each['resident']} | {each['registers']} | {each['trips']} | "
                + " | ".join(counts)
                + f" | {each['spills']} | {each['narrow']} | {each['pipe']} |"
            )
    return lines


def _beside_another_model(before: Mapping[str, Any]) -> list[str]:
    lines = [
        "## The model beside another",
        "",
        "The same kernels were counted apart, by another model of the same kind.",
        "",
        "| case | issue-bound us, here / there | model us, here / there |",
        "|---|---|---|",
    ]
    for case, (issue, model) in SPECIFIED.items():
        row = before[case]
        issued = f"{row['issue_us']:.0f} / {issue or '-'}"
        ratio = row["model_us"] / model
        lines.append(f"| {case} | {issued} | {row['model_us']:.0f} / {model} ({ratio:.2f}) |")
    return lines
