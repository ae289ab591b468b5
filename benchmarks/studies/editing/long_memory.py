"""Memory of `stem edit` over the frames: `python -m benchmarks.studies.editing.long_memory`.

A world video of 64x64 pixels is inverted in chunks; then each method edits it in a process of its
own, whose largest resident set is read, with chunks that wait in memory or in files. Two steps, as
each holds what the others do. Writes benchmarks/results/editing-long-memory.json and .md; points
that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from stem import write_video
from stem.world import render, sample_scene
from stem_kernels.info import provenance

from ... import records

OUT = records.RESULTS / "editing-long-memory.json"
METHODS = ("fusion", "tokenflow", "fatezero")
PARKED = ("never", "disk")
FRAMES = (100, 400, 1600)
CHUNK = 16
STEPS = 2
PIXELS = 64
SEED = 40_000_000
MOST_IN_MEMORY = 400
"""Frames up to which edits whose chunks wait in memory are measured, too."""
PROMPT = "a large blue ball"


_LAUNCH = """
import json, resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, used.ru_maxrss, used.ru_utime + used.ru_stime]))
"""
"""What starts a command: a process's largest resident set begins with that of the process which
started it, and this one has rendered a video."""


def stem(*arguments: str) -> tuple[int, float]:
    """The largest resident set of a command in bytes, and its seconds of CPU.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "stem", *arguments]
    found = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *command], stdout=subprocess.PIPE, check=True
    )
    status, kibibytes, seconds = json.loads(found.stdout)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return kibibytes * 1024, seconds


def measure(frames: int, wanted: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of methods and kinds of parking, one after the other.

    Args:
        frames: Number of frames.
        wanted: Methods and kinds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = render(sample_scene(SEED), frames, PIXELS)
        write_video(folder / "world.mp4", clip.frames, Fraction(8))
        options = (f"--chunk={CHUNK}", f"--steps={STEPS}", f"--out={folder}")
        stem("invert", str(folder / "world.mp4"), *options, "--prompt=a ball", "--park=disk")
        (inversion,) = (folder / "inversions").iterdir()
        for method, parked in wanted:
            own = folder / method / parked
            shutil.copytree(inversion, own / inversion.name)  # without what another edit keeps
            begin = time.time()
            peak, seconds = stem(
                "edit", str(own / inversion.name), f"--prompt={PROMPT}", f"--method={method}",
                f"--out={own}", f"--park={parked}",
            )  # fmt: skip
            yield {
                "frames": frames, "method": method, "park": parked, "bytes": peak,
                "cpu_seconds": round(seconds, 1),
            }  # fmt: skip
            print(
                f"{method}, {frames} frames, {parked}: {peak / 2**20:.0f} MiB, "
                f"{time.time() - begin:.0f} s",
                flush=True,
            )


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where = results["provenance"]
    rows = {(row["method"], row["park"], row["frames"]): row for row in results["rows"]}
    lengths = sorted({row["frames"] for row in results["rows"]})
    commits = dict.fromkeys(row["commit"] for row in results["rows"])
    lines = [
        "# Memory of long edits",
        "",
        f"`stem edit` of a world video of {PIXELS}x{PIXELS} pixels, inverted by stem in chunks of "
        f"{CHUNK}, {STEPS} steps, the embedded model: the process's largest resident set in MiB, "
        "with its libraries and the model; seconds of CPU. "
        f"{where['cpu']}, one thread, torch {where['versions']['torch']}, commit "
        + ", ".join(f"`{commit}`" for commit in commits) + ".",
        "",
        f"| method | chunks wait | {' | '.join(f'N={n}' for n in lengths)} | farthest apart |",
        "|---" * (len(lengths) + 3) + "|",
    ]  # fmt: skip
    for method in METHODS:
        for parked in PARKED:
            found = [rows[method, parked, n] for n in lengths if (method, parked, n) in rows]
            if not found:
                continue
            sizes = [row["bytes"] / 2**20 for row in found]
            cells = [
                f"{size:.0f}, {row['cpu_seconds']:.0f} s"
                for size, row in zip(sizes, found, strict=True)
            ]
            cells += [""] * (len(lengths) - len(cells))
            place = "in files" if parked == "disk" else "in memory"
            apart = f"{max(sizes) - min(sizes):.0f}"
            lines.append(f"| {method} | {place} | {' | '.join(cells)} | {apart} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--frames", default=",".join(map(str, FRAMES)), help="numbers of frames")
    arguments = parser.parse_args()
    where = provenance("diffusers")
    commit = where.pop("commit")
    results: dict[str, Any] = {"provenance": where, "rows": []}
    results = records.taken_up(arguments.out, results, ["rows"])
    measured = {(row["frames"], row["method"], row["park"]) for row in results["rows"]}
    for frames in map(int, arguments.frames.split(",")):
        parked = PARKED if frames <= MOST_IN_MEMORY else ("disk",)
        ways = [(method, kind) for method in METHODS for kind in parked]
        missing = [way for way in ways if (frames, *way) not in measured]
        for row in measure(frames, missing) if missing else ():
            results["rows"].append({**row, "commit": commit})
            records.write(results, arguments.out)
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
