"""What the quality study compares."""

from __future__ import annotations

from dataclasses import dataclass

from stem import InflatedConfig, SparseCausalConfig, StemConfig
from stem.config import AttentionConfig

FRAMES = 8
LONG_FRAMES = 16


@dataclass(frozen=True)
class Variant:
    """One way to invert: an attention, the frames of a video, and where bases come from."""

    config: AttentionConfig | None
    frames: int = FRAMES
    cached: bool = False


VARIANTS: dict[str, Variant] = {
    "ddim": Variant(None),
    "st-ddim": Variant(SparseCausalConfig()),
    "inflated": Variant(InflatedConfig()),
    "stem": Variant(StemConfig()),
    "paper": Variant(StemConfig.paper()),
    "paper R=1": Variant(StemConfig.paper(num_iters=1)),
    "paper init=tokens": Variant(StemConfig.paper(init="tokens")),
    "paper proportional": Variant(StemConfig.paper(proportional=True)),
    "paper empty=zero": Variant(StemConfig.paper(empty="zero")),
    "paper empty=reseed": Variant(StemConfig.paper(empty="reseed")),
    "paper space=key": Variant(StemConfig.paper(space="key")),
    "released": Variant(StemConfig.released()),
    "R=1": Variant(StemConfig(num_iters=1)),
    "R=3": Variant(StemConfig(num_iters=3)),
    "R=5": Variant(StemConfig(num_iters=5)),
    "R=8": Variant(StemConfig(num_iters=8)),
    "K=16 R=1": Variant(StemConfig(num_bases=16, num_iters=1)),
    "K=16": Variant(StemConfig(num_bases=16)),
    "K=16 R=5": Variant(StemConfig(num_bases=16, num_iters=5)),
    "K=32": Variant(StemConfig(num_bases=32)),
    "K=64": Variant(StemConfig(num_bases=64)),
    "K=128": Variant(StemConfig(num_bases=128)),
    "K=512": Variant(StemConfig(num_bases=512)),
    "init=gaussian": Variant(StemConfig(init="gaussian")),
    "not proportional": Variant(StemConfig(proportional=False)),
    "empty=reseed": Variant(StemConfig(empty="reseed")),
    "space=key": Variant(StemConfig(space="key")),
    "cached bases": Variant(StemConfig(), cached=True),
    "16 frames: global bases": Variant(StemConfig(), LONG_FRAMES),
    "16 frames: bases of 8": Variant(StemConfig(num_frames=8), LONG_FRAMES),
}
"""What is not named has its default; after "paper" it is as in the paper."""

BASE_NAME = "stem"
LONG_BASE = "16 frames: global bases"
CEILING = "vae alone"


def base_of(name: str) -> str:
    """The variant that another is compared with, video by video."""
    long = name != CEILING and VARIANTS[name].frames == LONG_FRAMES
    return LONG_BASE if long else BASE_NAME
