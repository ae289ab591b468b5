"""The GPU suite's parts, in this process; `benchmarks.suite` starts and watches it.

Only the parts layer, memory and unet import diffusers; none reads or writes videos.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..cases import operators
from ..cases.bench import FAILED, SKIPPED, WRONG, Bench, Examination, Row, Survived, blank, timed
from ..cases.case import AnyCase
from ..cases.floors import Ceilings
from ..cases.timing import time_call
from . import compiling, correctness
from . import report as suite_report
from .file import SuiteFile
from .gpu_suite import LOST, PARTS


def plan(
    part: str, device: torch.device, ceilings: Ceilings, *, small: bool
) -> tuple[Iterable[AnyCase], Examination]:
    """The cases of a part, and what is measured of each."""
    dtype = suite_dtype(device)
    clock = partial(time_call, device=device, budget=0.02 if small else 0.3)
    if part == "correctness":
        return correctness.cases(device, small=small), correctness.repeatable(device)
    if part == "operators":
        return operators.cases(device, dtype, small=small), timed(device, ceilings, clock)
    if part == "layer":
        from ..cases.layers import layer_cases

        return layer_cases(device, dtype, small=small), timed(device, ceilings, clock)
    if part == "unet":
        from ..cases.unets import unet_cases

        return unet_cases(device, dtype, small=small), timed(device, ceilings, clock)
    from ..cases import memory

    return memory.cases(device, dtype, small=small), memory.peak(device)


def suite_dtype(device: torch.device) -> torch.dtype:
    """What all but the checks is measured in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def measure(file: SuiteFile, part: str, device: torch.device, *, small: bool) -> None:
    """Examine what the file does not hold yet of a part, as far as its time goes.

    Raises:
        SystemExit: with status LOST, where an error took the device from this process.
    """
    bench, ceilings = Bench(), Ceilings(**file.results["ceilings"])
    if device.type == "cuda":
        compiling.compile_ahead(part, device, small=small, said=file.write)
    begin = time.monotonic() - file.begin_part(part)
    with Survived(part) as survived:
        cases, examine = plan(part, device, ceilings, small=small)
        for case in cases:
            for name in case.contenders:
                row = blank(part, case, name)
                if file.holds(row):
                    continue
                spent = time.monotonic() - begin
                if spent >= PARTS[part]:
                    note = f"time: the part's {PARTS[part]:.0f} s were over"
                    file.add(replace(row, outcome=SKIPPED, note=note), spent)
                    continue
                file.begin(row)
                found = bench.examine(part, case, name, examine)
                file.add(found, time.monotonic() - begin)
                if found.outcome == FAILED and not answers(device):
                    raise SystemExit(LOST)
    if survived.outcome:
        everything = Row(part, "", "", "every contender left", "", "")
        found = replace(everything, outcome=survived.outcome, note=survived.note)
        file.add(found, time.monotonic() - begin)


def answers(device: torch.device) -> bool:
    """Whether this process can go on with the device: an illegal access ends a CUDA context."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def run(
    out: Path, parts: Iterable[str], device: torch.device, *, small: bool, died: str = ""
) -> None:
    """Measure parts, and write the folder's files again after each.

    Args:
        out: Folder of the results.
        parts: Names of parts.
        device: Device that is measured.
        small: Whether the sizes are toys.
        died: Reason why a process before this one ended, see `SuiteFile.begin_call`.

    Raises:
        SystemExit: rows are wrong or failed; the file belongs to something else; the device is
            lost (status LOST).
    """
    if died and not answers(device):
        raise SystemExit(f"{device} does not answer any more")
    parts = list(parts)
    file = SuiteFile(out / "results.json", device, suite_dtype(device), small=small)
    file.begin_call(parts, died)
    for part in parts:
        measure(file, part, device, small=small)
        file.results["rows"].sort(key=lambda row: list(PARTS).index(row["part"]))
        suite_report.write(file.results, out)
    print(suite_report.report(file.results))
    bad = [row for row in file.results["rows"] if row["outcome"] in (WRONG, FAILED)]
    if bad:
        names = ", ".join(f"{row['contender']} in {row['case'] or row['part']}" for row in bad)
        raise SystemExit(f"{len(bad)} rows are wrong or failed: {names}")


def main(
    out: Annotated[Path, typer.Option()],
    parts: Annotated[str, typer.Option()],
    device: Annotated[str, typer.Option()],
    small: Annotated[bool, typer.Option()] = False,
    died: Annotated[str, typer.Option()] = "",
) -> None:
    """Measure parts in this process; the options are those of benchmarks.suite."""
    chosen = [part.strip() for part in parts.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA GPU; --device cpu --small tries the suite out")
    if device == "cpu" and not small:
        raise typer.BadParameter("on a CPU the suite runs with --small only")
    out.mkdir(parents=True, exist_ok=True)
    run(out, chosen, torch.device(device), small=small, died=died)


if __name__ == "__main__":
    typer.run(main)
