"""How near attention to bases comes to that over all frames where a base stands for many tokens.

`python -m benchmarks.studies.calibration`; an interrupted run goes on where it stopped. Frames of
256x256 pixels, 8 at a time: 128 tokens a base in the embedded model's widest layers. Inputs of
every self-attention are taken from one call of the UNet on noisy latents, and every variant is
compared with attention over all frames on the same input; so is the UNet's whole prediction, at one
noise level. Two of the videos are compared at 32 and 64 frames, too. Writes
benchmarks/results/calibration.json, .md and .png. With other weights: `python -m
benchmarks.studies.calibration --model ID --size 512 --videos a.mp4,b.mp4 --out sd.json`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.attention_processor import Attention

import stem
from stem import read_video
from stem.attention.families import self_attentions
from stem.attention.layers.projections import join_heads, project_keys_and_values, project_queries
from stem.config import InflatedConfig
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import encode_frames, encode_prompt, predict
from stem.video.clips import shipped_clip
from stem.world import render, sample_scene
from stem_kernels.info import provenance
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.shared.spread import spread_tokens

from ... import records
from ...cases.layers import processor_call
from ...cases.merging import MergedAttention, merging
from ..quality.measure import FIRST_SEED
from .report import draw, table
from .variants import FEW, MERGED, NAMES, SCALED, VARIANTS, moments_of, of_video

OUT = records.RESULTS / "calibration.json"
FRAMES = 8
TIMESTEPS = (400, 100, 700)
OF_UNET = 400
"""Timestep at which whole predictions are compared."""
SHARPNESS = (2, 4)
LENGTHS = (32, 64)
"""Frames of the videos that are tried at more than FRAMES."""
CHECKED = 1009
"""Tokens of a layer that are compared: spread evenly, at other places than the calibration's."""
WORLD_VIDEOS = 2
CLIPS = {"bikes.mp4": 100, "carphone_pristine.mp4": 40}
"""First frames of those that are read."""


@dataclass(frozen=True)
class Case:
    """A video at a noise level.

    Args:
        name: Name for the record.
        frames: Frames, uint8 [N, H, W, 3].
        prompt: Prompt that describes them.
        timestep: Timestep of the noise.
    """

    name: str
    frames: torch.Tensor
    prompt: str
    timestep: int


def cases(size: int, videos: list[str], frames: int = FRAMES) -> Iterator[Case]:
    """The study's cases: `videos`, or two videos of the world and two natural ones."""
    found: list[tuple[str, torch.Tensor, str]] = []
    for video in videos:
        read = read_video(video, frames=f"0:{frames}", size=(size, size))
        found.append((Path(video).name, read.frames, ""))
    if not videos:
        for seed in range(FIRST_SEED, FIRST_SEED + WORLD_VIDEOS):
            clip = render(sample_scene(seed), frames, size)
            found.append((f"world {seed}", clip.frames, clip.caption))
        for name, first in CLIPS.items():
            chosen = f"{first}:{first + frames}"
            read = read_video(shipped_clip(name), frames=chosen, size=(size, size))
            found.append((name, read.frames, ""))
    # Noise level by noise level: an interrupted run holds every video.
    for timestep in TIMESTEPS:
        for name, shown, prompt in found:
            yield Case(f"{name} at {timestep}", shown, prompt, timestep)


def long_cases(size: int) -> Iterator[Case]:
    """A video of the world and a natural one, at one noise level, of each of LENGTHS."""
    for frames in LENGTHS:
        for case in cases(size, [], frames):
            if case.timestep == OF_UNET and case.name.startswith((f"world {FIRST_SEED} ", "bikes")):
                yield Case(f"{case.name}, {frames} frames", case.frames, case.prompt, case.timestep)


@torch.no_grad()
def measure(pipeline: Any, case: Case) -> dict[str, Any]:
    """Figures of one case: of the layers by variant, and of the UNet's prediction."""
    timestep, prediction = _call_of_unet(pipeline, case)
    layers = self_attentions(pipeline.unet)
    inputs = _inputs_of(layers, prediction)
    widest = max(tokens.shape[1] for tokens in inputs.values())
    found: dict[str, Any] = {"layers": {}, "sharpened": {}, "unet": {}}
    for name, tokens in inputs.items():
        exact = all_frames(layers[name], tokens)
        found["layers"][name] = {
            "tokens": tokens.shape[:2].numel(),
            "widest": tokens.shape[1] == widest,
            "figures": {
                variant: compared(variant, layers[name], tokens, timestep, exact)
                for variant in NAMES
            },
        }
        if tokens.shape[1] < widest:
            continue
        for factor in SHARPNESS:
            sharp = copy.deepcopy(layers[name])
            sharp.to_q.weight.mul_(factor)
            exact = all_frames(sharp, tokens)
            found["sharpened"][f"{name} x {factor}"] = {
                variant: compared(variant, sharp, tokens, timestep, exact)["error"]
                for variant in FEW
            }
    if case.timestep == OF_UNET:
        with stem.enabled(pipeline.unet, InflatedConfig(num_frames=FRAMES)):
            right = prediction()
        for variant in NAMES:
            with _in_unet(variant, pipeline.unet, widest):
                found["unet"][variant] = relative(prediction(), right)
    return found


@torch.no_grad()
def measure_long(pipeline: Any, case: Case) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of the layers with the most tokens, by layer and variant."""
    timestep, prediction = _call_of_unet(pipeline, case)
    layers = self_attentions(pipeline.unet)
    inputs = _inputs_of(layers, prediction)
    widest = max(tokens.shape[1] for tokens in inputs.values())
    found = {}
    for name, tokens in inputs.items():
        if tokens.shape[1] == widest:
            exact = all_frames(layers[name], tokens)
            found[name] = {
                variant: compared(variant, layers[name], tokens, timestep, exact) for variant in FEW
            }
    return found


def _call_of_unet(pipeline: Any, case: Case) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The timestep of a case, and the UNet's prediction for its noisy latents."""
    latents = encode_frames(pipeline, case.frames)
    conditioning = encode_prompt(pipeline, case.prompt, *case.frames.shape[1:3])
    generator = torch.Generator().manual_seed(case.timestep)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timestep = torch.tensor(case.timestep)
    noisy = pipeline.scheduler.add_noise(latents, noise, timestep.view(1).to(latents.device))
    return timestep, lambda: predict(pipeline, noisy, timestep, conditioning)


def _inputs_of(layers: dict[str, Attention], prediction: Any) -> dict[str, torch.Tensor]:
    """What every self-attention takes in while the UNet makes its own prediction."""
    inputs: dict[str, torch.Tensor] = {}
    removable = [
        layer.register_forward_hook(
            lambda module, given, out, name=name: inputs.__setitem__(name, given[0])
        )
        for name, layer in layers.items()
    ]
    try:
        prediction()
    finally:
        for hook in removable:
            hook.remove()
    return inputs


def _checked(tokens: torch.Tensor) -> torch.Tensor:
    total = tokens.shape[:2].numel()
    return spread_tokens(total, min(CHECKED, total), tokens.device)


def all_frames(layer: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """What attention over all frames puts out at the tokens that are compared: [CHECKED, C]."""
    chosen = tokens.flatten(0, 1)[_checked(tokens)]
    query = project_queries(layer, chosen[None, None])
    attended = partial_attention(query, *project_keys_and_values(layer, tokens, 1)).output
    joined = join_heads(attended.unsqueeze(1).to(tokens), chosen[None, None].shape)
    return layer.to_out[0](joined)[0, 0]


@contextmanager
def _in_unet(variant: str, unet: Any, widest: int) -> Iterator[None]:
    if variant == MERGED:
        with merging(unet, widest):
            yield
    else:
        config = of_video(VARIANTS[variant], FRAMES)
        with moments_of(variant), stem.enabled(unet, config):
            yield


def compared(
    variant: str,
    layer: Attention,
    tokens: torch.Tensor,
    timestep: torch.Tensor,
    exact: torch.Tensor,
) -> dict[str, float]:
    """Relative error of a layer's output [frames, S, C], and CPU (or GPU) seconds of the call."""
    call: Callable[[], torch.Tensor]
    if variant == MERGED:
        call = partial(MergedAttention(layer.processor, 0), layer, tokens)
    else:
        config = of_video(VARIANTS[variant], len(tokens))
        call = processor_call(config, layer, tokens, timestep)
    on_gpu = tokens.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    with moments_of(variant):
        out = call()
    if on_gpu:
        torch.cuda.synchronize(tokens.device)
    seconds = clock() - start
    return {
        "error": relative(out.flatten(0, 1)[_checked(tokens)], exact),
        "seconds": float(f"{seconds:.3g}"),
    }


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float(f"{float((found - right).norm() / right.norm()):.4g}")


def run(out: Path, model: str, size: int, videos: list[str], limit: int | None) -> dict[str, Any]:
    """Measure the cases that `out` does not hold yet, and write it after each of them."""
    pipeline = stem.load_pipeline(model)
    where = provenance("diffusers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "pixels": size,
        "frames": FRAMES,
        "model": fingerprint(pipeline),
        "variants": {name: repr(config) for name, config in VARIANTS.items()},
        "provenance": where,
        "scaled": SCALED,
        "cases": {},
        "lengths": {},
    }
    results = records.taken_up(out, results, ["cases", "lengths"])
    wanted = [("cases", case) for case in cases(size, videos)]
    wanted += [("lengths", case) for case in ([] if videos else long_cases(size))]
    missing = [(part, case) for part, case in wanted if case.name not in results[part]]
    for part, case in missing[:limit]:
        figures = measure(pipeline, case) if part == "cases" else measure_long(pipeline, case)
        results[part][case.name] = {"commit": commit, **figures}
        out.parent.mkdir(parents=True, exist_ok=True)
        records.write(results, out)
        print(case.name, flush=True)
    return results


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md and .png go beside it.")] = OUT,
    model: Annotated[str, typer.Option(help="A hub id, a folder or embedded.")] = "embedded",
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 256,
    videos: Annotated[str, typer.Option(help="Comma-separated files. Default: the study's.")] = "",
    limit: Annotated[int | None, typer.Option(help="Cases to measure now at most.")] = None,
) -> None:
    """Compare calibrated bases with all-frame attention, layer by layer."""
    torch.set_num_threads(1)
    given = [name.strip() for name in videos.split(",") if name.strip()]
    results = run(out, model, size, given, limit)
    out.with_suffix(".md").write_text(table(results))
    draw(results, out.with_suffix(".png"))
    print(table(results))
