"""The quality study: `python -m benchmarks.quality`; an interrupted run goes on where it stopped.

Inverts and reconstructs 20 unseen videos of the procedural world and 3 natural clips with the
embedded model, by every method and, for stem, with its options changed one at a time, from the
defaults and from the paper's. Writes benchmarks/results/quality.json, .md and .png; `StemConfig`'s
defaults are chosen from them.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem import load_pipeline, read_video
from stem.attention.frames import InflatedProcessor
from stem.attention.handle import self_attentions
from stem.clips import shipped_clip
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.inversion import round_trip
from stem.metrics import mean_interval, psnr, ssim, warped_similarity
from stem.metrics.fidelity import SSIM_VARIANT
from stem.toy import render, sample_scene
from stem.toy.data import TRAINING_CLIP
from stem_kernels.info import provenance

from .quality_report import draw, table, values
from .quality_variants import CEILING, FRAMES, LONG_FRAMES, VARIANTS, Variant

OUT = Path(__file__).parent / "results" / "quality.json"
SIZE = 64
FACTOR = 4
STEPS = 50
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
    """One video through one variant."""
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
            variant.config,
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
        "similarity": probe.similarity,
        "attention_error": statistics.fmean(probe.errors),
        "seconds": seconds,
    }


class Probe:
    """What the self-attentions of a UNet put out while it inverts a video.

    Attributes:
        similarity: by timestep, of the last self-attention's features warped by the true flow.
        errors: at every PROBED_STEPS-th step of the inversion and for every self-attention,
            ||out - dense|| / ||dense||: dense is what attention over all frames makes of its input.
        seconds: the probe's own.
    """

    def __init__(
        self, unet: torch.nn.Module, source: Source, map_size: Sequence[int], num_steps: int
    ) -> None:
        self.similarity: dict[str, float] = {}
        self.errors: list[float] = []
        self.seconds = 0.0
        self._source = source
        self._map_size = tuple(map_size)
        self._num_steps = num_steps
        self._features = torch.empty(0)
        self._steps = 0
        last = last_self_attention(unet)
        self._hooks = [last.register_forward_hook(self._keep)]
        for name, layer in self_attentions(unet).items():
            compare = partial(self._compare, InflatedProcessor(name, None))
            self._hooks.append(layer.register_forward_hook(compare))

    def on_inverted(self, timestep: int) -> None:
        self._steps += 1
        flow, occlusion = self._source.flow, self._source.occlusion
        if flow is not None and occlusion is not None:
            start = time.perf_counter()
            maps = self._features.transpose(1, 2).unflatten(2, self._map_size)
            self.similarity[str(timestep)] = warped_similarity(maps, flow, occlusion)
            self.seconds += time.perf_counter() - start

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        self._features = output

    def _compare(
        self, inflated: InflatedProcessor, module: Any, arguments: Any, output: torch.Tensor
    ) -> None:
        if self._steps % PROBED_STEPS or self._steps == self._num_steps:
            return
        start = time.perf_counter()
        dense = inflated(module, arguments[0])
        self.errors.append(float((output - dense).norm() / dense.norm()))
        self.seconds += time.perf_counter() - start


def last_self_attention(unet: torch.nn.Module) -> torch.nn.Module:
    """The one nearest the output; a UNet lists its middle block after those."""
    layers = self_attentions(unet)
    return next(layers[name] for name in reversed(layers) if name.startswith("up_blocks"))


def vae_alone(source: Source) -> dict[str, Any]:
    """The ceiling: what the autoencoder's round trip leaves."""
    decoded = decode_latents(model(), encode_frames(model(), source.frames))
    return {"psnr": psnr(decoded, source.frames), "ssim": ssim(decoded, source.frames)}


def run(out: Path, names: Sequence[str], processes: int) -> dict[str, Any]:
    """Measure what `out` does not hold yet, and write it after every variant."""
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "videos": f"{WORLD_VIDEOS} world videos that no training saw, and {', '.join(NATURAL)} "
        f"(of which the autoencoder's training saw {TRAINING_CLIP})",
        "pixels": SIZE,
        "steps": STEPS,
        "processes": processes,
        "ssim_variant": SSIM_VARIANT,
        "model": fingerprint(load_pipeline("embedded")),
        "provenance": where,
        "measured": {},
        "rows": {},
    }
    if out.is_file():
        take_up(results, json.loads(out.read_text()), out)
    rows = results["rows"]
    videos = {frames: sources(frames) for frames in (FRAMES, LONG_FRAMES)}
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, context) as pool:
        if CEILING not in rows:
            found = pool.map(vae_alone, videos[FRAMES].values())
            rows[CEILING] = dict(zip(videos[FRAMES], found, strict=True))
        for name in names:
            if name in rows:
                continue
            variant = VARIANTS[name]
            chosen = videos[variant.frames]
            found = pool.map(measure, chosen.values(), repeat(variant), repeat(STEPS))
            rows[name] = dict(zip(chosen, found, strict=True))
            results["measured"][name] = {"commit": commit, "variant": repr(variant)}
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(
                f"{name}: {mean_interval(values(results, name, 'psnr', world=True)):.2f} dB",
                flush=True,
            )
    return results


def take_up(results: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    """Put the rows of an earlier run into `results`, but for variants that have changed since.

    Raises:
        SystemExit: the earlier run is of another model, machine or setting.
    """
    for name, now in results.items():
        if name not in ("measured", "rows") and earlier.get(name) != now:
            raise SystemExit(f"{out} is of another {name}; move it away to start afresh")
    for name, row in earlier["rows"].items():
        if name == CEILING:
            results["rows"][name] = row
            continue
        then = earlier["measured"][name]
        if name in VARIANTS and then["variant"] == repr(VARIANTS[name]):
            results["rows"][name], results["measured"][name] = row, then
        else:
            print(f"{name} has changed: {then['variant']} in {out} is left out", flush=True)


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md and .png go beside it.")] = OUT,
    only: Annotated[str, typer.Option(help="Comma-separated variants. Default: all.")] = "",
    processes: Annotated[int, typer.Option(help="Of one thread each. Default: a core's worth.")] = (
        os.cpu_count() or 1
    ),
) -> None:
    """Run the quality study with the embedded model."""
    names = [name.strip() for name in only.split(",")] if only else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(VARIANTS)}")
    results = run(out, names, processes)
    out.with_suffix(".md").write_text(table(results))
    draw(results, out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
