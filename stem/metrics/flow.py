"""Optical flow of a video in both directions, by name, and what of it is seen twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, pad

from ..names import FLOWS
from .unmeasured import UnmeasuredError, check_weights, torchvision_module
from .warp import fetch, landing

DIS_MIN_SIDE = 12
RAFT_MIN_SIDE = 128
_RAFT_MULTIPLE = 8  # RAFT's features are of an eighth of the size
_OPTICAL_FLOW = "torchvision.models.optical_flow"


@dataclass(frozen=True)
class Flow:
    """Motion of the pixels of N frames of a video, from each frame to the next and back.

    Args:
        name: Name of the flow's source, which stands beside every figure that depends on the flow.
        forward: Flow [N-1, H, W, 2], float32, (dx, dy) in pixels, from each frame to the next.
        backward: Flow [N-1, H, W, 2], float32, from each frame but the first to the frame before.
        occlusion: Mask [N-1, H, W], bool, True where a pixel is not seen in the next frame.
        backward_occlusion: Mask [N-1, H, W], bool, True where a pixel of each frame but the first
            is not seen in the frame before.
    """

    name: str
    forward: torch.Tensor
    backward: torch.Tensor
    occlusion: torch.Tensor
    backward_occlusion: torch.Tensor

    @classmethod
    def joined(cls, flows: Sequence[Flow]) -> Flow:
        """The flow of a video whose parts, each of which begins with the last frame of the one
        before, have these flows by one source."""
        names = ("forward", "backward", "occlusion", "backward_occlusion")
        parts = (torch.cat([getattr(flow, name) for flow in flows]) for name in names)
        return cls(flows[0].name, *parts)

    def reversed(self) -> Flow:
        """The flow of the video played backwards."""
        return Flow(
            self.name,
            self.backward.flip(0),
            self.forward.flip(0),
            self.backward_occlusion.flip(0),
            self.occlusion.flip(0),
        )

    def to(self, device: torch.device | str) -> Flow:
        """The flow with its tensors on a device."""
        tensors = (self.forward, self.backward, self.occlusion, self.backward_occlusion)
        return Flow(self.name, *(tensor.to(device) for tensor in tensors))

    def resized(self, height: int, width: int) -> Flow:
        """The flow for smaller frames, in units of their pixels.

        The flow of a cell is the mean over its pixels; a cell is occluded if half of them are.

        Args:
            height: Height of the smaller frames.
            width: Width of the smaller frames.
        """
        if self.forward.shape[1:3] == (height, width):
            return self
        scale = self.forward.new_tensor(
            [width / self.forward.shape[2], height / self.forward.shape[1]]
        )

        def vectors(flow: torch.Tensor) -> torch.Tensor:
            return scale * _pooled(flow.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)

        def masks(occlusion: torch.Tensor) -> torch.Tensor:
            return _pooled(occlusion[:, None].float(), height, width)[:, 0] >= 0.5

        return Flow(
            self.name,
            vectors(self.forward),
            vectors(self.backward),
            masks(self.occlusion),
            masks(self.backward_occlusion),
        )


def estimate_flow(
    frames: torch.Tensor, model: str | None = None, device: torch.device | str = "cpu"
) -> Flow:
    """Estimate the flow of a video. Pixels where its two directions do not agree are occluded.

    Args:
        frames: Frames, uint8 [N, H, W, 3], N >= 2.
        model: "dis" (OpenCV's dense inverse search, preset medium) or "raft" (torchvision's large
            RAFT); None: RAFT if its weights are on this machine, else DIS.
        device: Device that RAFT runs on; DIS runs on the CPU.

    Returns:
        Flow on the CPU.

    Raises:
        UnmeasuredError: there are fewer than two frames, the frames are too small for the model, or
            a package or weights are not on this machine; nothing is downloaded.
        ValueError: the model is unknown, or the frames have another shape or dtype.

    Source: Kroeger et al., ECCV 2016 (DIS); Teed and Deng, ECCV 2020 (RAFT).
    """
    if model not in (None, *FLOWS):
        raise ValueError(f"flow is {model!r}; it must be one of {', '.join(FLOWS)}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}"
        )
    if frames.shape[0] < 2:
        raise UnmeasuredError("one frame has no flow", "give videos of at least 2 frames")
    name, pair_flow = _model(model, min(frames.shape[1:3]), device)
    pictures = frames.cpu()
    forward = torch.stack([pair_flow(one, two) for one, two in pairwise(pictures)])
    backward = torch.stack([pair_flow(two, one) for one, two in pairwise(pictures)])
    return Flow(name, forward, backward, occluded(forward, backward), occluded(backward, forward))


def occluded(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    r"""Find the pixels that are not seen in the next frame, by the forward/backward check.

    A pixel x is not seen if $x + f(x)$ is outside the picture, or if the backward flow b at
    $x + f(x)$ does not lead back to near x: $|f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5$.

    Args:
        forward: Flow [n, H, W, 2], floating point, (dx, dy) in pixels, to the next frame.
        backward: Flow [n, H, W, 2], floating point, from the next frame back.

    Returns:
        Mask, bool [n, H, W].

    Source: Sundaram, Brox and Keutzer, ECCV 2010, equation 5.
    """
    back = fetch(backward.permute(0, 3, 1, 2), forward).permute(0, 2, 3, 1)
    squares = forward.square().sum(-1) + back.square().sum(-1)
    astray = (forward + back).square().sum(-1) > 0.01 * squares + 0.5
    height, width = forward.shape[1:3]
    x, y = landing(forward).unbind(-1)
    outside = (x < -0.5) | (x > width - 0.5) | (y < -0.5) | (y > height - 0.5)
    return astray | outside


def _pooled(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return adaptive_avg_pool2d(maps, (height, width))


_PairFlow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Two frames, uint8 [H, W, 3], to the flow from one to the other, [H, W, 2]."""


def _model(name: str | None, side: int, device: torch.device | str) -> tuple[str, _PairFlow]:
    """A model's full name, and what runs it."""
    if name == "dis":
        return _dis(side)
    try:
        return _raft(side, device)
    except UnmeasuredError:
        if name == "raft":
            raise
        return _dis(side)


def _dis(side: int) -> tuple[str, _PairFlow]:
    try:
        import cv2
    except ImportError as error:
        raise UnmeasuredError(
            "OpenCV is not installed", "pip install opencv-python-headless"
        ) from error
    if side < DIS_MIN_SIDE:
        raise UnmeasuredError(
            f"DIS takes frames of at least {DIS_MIN_SIDE} pixels a side, not {side}",
            "give larger videos",
        )
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def pair_flow(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        grays = [cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY) for frame in (one, two)]
        return torch.from_numpy(search.calc(grays[0], grays[1], None))

    return "OpenCV DIS, preset medium", pair_flow


def _raft(side: int, device: torch.device | str) -> tuple[str, _PairFlow]:
    models = torchvision_module(_OPTICAL_FLOW)
    weights = models.Raft_Large_Weights.DEFAULT
    check_weights(weights, f"{_OPTICAL_FLOW}.Raft_Large_Weights")
    if side < RAFT_MIN_SIDE:
        raise UnmeasuredError(
            f"RAFT takes frames of at least {RAFT_MIN_SIDE} pixels a side, not {side}",
            "give larger videos, or take the flow dis",
        )
    network = models.raft_large(weights=weights, progress=False).eval().to(device)

    @torch.inference_mode()
    def pair_flow(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        height, width = one.shape[:2]
        pictures = list(_padded(one, two))
        flow = network(*(picture.to(device) for picture in pictures))[-1]
        return flow[0, :, :height, :width].permute(1, 2, 0).float().cpu()

    return f"torchvision RAFT large, {weights.name}", pair_flow


def _padded(*frames: torch.Tensor) -> Iterator[torch.Tensor]:
    """Frames as RAFT takes them: float32 [1, 3, h, w] in -1 ... 1, sides multiples of 8."""
    for frame in frames:
        bottom, right = (-side % _RAFT_MULTIPLE for side in frame.shape[:2])
        picture = frame.permute(2, 0, 1)[None].float() / 127.5 - 1
        yield pad(picture, (0, right, 0, bottom), mode="replicate")
