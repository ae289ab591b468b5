"""What inversions write down of a video, of their attention and of what computed them."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Protocol

import torch

from stem_kernels.backends import select

from ..config import AttentionConfig, VideoConfig
from ..diffusion.pipeline import VAE_FRAMES


class FramesInParts(Protocol):
    """What is read of a video: a `stem.Video`, a `stem.VideoFile`, or what acts like them."""

    @property
    def num_frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def fps(self) -> Fraction: ...
    def parts(self, count: int) -> Iterator[torch.Tensor]: ...


def check_video(video: Any, prompt: Any) -> None:
    """Raise TypeError where a video is none that this package reads, or its prompt no text."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is a {type(prompt).__name__}; it must be one text for the video")
    if not hasattr(video, "parts"):
        raise TypeError(
            f"video is a {type(video).__name__}; pass what stem.read_video or stem.open_video "
            "returns, or stem.Video(frames, fps)"
        )


def check_same_size(
    video: FramesInParts, about: dict[str, Any], name: str = "inversion", made: str = "inverted"
) -> None:
    """Raise ValueError where a video has not the frames and the size of the one that was taken.

    Args:
        video: Video.
        about: What `video_record` told of that one.
        name: Word for what was made of that one.
        made: Word for what was done to it.
    """
    found = video.num_frames, video.height, video.width
    expected = about["num_frames"], about["height"], about["width"]
    if found != expected:
        raise ValueError(
            f"video has (frames, height, width) {found}, and the {name} {expected}; pass the one "
            f"that was {made}"
        )


def video_record(video: FramesInParts) -> dict[str, Any]:
    """What is written down of a video: a hash of its frames, its size and its rate."""
    return {
        "frames_sha256": frames_sha256(video),
        "num_frames": video.num_frames,
        "height": video.height,
        "width": video.width,
        "fps": str(video.fps),
    }


def frames_sha256(video: FramesInParts) -> str:
    """The hash of a video's frames by which an inversion records what it was made of."""
    digest = hashlib.sha256()
    for part in video.parts(VAE_FRAMES):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that the latents depend on, by package."""
    return {
        name: importlib.metadata.version(name) for name in ("stem-inversion", "torch", "diffusers")
    }


def attention_record(config: AttentionConfig | VideoConfig) -> dict[str, Any]:
    """The fields of an attention's configuration, as JSON types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }


def backend_of(backend: str, num_bases: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that EM gets; two of them differ in the last bits.

    Args:
        backend: Name that the attention's configuration has, such as "auto".
        num_bases: Number of bases.
        device: Device that computes.
        dtype: Dtype of the tokens.
    """
    probe = torch.empty(0, device=device, dtype=dtype)
    return select("invert", backend, {"features": probe}, num_bases)
