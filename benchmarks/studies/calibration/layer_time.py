"""Seconds of what calibrated bases are made of, and of whole layers: one thread of a CPU.

`python -m benchmarks.studies.calibration.layer_time`, some minutes. Contenders are called in turns,
so that what else the machine does falls on all of them alike. Writes results/calibration-time.json
and .md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels import basis_attention
from stem_kernels.info import provenance
from stem_kernels.ops.calibration import calibrate_bases
from stem_kernels.ops.partial_attention import (
    PartialAttention,
    merged_attention,
    partial_attention,
)

from ... import records
from ...cases.layers import processor_call
from .variants import VARIANTS, of_video

OUT = records.RESULTS / "calibration-time.json"
FRAMES, SIDE, BASES = 8, 64, 256
TOKENS = FRAMES * SIDE**2
LAYERS = ((8, 64, 80, 2), (4, 64, 320, 8), (32, 64, 320, 8), (8, 32, 640, 8))
"""Frames, tokens a side, channels and heads: the embedded model's widest layers and Stable
Diffusion 1.5's."""
PROJECTED = ((80, 2), (320, 8))
WIDTHS = (8, 40)
HEADS = 8
QUERIES = (128, 256)
AT_ONCE = 1024
ROUNDS, FEW_ROUNDS = 7, 3
TIMED = (
    "per-frame", "all tokens", "all tokens, moments", "22 a base", "8 a base, moments",
    "22 a base, moments", "22 a base, moments, R=1", "22 a base, joint",
    "22 a base, joint, 1/2 of the keys", "22 a base, joint, 1/4 of the keys",
)  # fmt: skip
"""The study's variants that are timed."""
ALL_FRAME_QUERIES = 2048
"""Queries that attention over all frames is timed with, as it takes as long for each."""

Calls = Mapping[str, Callable[[], object]]


def in_turns(calls: Calls, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of CPU time of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if turn > 0:
                taken[name].append(time.process_time() - begin)
    return {name: float(f"{1000 * statistics.median(row):.4g}") for name, row in taken.items()}


def heads_of(rows: int, heads: int, width: int, seed: int) -> torch.Tensor:
    """Standard normal [1, h, rows, width], interleaved by heads as projections are."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(1, rows, heads * width, generator=generator)
    return numbers.unflatten(-1, (heads, width)).transpose(1, 2)


def operators() -> dict[str, dict[str, float]]:
    """Milliseconds of the operators, by case and contender."""
    found = {}
    for width in WIDTHS:
        query, key, value = (heads_of(TOKENS, HEADS, width, seed) for seed in range(3))
        bases = [heads_of(BASES, HEADS, width, seed) for seed in (3, 4)]
        for count in QUERIES:
            few = heads_of(count, HEADS, width, 5)
            found[f"partial_attention, h={HEADS}, d={width}, m={count}"] = in_turns(
                {
                    backend: partial(partial_attention, few, key, value, backend=backend)
                    for backend in ("torch", "cuda")
                }
            )
            attended = partial_attention(few, key, value).output
            found[f"calibrate_bases, h={HEADS}, d={width}, m={count}"] = in_turns(
                {
                    form: partial(calibrate_bases, few, attended, *bases, form=form)
                    for form in ("linear", "joint")
                }
            )
        fitted: dict[str, Any] = {
            "correction": heads_of(width + 1, HEADS, width, 6),
            "query_mean": query.mean(-2),
        }
        forms: list[tuple[str, dict[str, Any]]] = [("", {}), (" corrected", fitted)]
        found[f"basis_attention, h={HEADS}, d={width}"] = in_turns(
            {
                f"{backend}{said}": partial(
                    basis_attention, query, *bases, **options, backend=backend
                )
                for backend in ("torch", "cuda")
                for said, options in forms
            }
        )
    return found


def projections(channels: int, heads: int) -> dict[str, float]:
    """Milliseconds of ways to what a calibration needs of every token, by way."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, channels, generator=generator)
    weights = torch.randn(3, channels, channels, generator=generator) / channels**0.5
    joined = weights.flatten(0, 1)
    few = heads_of(QUERIES[0], heads, channels // heads, 1)

    def attended(part: torch.Tensor) -> PartialAttention:
        key, value = (
            (part @ weight.mT).unflatten(-1, (heads, channels // heads)).transpose(0, 1)[None]
            for weight in weights[1:]
        )
        return partial_attention(few, key, value)

    return in_turns(
        {
            "q, k, v": lambda: [tokens @ weight.mT for weight in weights],
            "q, k, v in one product": lambda: tokens @ joined.mT,
            f"k, v, m={QUERIES[0]}": lambda: attended(tokens),
            f"k, v, m={QUERIES[0]} by {AT_ONCE} tokens": lambda: merged_attention(
                [attended(part) for part in tokens.split(AT_ONCE)]
            ),
        }
    )


def layer(frames: int, side: int, channels: int, heads: int) -> dict[str, float]:
    """Milliseconds of a self-attention with its projections, by variant."""
    torch.manual_seed(0)
    module = Attention(channels, heads=heads, dim_head=channels // heads, bias=False).eval()
    coarse = torch.randn(1, channels, 2, 8, 8)
    video = torch.nn.functional.interpolate(coarse, size=(frames, side, side), mode="trilinear")
    tokens = video[0].flatten(2).permute(1, 2, 0).contiguous()
    tokens += 0.1 * torch.randn_like(tokens)
    timestep = torch.tensor(400)
    found = in_turns(
        {
            name: processor_call(of_video(VARIANTS[name], frames), module, tokens, timestep)
            for name in TIMED
        },
        ROUNDS if frames * side**2 <= TOKENS else FEW_ROUNDS,
    )
    every = frames * side**2
    query, key, value = (heads_of(every, heads, channels // heads, seed) for seed in range(3))
    few = query[:, :, :ALL_FRAME_QUERIES]
    taken = in_turns({"all-frame": partial(scaled_dot_product_attention, few, key, value)}, 3)
    attention = taken["all-frame"] * every / few.shape[2]
    weights = torch.randn(4 * channels, channels) / channels**0.5
    projecting = in_turns({"four": lambda: tokens.flatten(0, 1) @ weights.mT}, 3)["four"]
    return {**found, "all-frame": float(f"{attention + projecting:.4g}")}


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    where = results["provenance"]
    layers = results["layers"]
    lines = [
        f"{where['cpu']}, one thread, torch {where['versions']['torch']}, commit "
        f"`{where['commit']}`; medians of {ROUNDS} calls in turns, CPU time, float32. "
        f"{TOKENS:,} tokens, {BASES} bases; `cuda` is the C++ extension.",
        "",
        "| operator | milliseconds |",
        "|---|---|",
        *(
            f"| {case} | {', '.join(f'{name} {taken:.3g}' for name, taken in row.items())} |"
            for case, row in results["operators"].items()
        ),
        "",
        f"| a layer, milliseconds (of all tokens, of per-frame) | {' | '.join(layers)} |",
        "|---" * (1 + len(layers)) + "|",
    ]
    for name in (*TIMED, "all-frame"):
        cells = []
        for row in layers.values():
            before, per_frame = row["all tokens"] / row[name], row["per-frame"] / row[name]
            cells.append(f"{row[name]:.0f} ({1 / before:.2f}, 1/{per_frame:.2g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"all-frame: SDPA of {ALL_FRAME_QUERIES:,} of the queries to all tokens, by the number of "
        "queries, and four projections.",
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    results = {
        "provenance": provenance("diffusers"),
        "operators": {
            **operators(),
            **{
                f"projections, C={channels}, h={heads}": projections(channels, heads)
                for channels, heads in PROJECTED
            },
        },
        "layers": {
            f"{frames} frames of {side}x{side}, C={channels}, h={heads}": layer(
                frames, side, channels, heads
            )
            for frames, side, channels, heads in LAYERS
        },
    }
    records.write(results, OUT)
    OUT.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
