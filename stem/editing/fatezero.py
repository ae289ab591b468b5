"""FateZero: the source's attention maps fused into the edit, with nothing stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.handle import unet_of
from ..config import StemConfig
from ..diffusion.loop import with_guidance
from ..diffusion.pipeline import vae_factor
from .fatezero_options import FateZeroOptions
from .job import Job, Method, steps_of
from .map_fusion import MapFusion, Size
from .masks import warn_of_size
from .prompts import (
    PromptTokens,
    places_of,
    prompt_tokens,
    refined_columns,
    replaced_columns,
)
from .text_masks import TextMaps, mask_layers, word_mask

_COLUMNS = {"refine": refined_columns, "replace": replaced_columns}


class FateZero(Method):
    """FateZero: rows [source | unconditional | conditional], of which the last is fused.

    The source's maps are those of the inversion: its step to this level was predicted from the
    latents one level below, at this level's timestep.
    """

    def __init__(self, job: Job, options: FateZeroOptions) -> None:
        super().__init__(job, options)
        source = prompt_tokens(job.pipeline, job.source_prompt)
        target = prompt_tokens(job.pipeline, job.prompt)
        video, factor = job.inversion.settings["video"], vae_factor(job.pipeline)
        self.size: Size = (video["height"] // factor, video["width"] // factor)
        self.cross = _cross_shares(options, target, job.num_steps)
        self.words: tuple[list[int], list[int]] | None = None
        if options.blend_words is not None:
            before, after = options.blend_words
            self.words = _positions(source, before), _positions(target, after)
            layers = mask_layers(unet_of(job.pipeline))
            self.maps = TextMaps(layers, job.num_frames, self.size)
            self.hooks.add("words", self.maps)
        factors = torch.ones(target.length)
        for word, value in options.equalize.items():
            factors[_positions(target, [word])] = value
        config = self.config
        self.fusion = MapFusion(
            _COLUMNS[options.mapping](source, target).to(job.device),
            self.size,
            equalizer=factors.to(job.device) if options.equalize else None,
            backend=config.backend if isinstance(config, StemConfig) else "auto",
        )
        self.hooks.add("fusion", self.fusion)

    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        job = self.job
        source = job.level(job.num_steps - step - 1)
        self._fuse(step, source, timestep)
        if job.guidance == 1.0:
            rows = [source, latents]
            return job.predict(rows, timestep, job.source, job.target)[-1]
        _, without, prompted = job.predict(
            [source, latents, latents], timestep, job.source, job.negative, job.target
        )
        return with_guidance(without, prompted, job.guidance)

    def after_step(self, step: int, latents: torch.Tensor) -> torch.Tensor | None:
        if not self.options.blend_latents:
            return None
        totals = self.maps.take("target")
        if step > 0:
            totals = self.kept["totals"] + totals
        self.kept["totals"] = totals
        if not self._blends(step):
            return None
        masks = self.kept["cores"] | word_mask(totals, self.size, self.options.blend_threshold)
        self.kept["masks"] = masks
        late = self.options.background == "late"
        background = self.job.level(self.job.num_steps - step - (0 if late else 1))
        return torch.where(masks.unsqueeze(1), latents, background)

    def _fuse(self, step: int, source: torch.Tensor, timestep: torch.Tensor) -> None:
        """Fuse in this step what its number asks for."""
        options, total = self.options, self.job.num_steps
        lower, upper = (steps_of(share, total) for share in options.self_bounds)
        cross = self.cross[step]
        self.fusion.cross = cross.to(self.job.device) if bool(cross.any()) else 0.0
        self.fusion.self_on = lower <= step < upper
        self.fusion.mask = None
        if self.words is None:
            return
        if self.fusion.self_on or self._blends(step):
            of_words = self._of_source(source, timestep)
            first = "cores" not in self.kept
            self.kept["cores"] = of_words(self.size)
            self.kept["masks"] = self.kept["cores"].clone()
            if first:
                warn_of_size(self.kept["cores"])
            self.fusion.mask = lambda size: of_words(size).float()
        self.maps.looked_at = {"target": (-1, self.words[1])} if options.blend_latents else {}

    def _of_source(self, source: torch.Tensor, timestep: torch.Tensor) -> Any:
        """The mask of the source's words for a height and width, from a pass of its own: layers
        that come before those that masks are made of need it, too."""
        assert self.words is not None
        self.maps.looked_at = {"source": (0, self.words[0])}
        self.job.predict([source], timestep, self.job.source)
        maps, threshold = self.maps.take("source"), self.options.blend_threshold
        return functools.cache(lambda size: word_mask(maps, size, threshold))

    def _blends(self, step: int) -> bool:
        """Whether latents are blended after this step: 0.2 T < step + 1 < 0.8 T."""
        total = self.job.num_steps
        return self.options.blend_latents and total < 5 * (step + 1) < 4 * total


def _cross_shares(options: FateZeroOptions, target: PromptTokens, num_steps: int) -> torch.Tensor:
    """1 where a step takes the source's text maps for a token of the target, else 0: [T, L]."""
    # The released code counts one step more here than in the self-attentions.
    counted = num_steps + 1
    found = torch.zeros(num_steps, target.length)
    found[: steps_of(options.other_cross_share, counted)] = 1.0
    for word, share in options.cross_shares().items():
        until = torch.arange(num_steps) < steps_of(share, counted)
        found[:, _positions(target, [word])] = until.float().unsqueeze(1)
    return found


def _positions(prompt: PromptTokens, words: Sequence[str]) -> list[int]:
    return prompt.positions(places_of(words, prompt.text))
