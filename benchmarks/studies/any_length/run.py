"""Videos of any length: `python -m benchmarks.studies.any_length [--only memory,throughput]`.

memory: peak memory of a UNet call of Stable Diffusion 1.5's shape over the number of frames, by
way of attending, with the slope a frame. throughput: chunks in lockstep against one batch. fit: how
far bases of a few frames are from those of all, with the embedded model on world videos, and how
steady an edit is across the borders of chunks. stream: a long video of four scenes through `stem
invert` and `stem reconstruct`. Writes benchmarks/results/any-length.json, .md and .png; a part that
is measured again takes the place of its earlier figures, and so does a way with `--ways`. For the
memory set MALLOC_MMAP_THRESHOLD_=131072, so that what is freed goes back to the system.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import stem
from stem.attention import Hooks, Recording, Replay
from stem.attention.chunks import spread_frames
from stem.attention.families import self_attentions
from stem.attention.layers.rows import RowLayout
from stem.attention.layers.stem import StemProcessor, StemState, bases_shape
from stem.config import AttentionConfig, InflatedConfig, PerFrameConfig, StemConfig
from stem.diffusion.loop import denoise, guided
from stem.diffusion.pipeline import decode_latents, encode_frames, encode_prompt, predict
from stem.diffusion.schedule import inverse_scheduler
from stem.inversion.methods import attention_on
from stem.inversion.reconstructing import sample
from stem.metrics import mean_interval, pair_warp_errors
from stem.world import Clip, Scene, caption, changed, render, sample_scene
from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory

from ... import records
from ...cases.unets import sd15_unet
from .stream import measure_stream
from .stream import report as stream_report

OUT = records.RESULTS / "any-length.json"
PARTS = ("memory", "throughput", "fit", "stream")

LATENTS = 32  # of 256x256 pixels
CHUNK = 8
WAYS: dict[str, Callable[[int], AttentionConfig]] = {
    "stem, one batch": lambda n: StemConfig(num_frames=n),
    "stem, lockstep": lambda n: StemConfig(num_frames=n, chunk=CHUNK),
    "stem, fit_frames": lambda n: StemConfig(num_frames=n, chunk=CHUNK, fit_frames=CHUNK),
    "ddim, one batch": lambda n: PerFrameConfig(num_frames=n),
    "ddim, chunks": lambda n: PerFrameConfig(num_frames=n, chunk=CHUNK),
    "inflated, one batch": lambda n: InflatedConfig(num_frames=n),
    "inflated, lockstep": lambda n: InflatedConfig(num_frames=n, chunk=CHUNK),
}
MEMORY_FRAMES = (8, 16, 32)
THROUGHPUT_FRAMES = 32
ROUNDS = 3

FIT_FRAMES = 64
FITS = (8, 16, 32)
PIXELS = 64
FACTOR = 4
SEEDS = range(41_000_000, 41_000_003)  # scenes of one object; no training saw them
TIMESTEPS = (201, 501, 801)
EDIT_STEPS = 10
GUIDANCE = 5.0


@torch.no_grad()
def unet_call(unet: UNet2DConditionModel, frames: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(frames, 4, LATENTS, LATENTS, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator).expand(frames, -1, -1)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return unet(latents, torch.tensor(501), text, return_dict=False)[0]

    return call


def measure_memory(ways: Sequence[str] = tuple(WAYS)) -> Iterator[dict[str, Any]]:
    """Peak memory above the loaded model, by way and number of frames."""
    unet = sd15_unet()
    unet_call(unet, 1)()
    commit = provenance()["commit"]
    for way in ways:
        for frames in MEMORY_FRAMES:
            with stem.enabled(unet, WAYS[way](frames)), PeakMemory() as memory:
                unet_call(unet, frames)()
            yield {"way": way, "frames": frames, "bytes": memory.extra_bytes, "commit": commit}


def slope(rows: list[dict[str, Any]], way: str) -> float:
    """Bytes a frame, by least squares over the frames from CHUNK on."""
    points = [(row["frames"], row["bytes"]) for row in rows if row["way"] == way]
    frames, peaks = zip(*points, strict=True)
    return statistics.linear_regression(frames, peaks).slope


def measure_throughput() -> Iterator[dict[str, Any]]:
    """Seconds of a call, one batch and lockstep in turns, and that their results agree."""
    unet = sd15_unet()
    call = unet_call(unet, THROUGHPUT_FRAMES)
    ways = ("stem, one batch", "stem, lockstep")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outputs = {}
    for _ in range(ROUNDS):
        for way in ways:
            with stem.enabled(unet, WAYS[way](THROUGHPUT_FRAMES)):
                start = time.perf_counter()
                outputs[way] = call()
                seconds[way].append(time.perf_counter() - start)
    error = _relative(outputs[ways[1]], outputs[ways[0]])
    for way in ways:
        yield {"way": way, "frames": THROUGHPUT_FRAMES, "seconds": seconds[way], "error": error}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def one_object(seed: int) -> Scene:
    return sample_scene(seed, num_things=1)


def recoloured(scene: Scene) -> Scene:
    """The scene with its object in another colour than its own and the background's."""
    (thing,) = scene.things
    colours = ("red", "blue", "yellow", "green")
    new = next(c for c in colours if c not in (thing.colour, scene.background.colour))
    return changed(scene, thing.colour, new)


FIT_WAYS: dict[str, AttentionConfig] = {
    "exact": StemConfig(num_frames=FIT_FRAMES),
    **{f"fit {fit}": StemConfig(num_frames=FIT_FRAMES, fit_frames=fit) for fit in FITS},
    "chunks of 8 alone": StemConfig(num_frames=CHUNK),
    "per frame": PerFrameConfig(),
    "all frames": InflatedConfig(num_frames=FIT_FRAMES),
}


def measure_fit() -> Iterator[dict[str, Any]]:
    """A world video a row: errors by way, and warp errors of an edit inside and across borders."""
    pipeline = stem.load_pipeline("embedded")
    for seed in SEEDS:
        scene = one_object(seed)
        clip = render(scene, FIT_FRAMES, PIXELS)
        latents = encode_frames(pipeline, clip.frames)
        conditioning = encode_prompt(pipeline, clip.caption, PIXELS, PIXELS)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator)
        outputs: dict[str, list[torch.Tensor]] = {way: [] for way in FIT_WAYS}
        layers: dict[str, list[float]] = {}
        for timestep in map(torch.tensor, TIMESTEPS):
            noisy = pipeline.scheduler.add_noise(latents, noise, timestep[None])
            for way, config in FIT_WAYS.items():
                with stem.enabled(pipeline, config):
                    hooks = _layer_probes(pipeline.unet, layers) if way == "exact" else []
                    outputs[way].append(predict(pipeline, noisy, timestep, conditioning))
                    for hook in hooks:
                        hook.remove()
        stacked = {way: torch.stack(found) for way, found in outputs.items()}
        yield {
            "seed": seed,
            "unet": {way: _relative(found, stacked["exact"]) for way, found in stacked.items()},
            "unet_all_frames": {
                way: _relative(found, stacked["all frames"]) for way, found in stacked.items()
            },
            "layers": {way: statistics.fmean(errors) for way, errors in layers.items()},
            "warp": {
                way: _border_warp(pipeline, scene, clip, latents, conditioning, config)
                for way, config in FIT_WAYS.items()
                if way not in ("per frame", "all frames")
            },
        }


def _layer_probes(unet: Any, errors: dict[str, list[float]]) -> list[Any]:
    """Hooks that compare, on the input of every self-attention, other bases' output with exact."""
    hooks = []
    for layer, (name, attention) in enumerate(self_attentions(unet).items()):
        hooks.append(attention.register_forward_hook(partial(_compare_layer, layer, name, errors)))
    return hooks


def _compare_layer(
    layer: int,
    name: str,
    errors: dict[str, list[float]],
    attention: Any,
    inputs: tuple[torch.Tensor, ...],
    exact: torch.Tensor,
) -> None:
    tokens = inputs[0]

    def run(config: StemConfig, frames: int, rows: torch.Tensor, state: StemState) -> torch.Tensor:
        return StemProcessor(name, RowLayout(frames), layer, state)(attention, rows)

    for way, config in FIT_WAYS.items():
        if not isinstance(config, StemConfig) or way == "exact":
            continue
        state = StemState(config, [bases_shape(attention, config)], Hooks())
        if config.fit_frames is None:
            found = run(config, CHUNK, tokens, state)
        else:
            fit = spread_frames(range(FIT_FRAMES), config.fit_frames)
            recording = Recording()
            with state.hooks.added("fitting", recording):
                run(config, len(fit), tokens[fit], state)
            with state.hooks.added("fitted", Replay(recording.found)):
                found = run(config, FIT_FRAMES, tokens, state)
        errors.setdefault(way, []).append(_relative(found, exact))


def _border_warp(
    pipeline: Any,
    scene: Scene,
    clip: Clip,
    latents: torch.Tensor,
    conditioning: Any,
    config: AttentionConfig,
) -> dict[str, float]:
    """Warp errors (x 1000) of a recolouring: pairs of frames across chunk borders, and others."""
    source = guided(pipeline, conditioning)
    with attention_on(pipeline, config):
        noisiest = denoise(latents, inverse_scheduler(pipeline, EDIT_STEPS), source, name="invert")
    target = caption(recoloured(scene))
    prediction = guided(
        pipeline,
        encode_prompt(pipeline, target, PIXELS, PIXELS),
        negative=encode_prompt(pipeline, "", PIXELS, PIXELS),
        guidance=GUIDANCE,
    )
    edited = decode_latents(
        pipeline, sample(pipeline, noisiest, prediction, EDIT_STEPS, config, name="edit")
    )
    errors = pair_warp_errors(edited, clip.flow, clip.occlusion)
    border = [errors[pair] for pair in range(CHUNK - 1, len(errors), CHUNK)]
    inside = [error for pair, error in enumerate(errors) if pair % CHUNK != CHUNK - 1]
    return {"border": statistics.fmean(border), "inside": statistics.fmean(inside)}


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = ["# Videos of any length", ""]
    parts = results["parts"]
    if "memory" in parts:
        rows = parts["memory"]["rows"]
        lines += [
            f"Peak memory of one UNet call above the loaded model, MiB: Stable Diffusion 1.5's "
            f"shape, random weights, float32, {LATENTS}x{LATENTS} latents, chunks of {CHUNK}, "
            f"fit_frames={CHUNK}.",
            "",
            "| way | " + " | ".join(f"N={n}" for n in MEMORY_FRAMES) + " | MiB a frame |",
            "|---" * (len(MEMORY_FRAMES) + 2) + "|",
        ]
        for way in WAYS:
            peaks = [f"{row['bytes'] / 2**20:.0f}" for row in rows if row["way"] == way]
            lines.append(f"| {way} | {' | '.join(peaks)} | {slope(rows, way) / 2**20:.1f} |")
        lines.append("")
    if "throughput" in parts:
        rows = parts["throughput"]["rows"]
        first, second = (statistics.median(row["seconds"]) for row in rows)
        lines += [
            f"One UNet call on {THROUGHPUT_FRAMES} frames, seconds (median of {ROUNDS}, in turns): "
            f"one batch {first:.1f}, lockstep in chunks of {CHUNK} {second:.1f}, ratio "
            f"{second / first:.3f}; results {rows[0]['error']:.1e} apart.",
            "",
        ]
    if "fit" in parts:
        lines += _fit_report(parts["fit"]["rows"])
    if "stream" in parts:
        lines += stream_report(parts["stream"]["rows"])
    return "\n".join(lines)


def _fit_report(rows: list[dict[str, Any]]) -> list[str]:
    def cell(part: str, way: str, scale: float = 100.0, key: str = "") -> str:
        values = [row[part].get(way) for row in rows]
        if values[0] is None:
            return ""
        numbers = [scale * (value[key] if key else value) for value in values]
        return f"{mean_interval(numbers):.2f}"

    lines = [
        f"{FIT_FRAMES}-frame world videos ({len(rows)}), {PIXELS}x{PIXELS} pixels, embedded model, "
        f"mean of timesteps {', '.join(map(str, TIMESTEPS))}, ± 95 %. Errors in %. Warp error "
        "(x 1000, exact flow) of a recolouring by inversion and guided sampling, over pairs of "
        f"frames across the borders of 8-frame chunks and over the others.",
        "",
        "| bases of | self-attentions, off exact | UNet, off exact | UNet, off all-frame | "
        "warp, borders | warp, elsewhere |",
        "|---|---|---|---|---|---|",
    ]
    for way in FIT_WAYS:
        lines.append(
            f"| {way} | {cell('layers', way)} | {cell('unet', way)} | "
            f"{cell('unet_all_frames', way)} | {cell('warp', way, 1.0, 'border')} | "
            f"{cell('warp', way, 1.0, 'inside')} |"
        )
    return [*lines, ""]


def plot(results: dict[str, Any], path: Path) -> None:
    """Peak memory over the frames."""
    import matplotlib.pyplot as plt

    rows = results["parts"]["memory"]["rows"]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for way in WAYS:
        points = [(row["frames"], row["bytes"] / 2**30) for row in rows if row["way"] == way]
        label = f"{way} ({slope(rows, way) / 2**20:.0f} MiB a frame)"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="frames", ylabel="peak GiB above the model", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


MEASURES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "memory": measure_memory,
    "throughput": measure_throughput,
    "fit": measure_fit,
    "stream": measure_stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--ways", help="ways of memory to measure again, separated by semicolons")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"parts": {}}
    if arguments.out.is_file():
        results = json.loads(arguments.out.read_text())
    for part in arguments.only.split(","):
        if part == "memory" and arguments.ways:
            ways = arguments.ways.split(";")
            kept = [row for row in results["parts"][part]["rows"] if row["way"] not in ways]
            rows = kept + list(measure_memory(ways))
        else:
            rows = list(MEASURES[part]())
        results["parts"][part] = {"provenance": provenance("diffusers"), "rows": rows}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))
        if "memory" in results["parts"]:
            plot(results, arguments.out.with_suffix(".png"))
    print(report(results))
