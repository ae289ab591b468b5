"""NVTX ranges: one per step and layer with the package, nothing without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import nvtx
import pytest
import test_inversion
from pipelines import make_pipeline

from stem import profiling
from stem.attention.families import self_attentions


def test_one_range_per_step_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def annotate(name: str, domain: str) -> Iterator[None]:
        assert domain == "stem"
        seen.append(name)
        yield

    monkeypatch.setattr(nvtx, "annotate", annotate)
    test_inversion.inverted(tmp_path, num_steps=2)
    layers = set(self_attentions(make_pipeline().unet))
    assert seen[0] == "invert stem t=1"
    assert seen[len(layers) + 1] == "invert stem t=501"
    for step in (seen[1 : len(layers) + 1], seen[len(layers) + 2 :]):
        assert len(step) == len(layers)
        assert set(step) == layers


def test_nothing_without_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_NVTX_INSTALLED", False)
    assert profiling.nvtx_range("x") is profiling.nvtx_range("y")
