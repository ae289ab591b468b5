"""Shared fixtures: which backends this process tests, and small pipelines of SD's shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    BACKENDS = ["triton"]
elif torch.cuda.is_available():
    BACKENDS = ["torch", "triton"]
else:
    BACKENDS = ["torch"]

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


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
