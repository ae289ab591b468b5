"""A benchmark's figures on the console."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, TypeVar

from .app import console, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..workflows.benchmark import BenchmarkEvaluation

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
_NAMED = 10  # absent edits


def print_benchmark(found: BenchmarkEvaluation) -> None:
    """Print the means, what they are measured by, and what is missing or could not be judged."""
    console.print(benchmark_table(found))
    for line in benchmark_lines(found):
        say(line)


def benchmark_table(found: BenchmarkEvaluation) -> Table:
    """A row for each metric, a column for each kind of edit and one for all."""
    from rich.table import Table

    from ..workflows.benchmark import ALL

    judged = {kind: sum(kind in (edit.kind, ALL) for edit in found.edits) for kind in found.asked}
    table = Table(title=f"{found.benchmark}: means over edits")
    table.add_column("metric", no_wrap=True)
    for kind in found.asked:
        table.add_column(kind.replace("_", " "), justify="right")
    table.add_row("edits judged", *(f"{judged[kind]} of {n}" for kind, n in found.asked.items()))
    for figure in found.means:
        arrow = "↑" if figure.higher_is_better else "↓"
        shown = (_shown(figure.means[kind], judged[kind]) for kind in found.asked)
        table.add_row(f"{figure.metric} {arrow}", *shown)
    return table


def benchmark_lines(found: BenchmarkEvaluation) -> list[str]:
    """What the figures are measured by, what is missing, and what was not judged, a line each."""
    from ..workflows.benchmark import ALL

    by = grouped(found.means, lambda figure: figure.measured_by)
    lines = [f"{', '.join(f.metric for f in group)}: {name}" for name, group in by.items()]
    missing = [f for edit in found.edits for f in edit.figures if f.value is None]
    for (reason, remedy), group in grouped(missing, lambda f: (f.missing, f.remedy)).items():
        metrics = grouped(group, lambda f: f.metric)
        edits = max(len(figures) for figures in metrics.values())
        lines.append(f"missing: {', '.join(metrics)}, of {edits} edits: {reason}; {remedy}")
    lines += [f"not judged: {problem}" for problem in found.problems]
    if found.absent:
        more = len(found.absent) - _NAMED
        names = ", ".join(found.absent[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"not there: {len(found.absent)} of {found.asked[ALL]} edits: {names}")
    return lines


def _shown(mean: float | None, judged: int) -> str:
    if mean is None:
        return "missing" if judged else ""
    return f"{mean:.4g}"


def grouped(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Things by their key, in the order of the first with each."""
    groups: dict[K, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups
