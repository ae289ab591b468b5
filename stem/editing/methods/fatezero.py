"""FateZero: the source's attention maps fused into the edit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

from ...attention.families import unet_of
from ...attention.waiting.parked import current_parking
from ...config import StemConfig
from ...diffusion.loop import with_guidance
from ..job import Job, Method, steps_of
from ..maps.map_fusion import MapFusion, Size
from ..maps.prompts import (
    PromptTokens,
    places_of,
    prompt_tokens,
    refined_columns,
    replaced_columns,
)
from ..maps.source_store import SourceStore
from ..maps.text_masks import TextMaps, mask_layers, word_mask
from ..regions.masks import warn_of_size
from .fatezero_options import FateZeroOptions

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
        self.size: Size = job.latent_size
        self.cross = _cross_shares(options, target, job.num_steps)
        self.words: tuple[list[int], list[int]] | None = None
        if options.blend_words is not None:
            before, after = options.blend_words
            self.words = _positions(source, before), _positions(target, after)
            layers = mask_layers(unet_of(job.pipeline))
            self.maps = TextMaps(layers, job.num_frames, self.size, job.ranks)
            self.hooks.add("words", self.maps)
        factors = torch.ones(target.length)
        for word, value in options.equalize.items():
            factors[_positions(target, [word])] = value
        config = self.config
        assert options.mapping is not None
        self.fusion = MapFusion(
            _COLUMNS[options.mapping](source, target).to(job.device),
            self.size,
            equalizer=factors.to(job.device) if options.equalize else None,
            backend=config.backend if isinstance(config, StemConfig) else "auto",
        )
        self.store: SourceStore | None = None
        if options.store != "recompute":
            folder = job.inversion.path if options.store == "disk" else None
            self.store = SourceStore(self.fusion, folder, job.ranks.number)
        self.hooks.add("fusion", self.store or self.fusion)
        self._word_maps: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with super().running():
            try:
                yield
            finally:
                if self.store is not None:
                    self.store.clear()

    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        job = self.job
        if self.store is not None and not self.store.filled:
            self._fill(self.store, step)
        self._turn_to(step)
        branches = [(latents, job.target)]
        if job.guidance != 1.0:
            branches.insert(0, (latents, job.negative))
        if self.store is None:
            branches.insert(0, (job.level(job.num_steps - step - 1), job.source))
        else:
            self.store.turn_to(step)
        rows, conditionings = zip(*branches, strict=True)
        found = job.predict(list(rows), timestep, *conditionings)
        if job.guidance == 1.0:
            return found[-1]
        return with_guidance(found[-2], found[-1], job.guidance)

    def after_step(self, place: int, latents: torch.Tensor) -> torch.Tensor | None:
        if not self.options.blend_latents:
            return None
        step = self.visits[place]
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
        return current_parking().by_frames(torch.where, masks.unsqueeze(1), latents, background)

    def _fill(self, store: SourceStore, first: int) -> None:
        """Store what the steps from this one on take from the source."""
        for step in range(first, self.job.num_steps):
            self._fuse(step)
            with store.recording(step):
                self._pass_source(step)

    def _fuse(self, step: int) -> None:
        """Fuse in this step what its number asks for, without a mask."""
        total = self.job.num_steps
        lower, upper = (steps_of(share, total) for share in self.options.self_bounds)
        cross = self.cross[step]
        self.fusion.cross = cross.to(self.job.device) if bool(cross.any()) else 0.0
        self.fusion.self_on = lower <= step < upper
        self.fusion.mask = None

    def _turn_to(self, step: int) -> None:
        """Fuse in this step what its number asks for, within the source's words' mask."""
        options = self.options
        self._fuse(step)
        if self.words is None:
            return
        if self.fusion.self_on or self._blends(step):
            if self.store is None:
                # A pass of its own: layers that come before the masks' own need them, too.
                self._pass_source(step)
            maps = self._word_maps.pop(step)
            of_words = functools.cache(lambda size: word_mask(maps, size, options.blend_threshold))
            self.fusion.mask = lambda size: of_words(size).float()
            if not options.blend_latents or self._blends(step):
                if "cores" not in self.kept:
                    warn_of_size(of_words(self.size))
                self.kept["cores"] = of_words(self.size)
                self.kept["masks"] = of_words(self.size).clone()
        self.maps.looked_at = {"target": (-1, self.words[1])} if options.blend_latents else {}

    def _pass_source(self, step: int) -> None:
        """The source alone through the UNet; keeps the maps of its words."""
        job, level = self.job, self.job.num_steps - step
        if self.words is not None:
            self.maps.looked_at = {"source": (0, self.words[0])}
        job.predict([job.level(level - 1)], job.timestep(level), job.source)
        if self.words is not None:
            self._word_maps[step] = self.maps.take("source")

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
