"""Seconds of one step of Stable Diffusion 1.5's UNet, and what self-attention has of it.

`python -m benchmarks.studies.calibration.unet_time`, half an hour on one core. Random weights, 4
frames of 512x512 pixels, one thread, CPU time, contenders in turns. Writes results/unet-time.json
and .md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import stem
from stem import InflatedConfig
from stem.attention.families import self_attentions
from stem_kernels.info import provenance

from ... import records
from ...cases.merging import merging
from ...cases.unets import sd15_unet, step, step_inputs
from .variants import VARIANTS, of_video

OUT = records.RESULTS / "unet-time.json"
FRAMES, SIDE, ROUNDS = 4, 64, 5
MERGED = "per-frame, half of the tokens of 64x64 layers merged"
CONTENDERS = (
    "per-frame", "all-frame", "all tokens", "22 a base, moments",
    "22 a base, joint, 1/2 of the keys", MERGED,
)  # fmt: skip


def mechanism(name: str, unet: Any) -> AbstractContextManager[Any]:
    """A contender, on within the block."""
    if name == "per-frame":
        return nullcontext()
    if name == MERGED:
        return merging(unet, SIDE**2)
    config = InflatedConfig() if name == "all-frame" else VARIANTS[name]
    return stem.enabled(unet, of_video(config, FRAMES))


@contextmanager
def attention_timed(unet: Any, taken: list[float]) -> Iterator[None]:
    """Adds the CPU seconds of all self-attentions to `taken[0]`."""
    begun: list[float] = []

    def before(*_: Any) -> None:
        begun.append(time.process_time())

    def after(*_: Any) -> None:
        taken[0] += time.process_time() - begun.pop()

    hooks = []
    for layer in self_attentions(unet).values():
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    """Median seconds of a step and of its self-attentions, by contender."""
    unet = sd15_unet()
    inputs = step_inputs(unet, FRAMES, SIDE)
    steps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    attentions: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(ROUNDS):
        for name in CONTENDERS:
            attention = [0.0]
            with mechanism(name, unet), attention_timed(unet, attention):
                begin = time.process_time()
                step(inputs)
                steps[name].append(time.process_time() - begin)
            attentions[name].append(attention[0])
            print(turn, name, f"{steps[name][-1]:.1f} {attention[0]:.1f}", flush=True)
    return {
        name: {
            "step": round(statistics.median(steps[name]), 2),
            "attention": round(statistics.median(attentions[name]), 2),
        }
        for name in CONTENDERS
    }


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    where, rows = results["provenance"], results["seconds"]
    lines = [
        f"One step of a UNet of Stable Diffusion 1.5's shape, {FRAMES} frames of {8 * SIDE}x"
        f"{8 * SIDE} pixels, random weights, float32; {where['cpu']}, one thread, torch "
        f"{where['versions']['torch']}, commit `{where['commit']}`; medians of {ROUNDS} steps in "
        "turns, CPU seconds.",
        "",
        "|  | step | self-attentions | their share | of per-frame's step |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        share = row["attention"] / row["step"]
        of_per_frame = row["step"] / rows["per-frame"]["step"]
        lines.append(
            f"| {name} | {row['step']:.1f} | {row['attention']:.1f} | {100 * share:.0f} % "
            f"| {of_per_frame:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    results = {"provenance": provenance("diffusers"), "seconds": measure()}
    records.write(results, OUT)
    OUT.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
