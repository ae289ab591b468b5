"""What the study of calibrated bases compares."""

from __future__ import annotations

import dataclasses

from stem import PerFrameConfig, SparseCausalConfig, StemConfig
from stem.config import AttentionConfig

DEFAULTS = "defaults"
PER_FRAME = "per-frame"
VARIANTS: dict[str, AttentionConfig] = {
    PER_FRAME: PerFrameConfig(),
    "sparse-causal": SparseCausalConfig(),
    "paper": StemConfig.paper(),
    "released": StemConfig.released(),
    DEFAULTS: StemConfig(calibration="none"),
    "R=1": StemConfig(calibration="none", num_iters=1),
    "K=512": StemConfig(calibration="none", num_bases=512),
    "linear R=1": StemConfig(calibration="linear", num_iters=1),
    "linear": StemConfig(calibration="linear"),
    "joint R=1": StemConfig(calibration="joint", num_iters=1),
    "joint": StemConfig(calibration="joint"),
    "joint R=5": StemConfig(calibration="joint", num_iters=5),
    "joint R=1 K=64": StemConfig(calibration="joint", num_iters=1, num_bases=64),
    "joint R=1 K=128": StemConfig(calibration="joint", num_iters=1, num_bases=128),
    "joint R=1 m=128": StemConfig(calibration="joint", num_iters=1, num_queries=128),
    "joint R=1 m=512": StemConfig(calibration="joint", num_iters=1, num_queries=512),
    "joint R=1 space=key": StemConfig(calibration="joint", num_iters=1, space="key"),
}
"""What is not named has its default; m is the number of queries."""
SHARPENED = (
    PER_FRAME, "sparse-causal", DEFAULTS, "R=1", "linear R=1", "linear", "joint R=1", "joint",
    "joint R=1 m=128",
)  # fmt: skip
"""The variants that attention with larger logits is tried with."""


def of_video(config: AttentionConfig, frames: int) -> AttentionConfig:
    """A configuration of videos of so many frames."""
    return dataclasses.replace(config, num_frames=frames)
