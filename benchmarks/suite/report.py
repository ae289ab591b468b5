"""The GPU suite's files: results.json, rows.csv, report.md, and the plots.

`python -m benchmarks.suite.report FOLDER` writes the others from a results.json.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import records
from ..cases import memory_report
from ..cases.bench import MEASURED, SKIPPED, UNAVAILABLE, Row, Survived
from ..cases.floors import Ceilings
from . import targets


def write(results: dict[str, Any], out: Path) -> None:
    """Write all files of a run; without matplotlib no plots."""
    rows = [Row(**row) for row in results["rows"]]
    records.write(results, out / "results.json")
    (out / "report.md").write_text(report(results))
    provenance = results["provenance"]
    same = {
        "device": results["device"],
        "torch": provenance["versions"]["torch"],
        "commit": provenance["commit"],
    }
    with (out / "rows.csv").open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Row)]
        writer = csv.DictWriter(file, [*names, *same])
        writer.writeheader()
        writer.writerows({**row, **same} for row in results["rows"])
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots are drawn: matplotlib is not installed", flush=True)
        return
    timed = [row for row in rows if row.seconds is not None]
    peaks = [row for row in rows if row.part == "memory" and row.case]
    with Survived("plots"):  # what fails here must not end the parts that follow
        if timed:
            draw(timed, out / "times.png")
        if any(row.extra_bytes for row in peaks):
            memory_report.draw(peaks, out / "memory.png")


def report(results: dict[str, Any]) -> str:
    """Markdown: the targets, then every row."""
    every = [Row(**row) for row in results["rows"]]
    rows = [row for row in every if row.case]
    ceilings = Ceilings(**results["ceilings"])
    where = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    goals = targets.gpu_targets(ceilings.flops)
    lines = [
        f"{results['device']}; {versions}; commit `{where['commit']}`; written by "
        "`python -m benchmarks.suite`.",
        "",
        f"Ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{ceilings.exponentials / 1e12:.3g}e12 exponentials/s, "
        f"{ceilings.bytes / 1e12:.3g} TB/s of a copy, read and written.",
        "",
        *(
            f"Measured on {call['cpu']}, {call['threads']} threads: {', '.join(call['parts'])}."
            for call in results["calls"]
        ),
        "",
        "Seconds: "
        + ", ".join(f"{part} {spent:.0f}" for part, spent in results["seconds"].items())
        + ".",
        "",
        *(f"**{row.part} ended early**: {row.note}\n" for row in every if not row.case),
        "## Targets",
        "",
        # They are of a GPU: toys on a CPU meet none and miss none.
        targets.table([] if results["device"] == "cpu" else rows, goals),
    ]
    asked = [row for row in rows if row.part == "correctness" and row.outcome != UNAVAILABLE]
    checks = [row for row in asked if row.outcome != SKIPPED]
    if checks:
        bad = [row for row in checks if row.outcome != MEASURED]
        late = len(asked) - len(checks)
        lines += [
            "## Correctness",
            "",
            f"{len(checks)} checks against float64, of equal bits in a second call and, on a GPU, "
            f"in a captured graph: {len(bad)} failed. The largest error is "
            f"{max(row.error or 0 for row in checks):.2f} of the error allowed."
            + (f" {late} more were not made: the part's time was over." if late else ""),
            "",
            *(
                f"- {row.contender} in {row.case}, {row.shape}, {row.dtype}: {row.note}"
                for row in bad
            ),
            "",
        ]
    timed = [row for row in rows if row.part not in ("correctness", "memory")]
    if timed:
        lines += [
            "## Times",
            "",
            "| | contender | ms | p20 ... p80 | x floor | limit | error / allowed | extra MiB | |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_cells(row) for row in timed),
            "",
        ]
    peaks = [row for row in rows if row.part == "memory"]
    if peaks:
        lines += ["## Memory", "", memory_report.table(peaks)]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    if row.outcome != MEASURED:
        return f"| {row.case} | {row.contender} | not measured | | | | | | {row.note} |"
    assert row.seconds is not None
    floor = f"{row.seconds / row.floor_seconds:.2f}" if row.floor_seconds else ""
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}"
    return (
        f"| {row.case} | {row.contender} | {1e3 * row.seconds:.3f} | {1e3 * (row.p20 or 0):.3f} "
        f"... {1e3 * (row.p80 or 0):.3f} | {floor} | {row.limit} | {row.error:.2f} | {extra} | |"
    )


def draw(timed: Sequence[Row], path: Path) -> None:
    """Milliseconds of every contender, one plot per case, with the floor."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.case for row in timed))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        of_case = [row for row in timed if row.case == name]
        times = [1e3 * (row.seconds or 0) for row in of_case]
        axes.barh([row.contender for row in of_case], times)
        if of_case[0].floor_seconds:
            axes.axvline(1e3 * of_case[0].floor_seconds, color="black", linestyle=":")
        axes.invert_yaxis()
        axes.set(title=name, xlabel="ms, logarithmic; dots: floor", xscale="log")
    figure.savefig(path, dpi=90)


def main(folder: Annotated[Path, typer.Argument(help="Folder that holds results.json.")]) -> None:
    """Write the report, the table and the plots of a run."""
    results = records.read(folder / "results.json")
    write(results, folder)
    print(report(results))


if __name__ == "__main__":
    typer.run(main)
