"""`video_attention` at Wan's shape, counted for an H100: `python -m benchmarks.counting.video`.

Records what the whole operator launches, on tensors without data, and writes each kernel's time in
the model (`nested`) and that of its bytes to benchmarks/results/video-counted.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import typer

from stem_kernels.info import provenance
from stem_kernels.video import video_attention

from .. import records
from .counted import ARCH, CEILINGS
from .launch_counts import TorchKernels
from .launches import Launch, recorded
from .nested import model_microseconds
from .video_report import OUT, table

GRID, HEADS, CHANNELS = (21, 30, 52), 12, 128
TOKENS = math.prod(GRID)
FORMS = {"defaults": (2, 64), "window 1, 32 a base": (1, 32)}
"""Windows and tokens a base, by what the table calls them."""
TORCH_US, SORT_KERNELS = 4, 12
"""What one of torch's small kernels is taken to last, and how many a sort is taken for."""


def trips(launch: Launch, per_base: int) -> list[int] | None:
    """Passes through each of its loops; None for what multiplies nothing and is bound by bytes."""
    bases = math.ceil(TOKENS / per_base)
    sizes = launch.arguments

    def over(count: int, block: str) -> int:
        return math.ceil(count / sizes[block])

    if launch.name == "many_mass":
        return [over(bases, "BLOCK_K")]
    if launch.name == "many_sums":
        return [over(sizes["tokens_per_split"], "BLOCK_N")]
    if launch.name == "nearest_narrow":
        return [over(bases, "BLOCK_M")]
    if launch.name == "means":
        return [over(per_base, "BLOCK_N")]
    if launch.name == "products_of_tokens":
        return [over(sizes["tokens_per_split"], "BLOCK_N")]
    if launch.name == "window_attention":
        steps = GRID[0] // sizes["key_frames"] * sizes["parts"]
        return [over(bases, "BLOCK_K"), steps, 1]
    return None


def least_bytes(launch: Launch, per_base: int) -> int:
    """Bytes of memory, every tensor once."""
    count = math.ceil(TOKENS / per_base)
    tokens, bases = (2 * HEADS * rows * CHANNELS for rows in (TOKENS, count))
    sample, numbers = 2 * HEADS * 8 * count * CHANNELS, 4 * HEADS * TOKENS
    if launch.name == "products_of_tokens":
        return tokens * (1 if launch.arguments["p_left"] is launch.arguments["p_right"] else 2)
    return {
        "directions": 4 * bases,
        "many_mass": sample + bases,
        "many_sums": sample + 5 * bases,
        "update": 8 * bases,
        "nearest_narrow": tokens + numbers,
        "means": 2 * tokens + 2 * numbers + 6 * bases,
        "window_attention": 4 * tokens + numbers + 2 * bases,
    }[launch.name]


def recorded_launches(form: str) -> tuple[list[Launch], Mapping[str, int]]:
    """Launches of Triton, and numbers of torch's kernels by name."""
    window, per_base = FORMS[form]
    shape = (1, TOKENS, HEADS, CHANNELS)
    query, key, value = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(3)
    )
    with torch.no_grad(), recorded(ARCH) as launched, TorchKernels() as of_torch:
        bases = math.ceil(TOKENS / per_base)
        video_attention(query, key, value, GRID, num_bases=bases, window=window, backend="triton")
    return launched, of_torch.found


def rows(form: str) -> list[dict[str, Any]]:
    """A row for each kernel, and one for torch's."""
    per_base = FORMS[form][1]
    launched, of_torch = recorded_launches(form)
    found: dict[str, dict[str, Any]] = {}
    for launch in launched:
        row = found.setdefault(
            launch.name,
            {"kernel": launch.name, "launches": 0, "model_us": None, "memory_us": 0.0,
             "counted_us": 0.0},
        )  # fmt: skip
        memory = 1e6 * least_bytes(launch, per_base) / CEILINGS.bytes
        passes, time = trips(launch, per_base), max(memory, TORCH_US)
        if passes is not None:
            model, spilled = model_microseconds(launch, passes)
            assert spilled == 0, f"{launch.name} spills"
            row["model_us"] = round((row["model_us"] or 0.0) + model, 1)
            time = max(memory, model)
        row["launches"] += 1
        row["memory_us"] = round(row["memory_us"] + memory, 1)
        row["counted_us"] = round(row["counted_us"] + time, 1)
    count = sum(of_torch.values())
    sorts = 0 if "sort" in of_torch else 1  # it has two results, and is not counted among them
    time = float(TORCH_US * (count + sorts * SORT_KERNELS))
    torchs = {"kernel": "torch", "launches": count + sorts, "model_us": None, "memory_us": 0.0}
    return [*found.values(), {**torchs, "counted_us": time}]


def main() -> None:
    """Count every launch, and write the file."""
    counted = {form: rows(form) for form in FORMS}
    results = {
        "provenance": provenance(),
        "shape": {
            "frames": GRID[0], "height": GRID[1], "width": GRID[2], "tokens": TOKENS,
            "heads": HEADS, "channels": CHANNELS, "dtype": "bfloat16",
        },
        "floor_us": round(1e6 * 4 * TOKENS**2 * CHANNELS * HEADS / CEILINGS.flops, 1),
        "total_us": {
            form: round(sum(row["counted_us"] for row in of_form), 1)
            for form, of_form in counted.items()
        },
        "torch_us": TORCH_US,
        "sort_kernels": SORT_KERNELS,
        "rows": counted,
    }  # fmt: skip
    records.write(results, OUT)
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
