"""What the study of calibrated bases compares."""

from __future__ import annotations

import dataclasses

from stem import PerFrameConfig, SparseCausalConfig, StemConfig
from stem.config import AttentionConfig

DEFAULTS = "defaults"
PER_FRAME = "per-frame"
SAMPLES = (2, 4, 8, 16, 32)
"""Tokens a base that EM reads."""
SAMPLED = StemConfig(sample_per_base=16, calibration="moments")
_JOINT = StemConfig(sample_per_base=16, calibration="joint", num_queries=128)
VARIANTS: dict[str, AttentionConfig] = {
    PER_FRAME: PerFrameConfig(),
    "sparse-causal": SparseCausalConfig(),
    "paper": StemConfig.paper(),
    DEFAULTS: StemConfig(),
    "R=1": StemConfig(num_iters=1),
    "K=512": StemConfig(num_bases=512),
    "moments": StemConfig(calibration="moments"),
    "16 a base": StemConfig(sample_per_base=16),
    **{
        f"{count} a base, moments": dataclasses.replace(SAMPLED, sample_per_base=count)
        for count in SAMPLES
    },
    "16 a base, moments, R=1": dataclasses.replace(SAMPLED, num_iters=1),
    "16 a base, moments, R=5": dataclasses.replace(SAMPLED, num_iters=5),
    "16 a base, moments, key": dataclasses.replace(SAMPLED, space="key"),
    "joint": StemConfig(calibration="joint", num_queries=128),
    "16 a base, joint": _JOINT,
    "16 a base, joint, 1/2 of the keys": dataclasses.replace(_JOINT, key_share=0.5),
    "16 a base, joint, 1/4 of the keys": dataclasses.replace(_JOINT, key_share=0.25),
}
"""What is not named has its default; "a base" is `sample_per_base`; "joint" has 128 queries."""
SHARPENED = (
    PER_FRAME, "sparse-causal", DEFAULTS, "moments", "16 a base", "16 a base, moments", "joint",
    "16 a base, joint",
)  # fmt: skip
"""The variants that attention with larger logits is tried with."""


def of_video(config: AttentionConfig, frames: int) -> AttentionConfig:
    """A configuration of videos of so many frames."""
    return dataclasses.replace(config, num_frames=frames)
