"""Everything that is to be known of a GPU: `python -m benchmarks.gpu_suite --out FOLDER`.

Checks every operator against float64, then measures operators, layers, a whole UNet and memory,
and fills in the targets. Writes results.json, rows.csv, report.md, times.png and memory.png, and
again after every part. Parts run alone with `--only`; their figures take the place of the same
parts' in FOLDER. The operators' parts need stem_kernels alone. `--device cpu --small` tries it all
out without a GPU.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import correctness, operators, records, suite_report
from .bench import FAILED, WRONG, Bench, Row, timed
from .floors import Ceilings
from .timing import time_call

PARTS = ("correctness", "operators", "layer", "unet", "memory")


def measure(part: str, device: torch.device, ceilings: Ceilings, *, small: bool) -> list[Row]:
    """The rows of a part; diffusers is imported for those that need it."""
    bench, dtype = Bench(), suite_dtype(device)
    clock = timed(
        device, ceilings, partial(time_call, device=device, budget=0.02 if small else 0.5)
    )
    if part == "correctness":
        check = correctness.repeatable(device)
        return bench.run(part, correctness.cases(device, small=small), check)
    if part == "operators":
        return bench.run(part, operators.cases(device, dtype, small=small), clock)
    if part == "layer":
        from .layers import layer_cases

        return bench.run(part, layer_cases(device, dtype, small=small), clock)
    if part == "unet":
        from .unets import unet_cases

        return bench.run(part, unet_cases(device, dtype, small=small), clock)
    from . import memory

    return bench.run(part, memory.cases(device, dtype, small=small), memory.peak(device))


def suite_dtype(device: torch.device) -> torch.dtype:
    """What all but the checks is measured in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    only: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PARTS)}.")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu with --small.")] = "cuda",
    small: Annotated[bool, typer.Option(help="Toy sizes: a trial, not a measurement.")] = False,
) -> None:
    """Measure this machine's GPU."""
    parts = [part.strip() for part in only.split(",")] if only else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA GPU; --device cpu --small tries the suite out")
    if device == "cpu" and not small:
        raise typer.BadParameter("on a CPU the suite runs with --small only")
    out.mkdir(parents=True, exist_ok=True)
    place, path = torch.device(device), out / "results.json"
    results = records.begun(path, place, suite_dtype(place), small=small)
    for part in parts:
        rows = measure(part, place, Ceilings(**results["ceilings"]), small=small)
        others = [row for row in results["rows"] if row["part"] != part]
        merged = others + [dataclasses.asdict(row) for row in rows]
        results["rows"] = sorted(merged, key=lambda row: PARTS.index(row["part"]))
        suite_report.write(results, out)
    print(suite_report.report(results))
    bad = [row for row in results["rows"] if row["outcome"] in (WRONG, FAILED)]
    if bad:
        names = ", ".join(f"{row['contender']} in {row['case']}" for row in bad)
        raise SystemExit(f"{len(bad)} rows are wrong or failed: {names}")


if __name__ == "__main__":
    typer.run(main)
