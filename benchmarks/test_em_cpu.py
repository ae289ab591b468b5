"""The torch backend against eager torch on the CPU: EM of R = 5 at B=8, n=32768, d=40, K=256.

Two eager versions: `eager_soft_em` divides the responsibilities by the mass before the product,
and the bound is asserted against it; the leaner one divides after the product, and its ratio is
recorded without a bound, being below it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stem_kernels import initial_bases, soft_em
from stem_kernels.measure import PeakMemory
from stem_kernels.testing import clustered_tokens, eager_em_statistics, eager_soft_em

TIME_RATIO = 5.0
MEMORY_RATIO = 10.0
ROUNDS = 7

Inputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    features = clustered_tokens((8, 32768, 40))
    return features, initial_bases(features, 256)


def chunked(inputs: Inputs) -> torch.Tensor:
    return soft_em(*inputs, empty="zero", backend="torch").bases


def lean_eager(features: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        sums, mass, _ = eager_em_statistics(features, bases)
        bases = sums / (mass + 1e-4).unsqueeze(-1)
    return bases


def seconds(work: Callable[[], object]) -> list[float]:
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def objective(inputs: Inputs, bases: torch.Tensor) -> float:
    """The mean over tokens of logsumexp_k S, which two good runs agree on."""
    directions = bases / (bases.norm(dim=-1, keepdim=True) + 1e-4)
    logits = inputs[0][:, ::16] @ directions.mT / 0.01
    return float(torch.logsumexp(logits, -1).mean())


def test_time(benchmark: Any, inputs: Inputs) -> None:
    benchmark.group = "EM, CPU"
    results = {"eager": eager_soft_em(*inputs), "chunked": chunked(inputs)}
    agreement = objective(inputs, results["chunked"]) / objective(inputs, results["eager"])
    assert agreement == pytest.approx(1.0, rel=1e-3)
    eager = statistics.median(seconds(lambda: eager_soft_em(*inputs)))
    lean = statistics.median(seconds(lambda: lean_eager(*inputs)))
    benchmark.pedantic(lambda: chunked(inputs), rounds=ROUNDS)
    ours = benchmark.stats.stats.median
    benchmark.extra_info.update(
        eager_seconds=eager,
        lean_eager_seconds=lean,
        times_faster_than_eager=eager / ours,
        times_faster_than_lean_eager=lean / ours,
        target=TIME_RATIO,
        objective_over_eager=agreement,
    )
    assert eager / ours >= TIME_RATIO


def test_memory(benchmark: Any, inputs: Inputs) -> None:
    benchmark.group = "EM, CPU, extra memory"
    chunked(inputs)
    with PeakMemory() as eager:
        eager_soft_em(*inputs)
    with PeakMemory() as ours:
        benchmark.pedantic(lambda: chunked(inputs), rounds=1)
    if eager.extra_bytes is None or ours.extra_bytes is None:
        pytest.skip("this system does not report the peak of the resident set")
    benchmark.extra_info.update(
        eager_extra_bytes=eager.extra_bytes, extra_bytes=ours.extra_bytes, target=MEMORY_RATIO
    )
    assert ours.extra_bytes * MEMORY_RATIO <= eager.extra_bytes
