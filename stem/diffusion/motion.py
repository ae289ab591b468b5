"""AnimateDiff's UNets: how many frames their motion modules take in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..attention.families import family_of_unet, unet_of
from ..attention.families.motion import MOTION

_WINDOWED = "FreeNoiseTransformerBlock"


class Window(NamedTuple):
    """The frames that motion modules see at once, by diffusers' FreeNoise.

    Args:
        length: Number of frames.
        stride: Number of frames by which the next window begins later.
        weighting: Name of the weights by which windows are averaged.
    """

    length: int
    stride: int
    weighting: str

    @property
    def rest(self) -> int:
        """The number of last frames at most that a window of its own may be for.

        diffusers adds these frames with a weight each, and divides all of them by the weight of
        the first one.
        """
        return self.stride if self.weighting == "flat" else 1


def window_of(unet: Any) -> Window | None:
    """The windows of a UNet's motion modules; None where they see all frames of a call.

    Args:
        unet: UNet, with diffusers' FreeNoise or without it.
    """
    for module in unet.modules():
        if type(module).__name__ == _WINDOWED:
            return Window(module.context_length, module.context_stride, module.weighting_scheme)
    return None


def least_frames(pipeline: Any) -> int:
    """The fewest frames that a call of a pipeline's UNet can have."""
    window = window_of(unet_of(pipeline))
    return 1 if window is None else window.length


def in_one_call(pipeline: Any) -> bool:
    """Whether all frames must go through the pipeline's UNet at once, as its temporal parts do."""
    return family_of_unet(pipeline).outputs is None


def check_frames(
    pipeline: Any, num_frames: int, *, chunk: int | None = None, **cut_by: Any
) -> None:
    """Raise where a video's frames cannot go through a pipeline's UNet so.

    Args:
        pipeline: Pipeline whose UNet is called.
        num_frames: Number N of frames of the video.
        chunk: Number of frames that go through the UNet at once; None: all.
        cut_by: What else would cut the frames of a call, by name; None: it was not asked for.

    Raises:
        ValueError: temporal parts would not see all frames, or cannot see so many. The message
            gives the limit, and what to do.
    """
    family = family_of_unet(pipeline)
    family.check_whole({"chunk": chunk if chunk and chunk < num_frames else None, **cut_by})
    if family is not MOTION:
        return
    unet = unet_of(pipeline)
    window, most = window_of(unet), unet.config.motion_max_seq_length
    if window is None:
        if num_frames > most:
            raise ValueError(
                f"the video has {num_frames} frames, and the motion modules of this UNet have "
                f"places for {most} (motion_max_seq_length); take fewer frames (--frames), or let "
                f"them see overlapping windows: load_pipeline(..., motion_window={min(16, most)}) "
                f"(--motion-window {min(16, most)}), or pipeline.enable_free_noise()"
            )
        return
    length, stride, _ = window
    if length > most:
        raise ValueError(
            f"the motion modules of this UNet see windows of {length} frames and have places for "
            f"{most} (motion_max_seq_length); take a window of {most} at most"
        )
    beyond = num_frames - length
    if beyond < 0 or beyond % stride > window.rest:
        below = length + beyond // stride * stride
        fitting = f"{length}" if beyond < 0 else f"{below} or {below + stride}"
        raise ValueError(
            f"the video has {num_frames} frames, and the motion modules of this UNet see windows "
            f"of {length} frames, {stride} apart (FreeNoise); take {fitting} frames (--frames), or "
            "another window (--motion-window)"
        )


def check_without_motion(pipeline: Any, what: str) -> None:
    """Raise ValueError where a pipeline has motion modules, for `what` that is not made for them.

    Args:
        pipeline: Pipeline.
        what: Name of what is asked for.
    """
    if family_of_unet(pipeline) is MOTION:
        raise ValueError(
            f"the pipeline, a {type(pipeline).__name__}, has motion modules (AnimateDiff), and "
            f"{what} looks at UNets that see each frame by itself; pass a pipeline without them"
        )
