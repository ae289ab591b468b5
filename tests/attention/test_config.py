"""What an attention mechanism can be told: bad values are named, presets are as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stem import InflatedConfig, SparseCausalConfig, StemConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StemConfig(num_bases=0), "num_bases is 0; it must be a whole number"),
        (lambda: StemConfig(num_bases=10**9), "num_bases is 1000000000; it must be at most 16384"),
        (lambda: StemConfig(num_iters=1.5), "num_iters is 1.5"),  # type: ignore[arg-type]
        (lambda: StemConfig(temperature=-1), "temperature is -1; it must be positive"),
        (lambda: StemConfig(space="both"), "space is 'both'; it must be one of feature, key"),
        (lambda: StemConfig(init="random"), "init is 'random'"),
        (lambda: StemConfig(init="previous"), "init is 'previous'; it must be one of"),
        (lambda: StemConfig(empty="drop"), "empty is 'drop'"),
        (lambda: StemConfig(backend="cpu"), "backend is 'cpu'"),
        (lambda: StemConfig(num_frames=0), "num_frames is 0"),
        (lambda: StemConfig(seed=1.5), "seed is 1.5"),  # type: ignore[arg-type]
        (lambda: StemConfig(seed=2**63), "a whole number of 64 bits"),
        (lambda: StemConfig(proportional="no"), "proportional is 'no'"),  # type: ignore[arg-type]
        (lambda: StemConfig(calibration="both"), "calibration is 'both'; it must be one of none"),
        (lambda: StemConfig(num_queries=0), "num_queries is 0"),
        (lambda: StemConfig(dense_below=-1), "dense_below is -1"),
        (
            lambda: StemConfig(dense_below=64, fit_frames=2, num_frames=4),
            "fit_frames is 2 and dense_below 64; with fit_frames it must be 0",
        ),
        (lambda: StemConfig(temperature="hot"), "temperature is 'hot'"),  # type: ignore[arg-type]
        (lambda: SparseCausalConfig(min_channels="x"), "is 'x'"),  # type: ignore[arg-type]
        (lambda: SparseCausalConfig(frames=()), "frames is empty"),
        (lambda: SparseCausalConfig(frames=("middle",)), "frames holds 'middle'"),
        (lambda: SparseCausalConfig(min_channels=-1), "min_channels is -1"),
        (lambda: InflatedConfig(num_frames=0), "num_frames is 0"),
    ],
)
def test_configurations_name_a_bad_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_presets() -> None:
    published = {"num_bases": 256, "num_iters": 5, "temperature": 0.01, "init": "gaussian"}
    for preset, space, empty in (
        (StemConfig.paper(), "feature", "mask"),
        (StemConfig.released(), "key", "zero"),
    ):
        expected = {**published, "space": space, "empty": empty, "proportional": False}
        expected |= {"calibration": "none", "dense_below": 0}
        assert {name: getattr(preset, name) for name in expected} == expected
    assert StemConfig.paper(num_frames=8).num_frames == 8
    assert SparseCausalConfig.mid() == SparseCausalConfig(frames=("mid",), min_channels=640)
    assert SparseCausalConfig(frames="mid").frames == ("mid",)  # type: ignore[arg-type]
