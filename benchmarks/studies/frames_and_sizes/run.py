"""`python -m benchmarks.studies.frames_and_sizes`: a UNet step by frames and size.

Stable Diffusion 1.5's shape, random weights, float32, one thread: CPU seconds and peak memory above
the loaded model of one step without guidance, every point in a process of its own; and the step's
FLOPs, counted. Some 20 minutes on one core. Writes results/frames-and-sizes.json, of which
`python -m benchmarks.readme` makes a table of README; points that the file holds are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import stem
from stem.attention import plain
from stem.attention.families import self_attentions
from stem.config import AttentionConfig, InflatedConfig, StemConfig
from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory
from stem_kernels.ops.soft_em import EARLY_STRIDE

from ... import records
from ...cases.processes import measured_apart
from ...cases.unets import StepInputs, sd15_unet, step
from ...counting.counted import CEILINGS

OUT = records.RESULTS / "frames-and-sizes.json"
CHUNK = 8
POINTS = ((32, 256, 256), (8, 512, 288), (8, 512, 512), (16, 512, 512))
"""Frames, width and height in pixels."""
BOTH = POINTS[:3]
"""Points at which all-frame attention is measured, too."""
WAYS = ("stem", "all-frame")
WEIGHTS = 2 * 859_520_964
"""Bytes of the UNet's weights in float16."""


def config_of(way: str, frames: int) -> AttentionConfig:
    """The attention of a way."""
    if way == "stem":
        return StemConfig(num_frames=frames, chunk=min(CHUNK, frames))
    return InflatedConfig(num_frames=frames, chunk=min(CHUNK, frames))


def inputs(unet: UNet2DConditionModel, frames: int, width: int, height: int) -> StepInputs:
    """Latents [N, 4, height / 8, width / 8] and text states [N, 77, 768] for a UNet."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(frames, 4, height // 8, width // 8, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator).expand(frames, -1, -1)
    return StepInputs(unet, latents.to(unet.device), text.to(unet.device))


@torch.no_grad()
def measure_point(way: str, frames: int, width: int, height: int) -> dict[str, Any]:
    """CPU seconds of a step and its peak bytes above the loaded model.

    Raises:
        OSError: this system does not tell a process's peak.
    """
    torch.set_num_threads(1)
    unet = sd15_unet()
    with stem.enabled(unet, config_of(way, 1)):
        step(inputs(unet, 1, 64, 64))  # one-time set-up
    given = inputs(unet, frames, width, height)
    with stem.enabled(unet, config_of(way, frames)), PeakMemory() as memory:
        begin = time.process_time()
        step(given)
        seconds = time.process_time() - begin
    if memory.extra_bytes is None:
        raise OSError("this system does not tell the peak of a process's resident set")
    return {"seconds": round(seconds, 1), "bytes": memory.extra_bytes}


@torch.no_grad()
def flops_of(way: str, frames: int, width: int, height: int) -> float:
    """FLOPs of a step's products: a per-frame step's, with other self-attentions.

    Of STEM: EM on its sample, of which iterations before the last read every `EARLY_STRIDE`-th
    token, and the attention to the bases.
    """
    config = StemConfig()
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    own, other = 0, 0.0

    def seen(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal own, other
        _, tokens, channels = args[0].shape
        own += 4 * frames * tokens**2 * channels
        if way == "all-frame":
            other += 4 * (frames * tokens) ** 2 * channels
            return
        bases = min(config.num_bases, frames * tokens)
        sample = min(bases * (config.sample_per_base or frames * tokens), frames * tokens)
        reads = sample * (1 + (config.num_iters - 1) / EARLY_STRIDE)
        other += 4 * bases * channels * (frames * tokens + reads)

    for layer in self_attentions(unet).values():
        layer.register_forward_pre_hook(seen)
    with plain(unet), FlopCounterMode(display=False) as counter:
        step(inputs(unet, frames, width, height))
    return counter.get_total_flops() - own + other


def table(results: dict[str, Any]) -> str:
    """The table of README."""
    where = results["provenance"]
    found = {(row["way"], *row["point"]): row for row in results["rows"]}
    lines = [
        "| A UNet step, STEM (all-frame) | CPU, s | CPU, MiB beside the model | H100, ms at least "
        "| H100, GiB |",
        "|---|---|---|---|---|",
    ]
    for point in POINTS:
        rows = [found[way, *point] for way in WAYS if (way, *point) in found]
        frames, width, height = point
        cells = [
            _both([f"{row['seconds']:.0f}" for row in rows]),
            _both([f"{row['bytes'] / 2**20:.0f}" for row in rows]),
            _both([f"{1000 * row['flops'] / CEILINGS.flops:.0f}" for row in rows]),
            f"{(WEIGHTS + rows[0]['bytes'] / 2) / 2**30:.1f}",
        ]
        lines.append(f"| N={frames}, {width}x{height} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Stable Diffusion 1.5's shape, float32, one thread, {CHUNK} frames a chunk. H100: FLOPs "
        "at 798 TFLOP/s, half of the bytes and the weights; counted, not measured.",
        "",
        f"Source: [benchmarks/results/{OUT.name}](benchmarks/results/{OUT.name}) ({where['cpu']}, "
        f"torch {where['versions']['torch']}, commit `{results['rows'][0]['commit']}`).",
    ]
    return "\n".join(lines) + "\n"


def _both(cells: list[str]) -> str:
    return cells[0] if len(cells) == 1 else f"{cells[0]} ({cells[1]})"


def run() -> dict[str, Any]:
    """Measure the points that the file does not hold yet; it is written after each."""
    where = provenance("diffusers")
    commit = where.pop("commit")
    results = records.taken_up(OUT, {"chunk": CHUNK, "provenance": where, "rows": []}, ["rows"])
    measured = {(row["way"], *row["point"]) for row in results["rows"]}
    for way in WAYS:
        for point in POINTS if way == "stem" else BOTH:
            if (way, *point) in measured:
                continue
            found = measured_apart(__spec__.name, way, *map(str, point))
            flops = flops_of(way, *point)
            results["rows"].append(
                {"way": way, "point": point, **found, "flops": flops, "commit": commit}
            )
            records.write(results, OUT)
            print(way, point, found, f"{flops / 1e12:.1f} TFLOP", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=4, metavar=("WAY", "FRAMES", "WIDTH", "HEIGHT"))
    given = parser.parse_args().point
    if given:
        print(json.dumps(measure_point(given[0], *map(int, given[1:]))))
        return
    print(table(run()))


if __name__ == "__main__":
    main()
