"""The CPU's cases through pytest-benchmark, which times them; then the CPU's targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import operators
from .cases.bench import MEASURED, UNAVAILABLE, Bench, timed
from .cases.case import AnyCase, Call, UnavailableError, dtype_name
from .cases.floors import Ceilings
from .cases.layers import layer_case
from .cases.timing import Timing, summary
from .suite.targets import PROFILED, MissingError, Rows, Target, cpu_targets

CPU = torch.device("cpu")
CASES = [("operators", case) for case in operators.cpu_cases()] + [
    ("layer", layer_case(4, side, 320, CPU, torch.float32)) for side in (16, 32, 64)
]


def profiled(case: AnyCase, contender: str) -> bool:
    """Whether `make profile` measures it."""
    name = case.name.removesuffix(f" {dtype_name(case.dtype)}")
    return name in PROFILED and contender in ("cuda", "torch")


@pytest.mark.parametrize(
    ("part", "case", "contender"),
    [
        pytest.param(
            part,
            case,
            name,
            id=f"{case.name}, {case.shape}, {name}",
            marks=[pytest.mark.profile] if profiled(case, name) else [],
        )
        for part, case in CASES
        for name in case.contenders
    ],
)
def test_contender(
    benchmark: Any,
    bench: Bench,
    results: dict[str, Any],
    part: str,
    case: AnyCase,
    contender: str,
) -> None:
    benchmark.group = f"{case.name}, {case.shape}"

    def clock(call: Call, graph: bool) -> Timing:
        if benchmark.disabled:
            raise UnavailableError("pytest-benchmark is disabled")
        benchmark(call)
        return summary(benchmark.stats.stats.data)

    examine = timed(CPU, Ceilings(**results["ceilings"]), clock)
    row = bench.examine(part, case, contender, examine)
    if row.outcome == UNAVAILABLE:
        pytest.skip(row.note)
    assert row.outcome == MEASURED, row.note


@pytest.mark.parametrize("target", [pytest.param(goal, id=goal.what) for goal in cpu_targets()])
def test_target(bench: Bench, target: Target) -> None:
    try:
        value = target.measured(Rows(bench.rows))
    except MissingError as missing:
        pytest.skip(f"not measured: {missing}")
    assert target.met(value), f"{value:.3g}, wanted {target.wanted}"
