"""One bench for a run of pytest, and its rows in a file of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from stem_kernels.cuda import instructions

from . import records
from .cases.bench import Bench


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="JSON file that the rows are written to")


@pytest.fixture(scope="session")
def results() -> dict[str, object]:
    """This machine's results, without a row yet."""
    used = {"torch": torch.backends.cpu.get_cpu_capability(), "C++": instructions()}
    return {**records.fresh(torch.device("cpu"), torch.float32, small=False), "instructions": used}


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, results: dict[str, object]) -> Iterator[Bench]:
    """The rows of all tests; written at the end, whatever failed."""
    bench = Bench()
    yield bench
    path = request.config.getoption("--results")
    if path is not None:
        records.write({**results, "rows": [asdict(row) for row in bench.rows]}, path)
