"""What the study of calibrated bases compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from stem import PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention.layers import calibrated
from stem.config import AttentionConfig
from stem_kernels.ops.calibration import MOMENTS_SHARE, Calibration, moments

BASELINE = "all tokens"
PER_FRAME = "per-frame"
SAMPLES = (2, 4, 8, 16, 22, 32)
"""Tokens a base that EM reads."""
ALL = StemConfig(sample_per_base=None, calibration="none")
_MOMENTS = dataclasses.replace(ALL, calibration="moments")
_SAMPLED = dataclasses.replace(_MOMENTS, sample_per_base=22)
_JOINT = dataclasses.replace(ALL, sample_per_base=22, calibration="joint", num_queries=128)
SCALED = {f"22 a base, moments x {factor}": factor / MOMENTS_SHARE for factor in (0.5, 1.2)}
"""What the matrix is multiplied by in the variants that take another share of the covariance."""
VARIANTS: dict[str, AttentionConfig] = {
    PER_FRAME: PerFrameConfig(),
    "sparse-causal": SparseCausalConfig(),
    "paper": StemConfig.paper(),
    BASELINE: ALL,
    "all tokens, R=1": dataclasses.replace(ALL, num_iters=1),
    "all tokens, R=5": dataclasses.replace(ALL, num_iters=5),
    "all tokens, moments": _MOMENTS,
    "22 a base": dataclasses.replace(ALL, sample_per_base=22),
    **{
        f"{count} a base, moments": dataclasses.replace(_SAMPLED, sample_per_base=count)
        for count in SAMPLES
    },
    **dict.fromkeys(SCALED, _SAMPLED),
    "22 a base, moments, R=1": dataclasses.replace(_SAMPLED, num_iters=1),
    "22 a base, moments, R=5": dataclasses.replace(_SAMPLED, num_iters=5),
    "22 a base, moments, K=512": dataclasses.replace(_SAMPLED, num_bases=512),
    "22 a base, moments, key": dataclasses.replace(_SAMPLED, space="key"),
    "all tokens, joint": dataclasses.replace(_JOINT, sample_per_base=None),
    "22 a base, joint": _JOINT,
    "22 a base, joint, 1/2 of the keys": dataclasses.replace(_JOINT, key_share=0.5),
    "22 a base, joint, 1/4 of the keys": dataclasses.replace(_JOINT, key_share=0.25),
}
"""256 bases and 2 iterations in feature space but where it is said; "a base" is `sample_per_base`;
"joint" has 128 queries."""
MERGED = "per-frame, half of the tokens merged"
"""Token merging; no configuration of ours."""
NAMES = (*VARIANTS, MERGED)
FEW = (
    PER_FRAME, MERGED, BASELINE, "all tokens, moments", "22 a base", "22 a base, moments",
    "22 a base, joint",
)  # fmt: skip
"""The variants that long videos, and attention with larger logits, are tried with."""


def of_video(config: AttentionConfig, frames: int) -> AttentionConfig:
    """A configuration of videos of so many frames."""
    return dataclasses.replace(config, num_frames=frames)


@contextmanager
def moments_of(variant: str) -> Iterator[None]:
    """As much of the covariance as a variant takes."""

    def scaled(*arguments: Any, **options: Any) -> Calibration:
        found = moments(*arguments, **options)
        return found._replace(correction=SCALED.get(variant, 1.0) * found.correction)

    with mock.patch.object(calibrated, "moments", scaled):
        yield
