"""Everything that is to be known of a GPU: `python -m benchmarks.gpu_suite --out FOLDER`.

Checks every operator against float64, then measures operators, layers, a whole UNet and memory,
and fills in the targets. Writes results.json, rows.csv, report.md, times.png and memory.png. Parts
run alone with `--only`; their figures take the place of the same parts' in FOLDER. The operators'
parts need no diffusers. `--device cpu --small` tries it all out without a GPU.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from stem_kernels.info import provenance

from . import correctness, operators, targets
from .cases import Bench, Row
from .floors import Ceilings, measure_ceilings

if TYPE_CHECKING:
    from .memory import Peak

PARTS = ("correctness", "operators", "layer", "unet", "memory")


def measure(parts: Sequence[str], device: torch.device, *, small: bool) -> dict[str, Any]:
    """Run parts; what results.json holds."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    budget = 0.02 if small else 0.5
    bench = Bench(device, dtype, measure_ceilings(device, dtype), budget=budget)
    print(f"ceilings: {bench.ceilings}", flush=True)
    peaks: list[Peak] = []
    if "correctness" in parts:
        bench.rows += correctness.check_all(device, small=small)
    if "operators" in parts:
        bench.run("operators", operators.cases(device, dtype, small=small))
    if "layer" in parts:
        from . import layers

        bench.run("layer", layers.layer_cases(device, dtype, small=small))
    if "unet" in parts:
        from . import layers

        bench.run("unet", layers.unet_cases(device, dtype, small=small))
    if "memory" in parts:
        from . import memory

        frames = memory.FRAMES[:2] if small else memory.FRAMES
        peaks = memory.profile(device, dtype, small=small, frames=frames)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "small": small,
        "ceilings": dataclasses.asdict(bench.ceilings),
        "rows": [dataclasses.asdict(row) for row in bench.rows],
        "peaks": [dataclasses.asdict(peak) for peak in peaks],
        "provenance": provenance("diffusers", "flash-kmeans"),
    }


def merged(earlier: dict[str, Any], later: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """`later`, and of `earlier` the parts that were not run again.

    Raises:
        SystemExit: they are of different machines, sizes, versions or commits.
    """
    for name in ("device", "small", "provenance"):
        if earlier[name] != later[name]:
            raise SystemExit(
                f"the figures in --out are of another {name} ({earlier[name]}, now "
                f"{later[name]}); take another folder"
            )
    rows = [row for row in earlier["rows"] if row["part"] not in parts] + later["rows"]
    peaks = later["peaks"] if "memory" in parts else earlier["peaks"]
    return {**later, "rows": rows, "peaks": peaks}


def report(results: dict[str, Any]) -> str:
    """Markdown: the targets, then every row."""
    rows = [Row(**row) for row in results["rows"]]
    ceilings = Ceilings(**results["ceilings"])
    where = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{results['device']}; {versions}; commit `{where['commit']}`; written by "
        "`python -m benchmarks.gpu_suite`.",
        "",
        f"Ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{ceilings.exponentials / 1e12:.3g}e12 exponentials/s, "
        f"{ceilings.bytes / 1e12:.3g} TB/s of a copy, read and written.",
        "",
        "## Targets",
        "",
        targets.table(rows, ceilings.flops, on_gpu=results["device"] != "cpu"),
    ]
    checks = [row for row in rows if row.part == "correctness" and row.error is not None]
    if checks:
        wrong = sum(row.wrong for row in checks)
        lines += [
            "## Correctness",
            "",
            f"{len(checks)} checks against float64, of equal bits in a second call and, on a GPU, "
            f"in a captured graph: {wrong} failed. The largest error is "
            f"{max(row.error or 0 for row in checks):.2f} of the error allowed.",
            "",
        ]
    timed = [row for row in rows if row.part != "correctness"]
    if timed:
        lines += [
            "## Times",
            "",
            "| | contender | ms | p20 ... p80 | x floor | limit | error / allowed | extra MiB | |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_cells(row) for row in timed),
            "",
        ]
    if results["peaks"]:
        from .memory import Peak, table

        lines += ["## Memory", "", table([Peak(**peak) for peak in results["peaks"]])]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    if row.seconds is None or row.p20 is None or row.p80 is None:
        return f"| {row.case} | {row.contender} | not measured | | | | | | {row.note} |"
    floor = f"{row.seconds / row.floor_seconds:.2f}" if row.floor_seconds else ""
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}"
    return (
        f"| {row.case} | {row.contender} | {1e3 * row.seconds:.3f} | {1e3 * row.p20:.3f} ... "
        f"{1e3 * row.p80:.3f} | {floor} | {row.limit} | {row.error:.2f} | {extra} | |"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds of every contender, one plot per case, with the floor."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.seconds is not None]
    names = list(dict.fromkeys(row.case for row in timed))
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        of_case = [row for row in timed if row.case == name]
        times = [1e3 * (row.seconds or 0) for row in of_case]
        axes.barh([row.contender for row in of_case], times)
        if of_case[0].floor_seconds:
            axes.axvline(1e3 * of_case[0].floor_seconds, color="black", linestyle=":")
        axes.invert_yaxis()
        axes.set(title=name, xlabel="ms, logarithmic; dots: floor", xscale="log")
    figure.savefig(path, dpi=90)


def write(results: dict[str, Any], out: Path) -> None:
    """All files of a run."""
    rows = [Row(**row) for row in results["rows"]]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text(report(results))
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(results["rows"])
    draw([row for row in rows if row.part != "correctness"], out / "times.png")
    if results["peaks"]:
        from . import memory

        memory.draw([memory.Peak(**peak) for peak in results["peaks"]], out / "memory.png")


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
    results = measure(parts, torch.device(device), small=small)
    if (out / "results.json").is_file():
        results = merged(json.loads((out / "results.json").read_text()), results, parts)
    write(results, out)
    print(report(results))
    if any(row["wrong"] for row in results["rows"]):
        raise SystemExit("some results are wrong; see above")


if __name__ == "__main__":
    typer.run(main)
