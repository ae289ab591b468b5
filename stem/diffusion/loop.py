"""The denoising loop: DDIM in either direction, for inversions, reconstructions and edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention.waiting.parked import current_parking
from ..profiling import nvtx_range
from ..progress import steps as counted
from .pipeline import Conditioning, predict

Predictor = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, timestep, latents [N, c, h, w]) -> prediction [N, c, h, w], float32."""


class NonFiniteError(ArithmeticError):
    """Latents that are NaN or infinite."""


def guided(
    pipeline: Any,
    conditioning: Conditioning,
    *,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
) -> Predictor:
    """The UNet's prediction, with classifier-free guidance where `guidance` is not 1.

    Args:
        pipeline: Pipeline whose UNet is called.
        conditioning: Conditioning of the prompt, one branch.
        negative: Conditioning of the negative prompt, one branch; needed for guidance.
        guidance: Guidance scale g of u + g (c - u).

    Source: arXiv 2207.12598.
    """
    if guidance == 1.0:
        return lambda step, timestep, latents: predict(pipeline, latents, timestep, conditioning)
    if negative is None:
        raise ValueError(f"guidance is {guidance}; it needs the conditioning of a negative prompt")
    both = negative.joined(conditioning)

    def prediction(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([latents, latents])
        without, with_prompt = predict(pipeline, rows, timestep, both).chunk(2)
        return with_guidance(without, with_prompt, guidance)

    return prediction


def with_guidance(without: torch.Tensor, prompted: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance u + g (c - u), arXiv 2207.12598.

    Args:
        without: Prediction u for the negative prompt, [N, c, h, w].
        prompted: Prediction c for the prompt, likewise.
        guidance: Guidance scale g.
    """
    return current_parking().by_frames(
        lambda without, prompted: torch.sub(prompted, without).mul_(guidance).add_(without),
        without,
        prompted,
    )


@torch.no_grad()
def denoise(
    latents: torch.Tensor,
    scheduler: Any,
    prediction: Predictor,
    *,
    steps: Sequence[int] | None = None,
    done: int | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    name: str,
    progress: bool = False,
) -> torch.Tensor:
    """Step latents along a schedule; its direction is the scheduler's.

    Args:
        latents: Latents [N, c, h, w] before the first of `steps`, float32.
        scheduler: Scheduler of `inverse_scheduler` or `sampling_scheduler`.
        prediction: Prediction at one step.
        steps: Steps to do, as indices of the scheduler's timesteps; None: all.
        done: Number of steps done before, where steps come again, for the progress shown; None:
            as many as the first of `steps` says.
        before_step: Function called with each step before its prediction.
        after_step: Function called with each step and the latents after it; it may return others
            to go on with.
        name: Name for the progress shown, the profiler's ranges and errors.
        progress: Whether to show progress.

    Returns:
        Latents [N, c, h, w] after the last step, float32.

    Raises:
        NonFiniteError: latents are not finite after a step; it names the step and the frame.
    """
    total = len(scheduler.timesteps)
    steps = range(total) if steps is None else steps
    before = next(iter(steps), total) if done is None else done
    in_all = total if done is None else done + len(steps)
    with counted(in_all, initial=before, name=name, show=progress) as shown:
        for step in steps:
            timestep = scheduler.timesteps[step]
            if before_step is not None:
                before_step(step)
            with nvtx_range(f"{name} t={int(timestep)}"):
                noise = prediction(step, timestep, latents)
                latents = _stepped(scheduler, noise, timestep, latents)
                del noise
            check_finite(latents, f"{name}, step {step + 1} of {total} (timestep {int(timestep)})")
            if after_step is not None:
                replaced = after_step(step, latents)
                latents = latents if replaced is None else replaced
            shown.update()
    return latents


def _stepped(
    scheduler: Any, noise: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """The latents after a step, which is by element."""
    return current_parking().by_frames(
        lambda noise, latents: scheduler.step(noise, timestep, latents).prev_sample, noise, latents
    )


def check_finite(latents: torch.Tensor, where: str) -> None:
    """Raise where latents are not finite.

    Args:
        latents: Latents [N, c, h, w].
        where: Step that they are of, for the message.

    Raises:
        NonFiniteError: it names the first frame that is not.
    """
    finite = current_parking().by_frames(
        lambda latents: latents.isfinite().flatten(1).all(dim=1), latents
    )
    if not bool(finite.all()):
        frame = int(finite.int().argmin())
        raise NonFiniteError(
            f"{where}: the latents of frame {frame} are not finite. In half precision some "
            "models overflow (load this one in float32), and so do extreme options in any"
        )
