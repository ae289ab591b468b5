"""What the study of calibrated bases compares."""

from __future__ import annotations

import dataclasses

from stem import PerFrameConfig, SparseCausalConfig, StemConfig
from stem.config import AttentionConfig

DEFAULTS = "defaults"
ALL_TOKENS = "all tokens"
"""EM on all tokens, without a correction: what the others are compared with."""
PER_FRAME = "per-frame"
SAMPLES = (2, 4, 8, 16, 32)
"""Tokens a base that EM reads."""
_EVERY = StemConfig(sample_per_base=None, calibration="none")
_JOINT = StemConfig(calibration="joint", num_queries=128)
VARIANTS: dict[str, AttentionConfig] = {
    PER_FRAME: PerFrameConfig(),
    "sparse-causal": SparseCausalConfig(),
    "paper": StemConfig.paper(),
    "released": StemConfig.released(),
    ALL_TOKENS: _EVERY,
    "all tokens, R=1": dataclasses.replace(_EVERY, num_iters=1),
    "all tokens, K=512": dataclasses.replace(_EVERY, num_bases=512),
    "all tokens, moments": StemConfig(sample_per_base=None),
    **{
        f"{count} a base": StemConfig(sample_per_base=count, calibration="none")
        for count in SAMPLES
    },
    **{f"{count} a base, moments": StemConfig(sample_per_base=count) for count in SAMPLES},
    DEFAULTS: StemConfig(),
    "moments, R=1": StemConfig(num_iters=1),
    "moments, R=5": StemConfig(num_iters=5),
    "moments, space=key": StemConfig(space="key"),
    "linear": StemConfig(calibration="linear"),
    "joint, all tokens": dataclasses.replace(_JOINT, sample_per_base=None),
    "joint": _JOINT,
    "joint, m=256": StemConfig(calibration="joint"),
    "joint, R=5": dataclasses.replace(_JOINT, num_iters=5),
    "joint, half of the keys": dataclasses.replace(_JOINT, key_share=0.5),
    "joint, a quarter of the keys": dataclasses.replace(_JOINT, key_share=0.25),
}
"""What is not named has its default; "a base" is `sample_per_base`, m the number of queries, 128
for "joint" here."""
SHARPENED = (
    PER_FRAME, "sparse-causal", ALL_TOKENS, "all tokens, moments", "16 a base", DEFAULTS, "joint",
    "joint, half of the keys",
)  # fmt: skip
"""The variants that attention with larger logits is tried with."""


def of_video(config: AttentionConfig, frames: int) -> AttentionConfig:
    """A configuration of videos of so many frames."""
    return dataclasses.replace(config, num_frames=frames)
