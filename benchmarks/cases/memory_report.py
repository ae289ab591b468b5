"""Table and plot of peak memory over the number of frames; they need no diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .bench import Row

KINDS = ("per-frame", "sparse-causal", "all-frame", "stem")


def table(rows: Sequence[Row]) -> str:
    """Markdown: MiB by kind and N, then what holds the peak of the longest video."""
    names = list(dict.fromkeys(row.case for row in rows))
    found = {(row.contender, row.case): row for row in rows}
    heads = [name.removeprefix("memory ") for name in names]
    lines = [f"| MiB | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
    for kind in KINDS:
        cells = []
        for name in names:
            row = found.get((kind, name))
            if row is None:
                cells.append("not measured")
            elif row.extra_bytes is None:
                cells.append(row.note)
            else:
                cells.append(f"{row.extra_bytes / 2**20:.0f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for kind in KINDS:
        held = [row.holders for row in rows if row.contender == kind and row.holders]
        if held:
            lines += ["", f"At its peak on the longest video {kind} holds, in MiB: {held[-1]}."]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Peak over N, both in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        known = [
            (int(row.case.partition("=")[2]), row.extra_bytes / 2**20)
            for row in rows
            if row.contender == kind and row.extra_bytes
        ]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", label=kind)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(title="One attention layer, above its input", xlabel="frames N", ylabel="peak MiB")
    axes.legend()
    figure.savefig(path, dpi=110)
