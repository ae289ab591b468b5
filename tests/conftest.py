"""What this process tests: its backends and its device, and tokens on it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from stem_kernels import cuda
from stem_kernels.testing import clustered_tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["torch"]
    BACKENDS += ["triton"] if DEVICE == "cuda" else []
    BACKENDS += ["cuda"] if cuda.load_error("cpu" if DEVICE == "cpu" else "cuda") is None else []


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(DEVICE)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that reading what was not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
