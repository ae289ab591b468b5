"""Several inversions of one video, measured against it; nothing is written but inversions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stem_kernels.measure import PeakMemory

from ..control import Control
from ..diffusion.checks import check_pipeline
from ..diffusion.control import checked_controls
from ..diffusion.motion import check_frames, least_frames
from ..diffusion.pipeline import (
    decode_latents,
    encode_prompt,
    execution_device,
    predict,
)
from ..diffusion.schedule import inverse_scheduler
from ..distributed import Ranks
from ..inversion import invert, reconstruct_latents
from ..inversion.methods import check_methods
from ..metrics import psnr, ssim
from ..metrics.fidelity import SSIM_WINDOW
from ..report.rows import Measured, Row
from ..video import Video


def check_measurable(
    video: Video, methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise before any work if `measure` could not compare these methods on this video.

    Args:
        video: Video to invert.
        methods: Names of the methods.
        options: Fields of the methods' configurations, by method.

    Raises:
        TypeError, ValueError: as `check_methods`, or frames too small for SSIM.
    """
    check_methods(methods, options, video.num_frames)
    height, width = video.frames.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"frames of {width}x{height} are smaller than SSIM's window, {SSIM_WINDOW} pixels a "
            "side; take larger ones"
        )


def measure(
    pipeline: Any,
    video: Video,
    prompt: str,
    root: Path,
    methods: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]],
    num_steps: int,
    chunk: int | str | None,
    model: str | Mapping[str, Any],
    control: Control | Sequence[Control] | None = None,
    group: dist.ProcessGroup | None,
    progress: bool,
) -> Measured:
    """Invert and reconstruct a video by each method.

    Args:
        pipeline: Pipeline, as for `invert`.
        video: Video to invert.
        prompt: Prompt that describes it.
        root: Folder of the inversions, which are reused where they are there.
        methods: Names of METHODS.
        options: Fields of the methods' configurations, by method.
        num_steps: Number of steps of each inversion and reconstruction.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
        model: Name of the pipeline, for the record.
        control: What the pipeline's ControlNets are shown, as for `invert`.
        group: Process group whose ranks share the chunks, or None.
        progress: Whether to show progress.

    Raises:
        TypeError, ValueError: as `check_measurable`, or a pipeline or number of steps that cannot
            be inverted; before anything is computed.
    """
    check_measurable(video, methods, options)
    check_pipeline(pipeline)
    checked_controls(pipeline, control, video.num_frames, video.height, video.width)
    asked = chunk if isinstance(chunk, int) else None
    check_frames(pipeline, video.num_frames, chunk=asked, group=group)
    inverse_scheduler(pipeline, num_steps)
    warm_up(pipeline)
    device = execution_device(pipeline)
    rows: list[Row] = []
    reconstructions: dict[str, torch.Tensor] = {}
    worked = False
    for method in methods:
        inverting, sampling = _Stopwatch(num_steps, device), _Stopwatch(num_steps, device)
        with PeakMemory(device) as memory:
            with inverting:
                inversion = invert(
                    pipeline,
                    video,
                    prompt,
                    root,
                    method=method,
                    options=options.get(method),
                    num_steps=num_steps,
                    chunk=chunk,
                    model=model,
                    control=control,
                    group=group,
                    progress=progress,
                    on_step=inverting.step,
                )
            with sampling:
                latents = reconstruct_latents(
                    pipeline, inversion, group=group, progress=progress, on_step=sampling.step
                )
        worked = worked or inverting.worked or sampling.worked
        x0 = Ranks(group).from_main(inversion.x0)
        if not rows:
            reconstructions["vae"] = decode_latents(pipeline, x0.to(device))
            rows.append(_row("vae", reconstructions["vae"], video, 0.0))
        reconstructions[method] = decode_latents(pipeline, latents.to(device))
        whole = None not in (inverting.seconds, sampling.seconds)
        rows.append(
            _row(
                method,
                reconstructions[method],
                video,
                float((latents.cpu() - x0).norm() / x0.norm()),
                invert_seconds=inverting.seconds,
                reconstruct_seconds=sampling.seconds,
                peak_bytes=memory.extra_bytes if whole else None,
                inversion=str(inversion.path),
            )
        )
    return Measured(rows, reconstructions, device.type, memory.what, worked)


class _Stopwatch:
    """Seconds of a `with` block in which all steps were done; None where some were reused."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.seconds: float | None = None
        self.worked = False
        self._undone = num_steps
        self._device = device

    def step(self) -> None:
        self.worked = True
        self._undone -= 1

    def __enter__(self) -> _Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._undone == 0:
            self.seconds = time.perf_counter() - self._start


def warm_up(pipeline: Any) -> None:
    """One small call of the UNet, so that what is measured first pays for no one-time set-up."""
    channels, size = pipeline.unet.config.in_channels, 16
    shape = (least_frames(pipeline), channels, size, size)
    latents = torch.zeros(shape, device=execution_device(pipeline))
    conditioning = encode_prompt(pipeline, "", size, size)
    predict(pipeline, latents, torch.ones((), dtype=torch.int64), conditioning)


def _row(
    method: str, frames: torch.Tensor, video: Video, latent_error: float, **figures: Any
) -> Row:
    source = video.frames
    return Row(method, psnr(frames, source), ssim(frames, source), latent_error, **figures)
