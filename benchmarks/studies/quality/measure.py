"""One video of the quality study through one variant, and the videos."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stem import load_pipeline, read_video
from stem.attention import Hooks
from stem.attention.families import self_attentions
from stem.attention.features import LastFeatures
from stem.attention.layers.frames import InflatedProcessor
from stem.attention.layers.rows import RowLayout
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.inversion import round_trip
from stem.metrics import psnr, ssim, warped_similarity
from stem.video.clips import shipped_clip
from stem.world import render, sample_scene

from ...cases.layers import of_frames
from .variants import Variant

SIZE = 64
FACTOR = 4
PROBED_STEPS = 5
FIRST_SEED = 30_000_000
WORLD_VIDEOS = 20
NATURAL = {
    "bikes.mp4": "100:116",
    "bigbuckbunny.mp4": "40:56",
    "carphone_pristine.mp4": "100:116",
}


@dataclass(frozen=True)
class Source:
    """A video to invert, and what is true of it at the latents' resolution."""

    frames: torch.Tensor
    prompt: str
    flow: torch.Tensor | None = None
    occlusion: torch.Tensor | None = None


def sources(frames: int) -> dict[str, Source]:
    """The study's videos by name."""
    found = {}
    for seed in range(FIRST_SEED, FIRST_SEED + WORLD_VIDEOS):
        scene = sample_scene(seed)
        coarse = render(scene, frames, SIZE // FACTOR)
        clip = render(scene, frames, SIZE)
        found[f"world {seed}"] = Source(clip.frames, clip.caption, coarse.flow, coarse.occlusion)
    for name, chosen in NATURAL.items():
        video = read_video(shipped_clip(name), frames=chosen, size=(SIZE, SIZE))
        found[name] = Source(video.frames[:frames], "")
    return found


@functools.cache
def model() -> Any:
    """The embedded pipeline, once a process; each process has one thread."""
    torch.set_num_threads(1)
    return load_pipeline("embedded")


def measure(source: Source, variant: Variant, steps: int) -> dict[str, Any]:
    """One video through one variant: figures by name, and the curve that `similarity` is of."""
    pipeline = model()
    latents = encode_frames(pipeline, source.frames)
    probe = Probe(pipeline.unet, source, latents.shape[2:], steps)
    start = time.perf_counter()
    try:
        back = round_trip(
            pipeline,
            latents,
            source.prompt,
            steps,
            of_frames(variant.config, len(source.frames)),
            cached=variant.cached,
            on_inverted=probe.on_inverted,
        )
    finally:
        probe.remove()
    seconds = time.perf_counter() - start - probe.seconds
    decoded = decode_latents(pipeline, back)
    return {
        "psnr": psnr(decoded, source.frames),
        "ssim": ssim(decoded, source.frames),
        "latent_error": float((back - latents).norm() / latents.norm()),
        "similarity": statistics.fmean(probe.similarity.values()) if probe.similarity else None,
        "attention_error": statistics.fmean(probe.errors),
        "seconds": seconds,
        "curve": probe.similarity,
    }


class Probe:
    """What the self-attentions of a UNet put out while it inverts a video.

    Attributes:
        similarity: Warped similarity of the last self-attention's features under the true flow, by
            timestep.
        errors: Relative errors ||out - dense|| / ||dense|| of every self-attention at every
            PROBED_STEPS-th step of the inversion: dense is what attention over all frames makes of
            its input.
        seconds: Time that the probe itself took.
    """

    def __init__(self, unet: Any, source: Source, map_size: Sequence[int], num_steps: int) -> None:
        self.similarity: dict[str, float] = {}
        self.errors: list[float] = []
        self.seconds = 0.0
        self._source = source
        self._height, self._width = map_size
        self._num_steps = num_steps
        self._steps = 0
        self._last = LastFeatures(unet)
        self._hooks: list[Any] = [self._last]
        for name, layer in self_attentions(unet).items():
            dense = InflatedProcessor(name, RowLayout(len(source.frames)), Hooks())
            compare = partial(self._compare, dense)
            self._hooks.append(layer.register_forward_hook(compare))

    def on_inverted(self, timestep: int) -> None:
        self._steps += 1
        flow, occlusion = self._source.flow, self._source.occlusion
        if flow is not None and occlusion is not None:
            start = time.perf_counter()
            maps = self._last.maps(len(self._source.frames), self._height, self._width)
            self.similarity[str(timestep)] = warped_similarity(maps, flow, occlusion)
            self.seconds += time.perf_counter() - start

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _compare(
        self, inflated: InflatedProcessor, module: Any, arguments: Any, output: torch.Tensor
    ) -> None:
        if self._steps % PROBED_STEPS or self._steps == self._num_steps:
            return
        start = time.perf_counter()
        dense = inflated(module, arguments[0])
        self.errors.append(float((output - dense).norm() / dense.norm()))
        self.seconds += time.perf_counter() - start


def vae_alone(source: Source) -> dict[str, Any]:
    """The ceiling: what the autoencoder's round trip leaves."""
    decoded = decode_latents(model(), encode_frames(model(), source.frames))
    return {"psnr": psnr(decoded, source.frames), "ssim": ssim(decoded, source.frames)}
