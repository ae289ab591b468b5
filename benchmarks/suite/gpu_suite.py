"""Everything that is to be known of a GPU: `python -m benchmarks.suite --out FOLDER`.

Checks every operator against float64, then measures operators, layers, memory and a whole UNet,
and fills in the targets: results.json (after every contender), rows.csv, report.md, times.png and
memory.png (after every part). What results.json already holds is not measured again, so parts may
run in calls of their own, on one machine after another of the same kind, and a call that was cut
short goes on. `--device cpu --small` tries it all out without a GPU.

The measuring is done by a process of its own, which another follows when a contender's error took
the device from it, when it died, or when it said nothing for SILENCE seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

PARTS = {"correctness": 150.0, "operators": 240.0, "layer": 150.0, "memory": 150.0, "unet": 400.0}
"""Seconds that each part may take; another call does the rest."""
LOST = 75
"""Exit status of a process whose device answers no more."""
SILENCE = 120.0  # by plan the longest, over all of 120 frames, takes half of it
MEASURING = (sys.executable, "-m", "benchmarks.suite.parts")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    parts: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PARTS),
    device: Annotated[str, typer.Option(help="cuda, or cpu with --small.")] = "cuda",
    small: Annotated[bool, typer.Option(help="Toy sizes: a trial, not a measurement.")] = False,
) -> None:
    """Measure this machine's GPU."""
    options = ["--out", str(out), "--parts", parts, "--device", device]
    options += ["--small"] if small else []
    died = ""
    while True:
        status, died = watched([*MEASURING, *options, "--died", died], out / "results.json")
        if not died:
            raise SystemExit(status)
        print(f"the measuring process {died}; another goes on", file=sys.stderr, flush=True)


def watched(command: Sequence[str], results: Path) -> tuple[int, str]:
    """Run a measuring process to its end.

    It is killed when it has not written its results for SILENCE seconds.

    Args:
        command: Command that starts it.
        results: File that it writes before and after every contender.

    Returns:
        Its exit status, and why another shall go on; "" where none shall, as it came to its end or
        failed outside of any contender.
    """
    begin = time.time()

    def silence() -> float:
        written = results.stat().st_mtime if results.is_file() else begin
        return time.time() - max(begin, written)

    with subprocess.Popen(command) as process:
        try:
            while True:
                try:
                    status = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if silence() > SILENCE:
                        process.kill()
                        return process.wait(), f"gave no answer for {SILENCE:.0f} s"
        except BaseException:
            process.kill()
            raise
    if status == LOST:
        return status, "lost the device"
    if status != 0 and silence() < time.time() - begin and _examining(results):
        return status, f"died with status {status}"
    return status, ""


def _examining(results: Path) -> bool:
    """Whether the results end in the middle of a contender."""
    return json.loads(results.read_text())["running"] is not None
