"""Small videos that tests make: frames in memory, and files encoded with PyAV alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import nn

from stem.video import Video

STEP = 8  # grey levels between neighbouring frames of `counter`


def smooth(n: int = 6, height: int = 48, width: int = 64, detail: float = 1) -> torch.Tensor:
    """Moving gradients, which 4:2:0 video can hold well."""
    t, y, x = np.mgrid[:n, :height, :width]
    x, y = x * detail, y * detail
    waves = [np.sin(x / 16 + t / 3), np.cos(y / 14 - t / 4), np.sin((x + y) / 21 + t / 5)]
    return torch.from_numpy(np.stack([127.5 + 110 * wave for wave in waves], -1).astype(np.uint8))


def noise(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def drifting(count: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth noise that moves two pixels to the left and one down from frame to frame."""
    wide = torch.rand(
        1, 3, side // 2 + 10, side // 2 + 10, generator=torch.Generator().manual_seed(0)
    )
    wide = nn.functional.interpolate(wide, scale_factor=2, mode="bicubic").clamp(0, 1)
    parts = [
        wide[0, :, count - t : count - t + side, 2 * t : 2 * t + side].permute(1, 2, 0)
        for t in range(count)
    ]
    return (torch.stack(parts) * 255).round().to(torch.uint8)


def counter(n: int) -> torch.Tensor:
    """Grey frames whose level tells their number."""
    return (STEP * torch.arange(n, dtype=torch.uint8)).view(n, 1, 1, 1).expand(n, 16, 16, 3)


def numbers(video: Video) -> list[int]:
    return [round(level / STEP) for level in video.frames.float().mean((1, 2, 3)).tolist()]


def encode(
    path: Path,
    frames: torch.Tensor,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    rate: Fraction | int = 24,
    muxer: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """Write frames, RGB or RGBA, with PyAV alone; FFV1 in bgr0 keeps every pixel of RGB."""
    given = {3: "rgb24", 4: "rgba"}[frames.shape[3]]
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format=given)
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_fields(path: Path, moments: torch.Tensor) -> Path:
    """Frames of two moments each; the first is that of the odd lines, as libx264 marks them."""
    frames = moments[0::2].clone()
    frames[:, 0::2] = moments[1::2, 0::2]
    options = {"flags": "+ildct+ilme", "crf": "4"}
    return encode(path, frames, "libx264", "yuv422p", 25, options=options)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).pow(2).mean().item()
    return float(10 * np.log10(255**2 / error))
