"""What one ControlNet is shown, and at which steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..storage import tensor_bytes


@dataclass(frozen=True, eq=False)
class Control:
    """What one ControlNet of a pipeline is shown.

    Steps are counted as they are sampled, the noisiest first: step i of T has control where
    start <= i / T and (i + 1) / T <= end. An inversion's step has control where the sampling step
    at the same timestep has.

    Args:
        pictures: Pictures, uint8 [N, H, W, 3], RGB, one for each frame of the video and of its
            size; edges are white on black.
        scale: Factor of what the ControlNet adds to the UNet, a finite number.
        start: Share of the steps before which the control is off, 0 ... 1.
        end: Share of the steps after which the control is off, above `start` and up to 1.
        source: Text on where the pictures come from, for the record: "canny", a path.

    Raises:
        TypeError: the pictures are no tensor.
        ValueError: a dtype, shape or number does not fit.

    Source: arXiv 2302.05543; diffusers' StableDiffusionControlNetPipeline without guess mode.
    """

    pictures: torch.Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        found = self.pictures
        if not isinstance(found, torch.Tensor):
            raise TypeError(
                f"pictures is a {type(found).__name__}; it must be a tensor uint8 [N, H, W, 3]"
            )
        if found.dtype != torch.uint8 or found.ndim != 4 or found.shape[3] != 3:
            raise ValueError(
                f"pictures are {found.dtype} {list(found.shape)}; they must be uint8 [N, H, W, 3], "
                "as stem.control.canny, stem.control.depth and stem.read_video(...).frames are"
            )
        check_numbers(self.scale, self.start, self.end)

    def record(self) -> dict[str, Any]:
        """What shapes latents of it, as JSON types."""
        digest = hashlib.sha256(tensor_bytes(self.pictures.cpu().contiguous()))
        return {
            "source": self.source,
            "pictures_sha256": digest.hexdigest(),
            "scale": float(self.scale),
            "start": float(self.start),
            "end": float(self.end),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any], pictures: torch.Tensor) -> Control:
        """The control of a record and the pictures that belong to it, uint8 [N, H, W, 3]."""
        named = {name: record[name] for name in ("scale", "start", "end", "source")}
        return cls(pictures, **named)

    def check_fits(self, num_frames: int, height: int, width: int) -> None:
        """Raise where the pictures are not those of a video's frames.

        Args:
            num_frames: Number of frames of the video.
            height: Height of its frames in pixels.
            width: Width of its frames in pixels.

        Raises:
            ValueError: with both shapes.
        """
        count, *size, _ = self.pictures.shape
        named = f"the control{f' {self.source!r}' if self.source else ''}"
        if count != num_frames:
            raise ValueError(
                f"{named} has {count} pictures, and the video {num_frames} frames; give a picture "
                "for each frame"
            )
        if size != [height, width]:
            raise ValueError(
                f"{named} has pictures of {size[1]}x{size[0]}, and the video's frames are "
                f"{width}x{height}; give pictures of that size"
            )

    def is_on(self, step: int, num_steps: int) -> bool:
        """Whether the control counts in a sampling step; step 0 is the noisiest."""
        return not (step / num_steps < self.start or (step + 1) / num_steps > self.end)


def check_numbers(scale: Any, start: Any, end: Any) -> None:
    """Raise ValueError where a control cannot have this scale, start or end."""
    for name, value in (("scale", scale), ("start", start), ("end", end)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"a control's {name} is {value!r}; it must be a number")
    if not math.isfinite(scale):
        raise ValueError(f"a control's scale is {scale}; it must be finite")
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"a control starts at {start} and ends at {end}; they must be shares of the steps, "
            "0 ... 1, the start below the end"
        )
