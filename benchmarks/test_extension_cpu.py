"""The C++ backend against the torch backend on the CPU, at UNet shapes, float32.

Both work on the same inputs, in turns, so that a machine that slows down slows both. Every result
is checked before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stem_kernels import basis_attention, cuda, em_statistics, initial_bases, soft_em
from stem_kernels.testing import clustered_tokens, eager_basis_attention, max_error

BASES = 256
ITERATIONS = 5
ROUNDS = 7
TARGET = 1.5
CHECKED = 1024

pytestmark = pytest.mark.skipif(
    cuda.load_error("cpu") is not None, reason=f"no extension: {cuda.load_error('cpu')}"
)


def compare(
    benchmark: Any, call: Callable[[str], object], flops: float, exponentials: float
) -> None:
    """Time both backends in turns; the C++ backend's is the benchmark's own row."""
    seconds: dict[str, list[float]] = {"torch": [], "cuda": []}

    def timed(backend: str) -> None:
        start = time.perf_counter()
        call(backend)
        seconds[backend].append(time.perf_counter() - start)

    timed("torch")
    benchmark.pedantic(
        lambda: timed("cuda"), setup=lambda: timed("torch"), rounds=ROUNDS, warmup_rounds=1
    )
    ours, theirs = (statistics.median(seconds[name][1:]) for name in ("cuda", "torch"))
    benchmark.extra_info.update(
        torch_seconds=theirs,
        cuda_seconds=ours,
        times_faster_than_torch=theirs / ours,
        target=TARGET,
        gigaflops=flops / ours / 1e9,
        gigaexponentials=exponentials / ours / 1e9,
        kernels=cuda.instructions(),
    )
    assert theirs / ours >= TARGET


@pytest.mark.parametrize(
    ("batch", "tokens", "width"),
    [(8, 32768, 40), (1, 4 * 64 * 64, 320), (1, 4 * 32 * 32, 640), (1, 4 * 16 * 16, 1280)],
)
def test_soft_em(benchmark: Any, batch: int, tokens: int, width: int) -> None:
    benchmark.group = f"EM, R={ITERATIONS}, B={batch}, n={tokens}, D={width}, K={BASES}"
    features = clustered_tokens((batch, tokens, width))
    bases = initial_bases(features, BASES)
    # EM is chaotic in its assignments, so one pass is checked, against float64.
    exact = em_statistics(features.double(), bases.double(), backend="torch")
    largest_logit = float(features.norm(dim=-1).max()) / 0.01
    for backend in ("torch", "cuda"):
        found = em_statistics(features, bases, backend=backend)
        for result, reference in zip(found[:2], exact[:2], strict=True):
            error = max_error(result, reference) / float(reference.abs().max())
            benchmark.extra_info[f"{backend}_error"] = error
            assert error <= 1e-6 + largest_logit * torch.finfo(torch.float32).eps
    pairs = float(batch * tokens * BASES * ITERATIONS)
    compare(
        benchmark,
        lambda backend: soft_em(
            features, bases, num_iters=ITERATIONS, empty="zero", backend=backend
        ),
        flops=4 * pairs * width,
        exponentials=pairs,
    )


@pytest.mark.parametrize("width", [40, 80, 160])
def test_attention(benchmark: Any, width: int) -> None:
    heads, tokens = 8, 4 * 4096
    benchmark.group = f"basis attention, q=4x4096, h={heads}, d={width}, K={BASES}"
    query = clustered_tokens((1, tokens, heads, width)).transpose(1, 2)
    key = clustered_tokens((1, heads, BASES, width), seed=1)
    value = clustered_tokens((1, heads, BASES, width), seed=2)
    exact = eager_basis_attention(query[:, :, :CHECKED].double(), key.double(), value.double())
    for backend in ("torch", "cuda"):
        found = basis_attention(query, key, value, backend=backend)
        error = max_error(found[:, :, :CHECKED], exact) / float(exact.abs().max())
        benchmark.extra_info[f"{backend}_error"] = error
        assert error <= 1e-5
    pairs = float(heads * tokens * BASES)
    compare(
        benchmark,
        lambda backend: basis_attention(query, key, value, backend=backend),
        flops=4 * pairs * width,
        exponentials=pairs,
    )
