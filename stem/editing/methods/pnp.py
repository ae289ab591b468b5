"""Plug-and-play editing, frame by frame: the baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...attention.families import unet_of
from ...config import PerFrameConfig
from ...diffusion.loop import with_guidance
from ..job import Job, Method, Options, check_share, steps_of
from ..maps.injection import AttentionInjection, FeatureInjection


@dataclass(frozen=True)
class PnPOptions(Options):
    """Options of `pnp`.

    Args:
        attention_until: Share of the steps in which the source's queries and keys are injected.
        features_until: Share of the steps in which the source's features are injected.

    Raises:
        ValueError: a value is no share of the steps.

    Source: arXiv 2211.12572.
    """

    attention_until: float = 0.5
    features_until: float = 0.8

    def __post_init__(self) -> None:
        check_share("attention_until", self.attention_until)
        check_share("features_until", self.features_until)


class PnP(Method):
    """Plug-and-play: rows [source | unconditional | conditional], each frame by itself."""

    def __init__(self, job: Job, options: PnPOptions) -> None:
        super().__init__(job, options)
        self.config = PerFrameConfig(num_frames=job.num_frames, chunk=job.attention.chunk)
        self.attention = AttentionInjection(unet_of(job.pipeline))
        self.features = FeatureInjection(job.pipeline, branches=3)
        self.hooks.add("injection", self.attention)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with super().running(), self.features.injecting():
            yield

    def inject(self, step: int) -> None:
        """Inject in this step what its number asks for."""
        total = self.job.num_steps
        self.attention.active = step < steps_of(self.options.attention_until, total)
        self.features.active = step < steps_of(self.options.features_until, total)

    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        job = self.job
        self.inject(step)
        source = job.level(job.num_steps - step)
        _, without, prompted = job.predict(
            [source, latents, latents], timestep, job.source, job.negative, job.target
        )
        return with_guidance(without, prompted, job.guidance)
