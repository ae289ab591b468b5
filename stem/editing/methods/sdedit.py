"""SDEdit with TokenFlow's propagation: noise on the video, and denoising by another prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...diffusion.schedule import sampling_scheduler
from ...inversion import InversionFolder
from ..job import Job, check_share, generator_of, steps_of
from .tokenflow import PropagationOptions, TokenFlow, TokenFlowOptions


@dataclass(frozen=True)
class SDEditOptions(PropagationOptions):
    """Options of `sdedit`.

    Args:
        chunk: Number of frames of which one is the pivot, at least 1. The last chunk may have
            fewer. With a chunk of 1 every frame is a pivot, and nothing is blended.
        blend: Pivots that a frame is made of. "released": the pivots of its chunk and of the
            previous chunk, weighed by the distance from the middles of these chunks. "adjacent":
            the nearest pivots on both sides of the frame, with weights linear in the distance.
        pivots: Frame numbers [steps, chunks] of the pivots, an int64 tensor or nested lists, such
            as an earlier `Edit.pivots`; they are kept as tuples. None: drawn anew in each step.
        extended: Attention of the pivots to each other. "dense": to all of their tokens. "stem":
            to bases of these tokens, with the inversion's settings if it is an inversion by STEM.
        strength: Share of the steps, above 0, that are done; 1: all steps.

    Raises:
        ValueError: a value does not fit; the message names what is allowed.

    Source: arXiv 2108.01073; with TokenFlow, arXiv 2307.10373.
    """

    strength: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("strength", self.strength)

    def check(self, inversion: InversionFolder, prompt: str) -> None:
        super().check(inversion, prompt)
        steps = len(inversion.timesteps)
        if steps_of(self.strength, steps) == 0:
            raise ValueError(
                f"strength is {self.strength}, which leaves none of {steps} steps to do; it must "
                f"be at least {1 / steps:.3g}"
            )


class SDEdit(TokenFlow):
    """TokenFlow without injection, from the video's own latents under one noise for all frames.

    The source's rows, whose tokens say what corresponds to what, are the inversion's latents.
    """

    def __init__(self, job: Job, options: SDEditOptions) -> None:
        carried = TokenFlowOptions(
            chunk=options.chunk,
            blend=options.blend,
            pivots=options.pivots,
            extended=options.extended,
            attention_until=0.0,
            features_until=0.0,
        )
        super().__init__(job, carried)
        self.first_step = job.num_steps - steps_of(options.strength, job.num_steps)

    def begin(self) -> torch.Tensor:
        job = self.job
        video = job.level(0)
        noise = torch.randn(video.shape[1:], generator=generator_of(job.seed, "noise"))
        scheduler = sampling_scheduler(job.pipeline, job.num_steps)
        timestep = job.timestep(job.num_steps - self.first_step).reshape(1)
        noised: torch.Tensor = scheduler.add_noise(
            video, noise.to(job.device).expand_as(video), timestep
        )
        return noised
