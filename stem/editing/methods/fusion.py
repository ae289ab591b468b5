"""Our own method: FateZero's fusion of maps through shared bases, guided early, within a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...attention.waiting.parked import current_parking
from ...diffusion.loop import with_guidance
from ...diffusion.schedule import clean_of, noised, prediction_of, sampling_scheduler
from ...inversion import InversionFolder
from ...names import PRESETS
from ..job import (
    Job,
    Method,
    Options,
    check_choice,
    check_flag,
    check_share,
    generator_of,
    steps_of,
)
from ..maps.map_fusion import MapFusion
from ..maps.prompts import (
    ColumnMap,
    PromptTokens,
    check_word_counts,
    prompt_tokens,
    refined_columns,
    replaced_columns,
    words_of,
)
from ..regions.consensus import Motion, carried, in_consensus
from ..regions.masks import dilated, warn_of_size
from .difference_mask import difference_map, mean_difference, quantile

_PRESETS: dict[str, dict[str, Any]] = {
    "colour": {"cross_maps": 1.0, "self_maps": 1.0},
    "texture": {"cross_maps": 0.5, "self_maps": 0.5},
    "shape": {
        "cross_maps": 0.0,
        "self_maps": 1.0,
        "self_outside": True,
        "consensus": True,
        "restarts": 2,
        "narrowing": True,
    },
    "style": {"cross_maps": 0.8, "self_maps": 0.8, "mask": False},
}
_OTHERWISE: dict[str, Any] = {
    "self_outside": False,
    "consensus": False,
    "restarts": 0,
    "mask": True,
    "narrowing": False,
}
_RESTART_FROM, _RESTART_TO = 0.5, 0.8
"""Shares of the noise levels: a restart begins at the first and goes back up to the second."""
_GUIDANCE = {"colour": 3.0, "texture": 4.0, "shape": 7.5, "style": 7.5}


@dataclass(frozen=True)
class FusionOptions(Options):
    """Options of `fusion`. If an option is None, the value of the preset is used.

    Args:
        preset: Name of the preset, "colour", "texture", "shape" or "style". Their guidance scales
            are 3, 4, 7.5 and 7.5.
        cross_maps: Share of the steps in which the source's text maps are taken.
        self_maps: Share of the steps in which the source's self-attention maps are taken.
        self_outside: Whether the self-attention maps are taken outside the mask only.
        guided_until: Share of the steps that are guided; the other steps use the prompt alone.
        mapping: Mapping of the source's text maps to the prompt's, "replace", "refine", or "auto":
            "replace" if both prompts have equally many words, else "refine".
        mask: Whether the video may change inside a mask only, see `difference_map`; outside the
            mask it stays the source.
        mask_levels: Shares of the noise levels. The difference of the prompts is taken at levels
            above the first share and up to the second.
        mask_threshold: Threshold of the difference, which is scaled so that its 99 % quantile is 1.
        dilation: Number of latent cells that the mask is dilated by.
        narrowing: Whether the mask narrows when guidance ends, to what it was before it was dilated
            and to where the prompts differ on what has been edited so far, beyond
            `mask_threshold` of the 99 % quantile over all cells; a mask of less than 1 % of them
            stays.
        paste: Whether frames take the source's pixels outside the mask, which the VAE's decoder
            would tint.
        consensus: Whether the predicted pictures are averaged along the object's motion, inside the
            mask, so that a new shape has one outline in all frames. The motion is one path that is
            quadratic over the frames, so this is for clips of one object that moves smoothly.
        consensus_until: Share of the steps in which frames take that average; in the later steps
            they go a part of the way to it, which rises from 0.5 to 0.9.
        restarts: Number of times that fresh noise takes what is inside the mask from 0.5 of the
            noise levels back to 0.8, from where the steps in between are done again: they mend an
            outline that the first time left between the old shape and the new. With consensus the
            noise moves along with the object. Source: arXiv 2306.14878.

    Raises:
        ValueError: a value is out of range; the message names what is allowed.
    """

    presets: ClassVar[tuple[str, ...]] = PRESETS["fusion"]

    preset: str = "colour"
    cross_maps: float | None = None
    self_maps: float | None = None
    self_outside: bool | None = None
    guided_until: float = 0.5
    mapping: str = "auto"
    mask: bool | None = None
    # On thirty scenes apart from the study's, 0.35 to 0.8 made the same edits, and masks of
    # textures that overlap the truth 0.02 less.
    mask_levels: tuple[float, float] = (0.4, 1.0)
    mask_threshold: float = 0.3
    dilation: int = 1
    narrowing: bool | None = None
    paste: bool = True
    consensus: bool | None = None
    consensus_until: float = 0.3
    restarts: int | None = None

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, self.presets)
        self.fill({**_OTHERWISE, **_PRESETS[self.preset]})
        for name in ("cross_maps", "self_maps", "guided_until", "consensus_until"):
            check_share(name, getattr(self, name))
        for name in ("self_outside", "mask", "narrowing", "consensus", "paste"):
            check_flag(name, getattr(self, name))
        check_choice("mapping", self.mapping, ("auto", "replace", "refine"))
        levels = self.mask_levels
        if not isinstance(levels, (tuple, list)) or len(levels) != 2:
            raise ValueError(f"mask_levels is {levels!r}; it must be two shares of the steps")
        object.__setattr__(self, "mask_levels", tuple(levels))
        for share in levels:
            check_share("mask_levels", share)
        if levels[0] >= levels[1]:
            raise ValueError(f"mask_levels is {levels!r}; the first must be below the second")
        threshold = self.mask_threshold
        if not isinstance(threshold, (int, float)) or not 0 < threshold < float("inf"):
            raise ValueError(f"mask_threshold is {threshold!r}; it must be a number above 0")
        for name in ("dilation", "restarts"):
            count = getattr(self, name)
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 0")
        for name in ("self_outside", "narrowing", "consensus", "restarts"):
            if getattr(self, name) and not self.mask:
                raise ValueError(f"{name} is {getattr(self, name)}; it needs mask=True")

    @property
    def guidance(self) -> float:
        return _GUIDANCE[self.preset]

    def check(self, inversion: InversionFolder, prompt: str) -> None:
        self.check_words(inversion.settings["prompt"], prompt)

    def check_words(self, source: str, prompt: str) -> None:
        """Raise ValueError where two prompts cannot be mapped as asked."""
        if self.mapping == "replace":
            check_word_counts(source, prompt)


class Fusion(Method):
    """Rows [source | unconditional, while guided | conditional], on shared bases with STEM.

    The source's row is the inversion's own step towards the level that is edited; the maps of the
    conditional row are the source's, mapped to the prompt's words.

    Args:
        job: Job.
        options: Options.
    """

    options: FusionOptions

    def __init__(self, job: Job, options: FusionOptions) -> None:
        super().__init__(job, options)
        self.pasted = bool(options.mask) and options.paste
        first, end = (
            job.num_steps - steps_of(share, job.num_steps) for share in (_RESTART_TO, _RESTART_FROM)
        )
        again = [*range(first, end)] * (options.restarts or 0)
        self.visits = [*range(end), *again, *range(end, job.num_steps)]
        self.scheduler = sampling_scheduler(job.pipeline, job.num_steps)
        source, target = (
            prompt_tokens(job.pipeline, text) for text in (job.source_prompt, job.prompt)
        )
        columns = _columns(source, target, options.mapping).to(job.device)
        self.fusion = MapFusion(columns, job.latent_size)
        self.hooks.add("fusion", self.fusion)

    def begin(self) -> torch.Tensor:
        if self.options.mask:
            self._find_masks()
        return super().begin()

    def _find_masks(self) -> None:
        job, options = self.job, self.options
        found = difference_map(job, self.hooks, *options.mask_levels)
        cores = found > options.mask_threshold
        masks = dilated(cores, options.dilation)
        warn_of_size(masks)
        self.kept = {"cores": cores, "masks": masks}
        if options.consensus:
            weights = found.clamp(0, 1).square() * masks
            motions = [Motion.of(weights[scene.start : scene.stop]) for scene in job.scenes]
            self.kept["centres"] = torch.cat([motion.centres for motion in motions])
            self.kept["radii"] = torch.cat([motion.radii for motion in motions])

    def _narrow_masks(self, expected: torch.Tensor, wanted: torch.Tensor) -> None:
        """Keep of the masks their cores, and where predictions by the two prompts differ."""
        cores, masks = self.kept["cores"], self.kept["masks"]
        difference = mean_difference(expected, wanted)
        if self.options.consensus:
            everywhere = torch.ones_like(masks)
            difference = self._in_consensus(difference.unsqueeze(1), everywhere, None).squeeze(1)
        difference = difference * masks
        new = difference > self.options.mask_threshold * quantile(difference, 0.99)
        self.kept = {**self.kept, "masks": (new | cores) & masks}

    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        job, options = self.job, self.options
        total = job.num_steps
        self.fusion.cross = float(step < steps_of(options.cross_maps or 0.0, total))
        self.fusion.self_on = step < steps_of(options.self_maps or 0.0, total)
        self.fusion.mask = self.kept["masks"] if options.self_outside else None
        source = job.level(total - step - 1)
        guided_steps = steps_of(options.guided_until, total)
        if job.guidance != 1.0 and step < guided_steps:
            _, without, prompted = job.predict(
                [source, latents, latents], timestep, job.source, job.negative, job.target
            )
            prediction = with_guidance(without, prompted, job.guidance)
        elif options.narrowing and step == guided_steps > 0:
            _, expected, prediction = job.predict(
                [source, latents, latents], timestep, job.source, job.source, job.target
            )
            self._narrow_masks(expected, prediction)
        else:
            _, prediction = job.predict([source, latents], timestep, job.source, job.target)
        if options.consensus:
            return self._agreed(prediction, timestep, latents, self._late(step))
        return prediction

    def _late(self, step: int) -> float | None:
        """The place of a step among those after `consensus_until`, from 0 to 1, or None."""
        total = self.job.num_steps
        first = steps_of(self.options.consensus_until, total)
        return None if step < first else (step - first) / max(1, total - 1 - first)

    def _agreed(
        self,
        prediction: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        late: float | None,
    ) -> torch.Tensor:
        parking = current_parking()
        clean = parking.by_frames(
            lambda prediction, latents: clean_of(self.scheduler, prediction, timestep, latents),
            prediction,
            latents,
        )
        return parking.by_frames(
            lambda clean, latents: prediction_of(self.scheduler, clean, timestep, latents),
            self._in_consensus(clean, self.kept["masks"], late),
            latents,
        )

    def _in_consensus(
        self, values: torch.Tensor, masks: torch.Tensor, late: float | None
    ) -> torch.Tensor:
        """Each scene's values [N, c, h, w] in consensus."""
        return self._by_scene(
            lambda here, motion: in_consensus(values[here], masks[here], motion, late)
        )

    def _by_scene(self, made: Callable[[slice, Motion], torch.Tensor]) -> torch.Tensor:
        """What is made of the frames of each scene and the object's motion in them, [N, ...]."""
        motion = Motion(self.kept["centres"], self.kept["radii"])
        places = [slice(scene.start, scene.stop) for scene in self.job.scenes]
        found = [made(here, motion[here]) for here in places]
        return found[0] if len(found) == 1 else current_parking().joined(found)

    def after_step(self, place: int, latents: torch.Tensor) -> torch.Tensor | None:
        if not self.options.mask:
            return None
        step, total = self.visits[place], self.job.num_steps
        following = self.visits[place + 1] if place + 1 < len(self.visits) else total
        if following <= step:
            latents = self._noised(latents, step + 1, following, f"restart {place}")
        source = self.job.level(total - following)
        return current_parking().by_frames(
            torch.where, self.kept["masks"].unsqueeze(1), latents, source
        )

    def _noised(self, latents: torch.Tensor, step: int, earlier: int, name: str) -> torch.Tensor:
        """Latents before a step, with as much fresh noise as they have before an earlier one."""
        noise = torch.randn(latents.shape[1:], generator=generator_of(self.job.seed, name))
        noise = noise.to(latents.device).unsqueeze(0)
        if self.options.consensus:
            noise = self._by_scene(lambda here, motion: carried(noise, motion))
        timestep, noisier = (self.scheduler.timesteps[at] for at in (step, earlier))
        return current_parking().by_frames(
            lambda latents, noise: noised(self.scheduler, latents, timestep, noisier, noise),
            latents,
            noise.expand_as(latents),
        )


def _columns(source: PromptTokens, target: PromptTokens, mapping: str) -> ColumnMap:
    if mapping == "auto":
        same = len(words_of(source.text)) == len(words_of(target.text))
        mapping = "replace" if same else "refine"
    return (replaced_columns if mapping == "replace" else refined_columns)(source, target)
