"""How many frames go through a UNet at once."""

from __future__ import annotations

import logging
from typing import Any

import torch

from stem_kernels.measure import PeakMemory

from ..attention.families import unet_of
from ..attention.handle import plain
from ..attention.waiting.memory import free_bytes
from ..control import Control
from .control import Shown, controlled, controlnets_of
from .motion import in_one_call
from .pipeline import Conditioning, encode_prompt, execution_device, predict, vae_factor

logger = logging.getLogger("stem")

USED_SHARE = 0.7
"""Share of the free memory that a run plans with."""
LARGEST_CHUNK = 64
"""Frames in a chunk at most: more gain no time (benchmarks/results/any-length.md), and hold as much
more memory."""
_PROBED = 3  # frames of the second probe
_WAITING_COPIES = 4  # residual, normalised input, queries and keys of the layer that waits


def frames_shared(num_frames: int, fit_frames: int | None) -> int:
    """The number of frames of the longest run of chunks that processes share.

    Args:
        num_frames: Number of frames of a scene.
        fit_frames: Number of them that bases are found on first, by themselves; None: all.
    """
    first = min(fit_frames or num_frames, num_frames)
    return max(first, num_frames - first)


def largest_chunk(num_frames: int, ranks: int) -> int:
    """Frames in an automatic chunk at most, a power of two, so that each rank has a chunk.

    Args:
        num_frames: Number of frames that the ranks share.
        ranks: Number of ranks; of 1 the length of the video says nothing.
    """
    if ranks == 1:
        return LARGEST_CHUNK
    share: int = max(1, num_frames // ranks)
    return min(LARGEST_CHUNK, 2 ** (share.bit_length() - 1))


def chunk_that_fits(
    pipeline: Any,
    num_frames: int,
    height: int,
    width: int,
    *,
    branches: int,
    meets: bool,
    largest: int = LARGEST_CHUNK,
) -> int | None:
    """The largest power of two of frames, up to a limit, whose UNet call fits into memory.

    Two calls of the UNet and its ControlNets, on 1 and on 3 frames, tell what a frame takes.

    Args:
        pipeline: Pipeline whose UNet is called.
        num_frames: Number N of frames of the video.
        height: Height of the frames in pixels.
        width: Width of the frames in pixels.
        branches: Number of guidance branches of the largest call in these chunks.
        meets: Whether chunks wait for each other, so that what is alive between layers is held
            for all frames; of one branch, as what is more goes where chunks are parked.
        largest: Limit, a power of two (see `largest_chunk`).

    Returns:
        Frames in a chunk; None where all go through the UNet at once, as they must where its
        temporal parts see all frames of a call.

    Raises:
        MemoryError: not even one frame fits, with the bytes needed and the bytes free.
    """
    if in_one_call(pipeline):
        return None
    device = execution_device(pipeline)
    conditioning = encode_prompt(pipeline, "", height, width)
    one, held = _probe(pipeline, 1, height, width, conditioning)
    one, _ = _probe(pipeline, 1, height, width, conditioning)  # the first also paid for set-up
    more, _ = _probe(pipeline, _PROBED, height, width, conditioning)
    if one is None or more is None:
        logger.info("memory cannot be measured here; chunks have %d frames at most", largest)
        return None if num_frames <= largest else largest
    of_branch = max(0, more - one) // (_PROBED - 1)
    a_frame, fixed = branches * of_branch, max(0, one - of_branch)
    free = int(USED_SHARE * free_bytes(device))
    if num_frames <= largest and fixed + num_frames * a_frame <= free:
        return None
    waiting = held * num_frames if meets else 0
    left = free - fixed - waiting
    if left < max(1, of_branch):
        raise MemoryError(
            f"{num_frames} frames of {width}x{height} need {fixed + waiting + of_branch:,} bytes "
            f"on {device} even in chunks of one frame ({waiting:,} of them for what waits between "
            f"layers), and {free:,} may be used. Take fit_frames, smaller frames, half precision "
            "or fewer frames"
        )
    fits = max(1, left // max(1, a_frame))
    chunk = min(2 ** (fits.bit_length() - 1), num_frames, largest)
    logger.info(
        "chunks of %d frames: about %d MiB at once and %d MiB that wait; %d MiB may be used",
        chunk,
        (fixed + chunk * a_frame) // 2**20,
        waiting // 2**20,
        free // 2**20,
    )
    return chunk


def _probe(
    pipeline: Any, frames: int, height: int, width: int, conditioning: Conditioning
) -> tuple[int | None, int]:
    """Peak bytes of a UNet call, and the bytes of it that live from block to block, a frame."""
    device, unet = execution_device(pipeline), unet_of(pipeline)
    factor = vae_factor(pipeline)
    shape = (frames, unet.config.in_channels, height // factor, width // factor)
    latents = torch.zeros(shape, device=device)
    nets = controlnets_of(pipeline)
    if nets:
        black = Control(torch.zeros((frames, height, width, 3), dtype=torch.uint8))
        conditioning = conditioning.showing(Shown((black,) * len(nets)))
    held = [0, 0]  # skip connections; the widest residual stream

    def count(module: torch.nn.Module, given: Any, output: Any) -> None:
        skips = output[1] if isinstance(output, tuple) else (output,)
        sizes = [skip.numel() * skip.element_size() // frames for skip in skips]
        held[0] += sum(sizes)
        held[1] = max(held[1], *sizes)

    hooks = [module.register_forward_hook(count) for module in (unet.conv_in, *unet.down_blocks)]
    memory = PeakMemory(device)
    try:
        with plain(unet), controlled(pipeline), memory:
            predict(pipeline, latents, torch.ones((), dtype=torch.int64), conditioning)
    finally:
        for hook in hooks:
            hook.remove()
    if nets:
        held[0] *= 2  # residuals are of the skip connections' sizes
    return memory.extra_bytes, held[0] + _WAITING_COPIES * held[1]
