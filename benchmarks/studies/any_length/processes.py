"""Time of an edit by several processes: `python -m benchmarks.studies.any_length.processes`.

A world video is inverted once, and edited by fusion in chunks: by one process whose chunks wait in
memory, where `auto` puts them, or in files, and by two that share the chunks over gloo; one thread
each, in turns. Time is that of the edit alone, on the first process, without loading. Writes
benchmarks/results/any-length-processes.json and .md. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from fractions import Fraction
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import stem
from stem import InversionFolder, Video, invert, parking
from stem.editing import run_edit
from stem.world import caption, render
from stem_kernels.info import provenance

from ... import records
from .run import CHUNK, PIXELS, one_object, recoloured

OUT = records.RESULTS / "any-length-processes.json"
SEED = 41_200_000
FRAMES = 64
STEPS = 10
ROUNDS = 3
WAYS: dict[str, tuple[int, str]] = {
    "one process": (1, "never"),
    "one process, parking where needed": (1, "auto"),
    "one process, chunks wait in files": (1, "disk"),
    "two processes": (2, "never"),
}
"""Numbers of processes, and where chunks wait, by what the table calls it."""


def edit(rank: int, world: int, park: str, folder: str, found: Queue[float]) -> None:
    """What a process does; the first one puts the seconds of the edit."""
    torch.set_num_threads(1)
    group = None
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        group = dist.group.WORLD
    pipeline = stem.load_pipeline("embedded")
    (path,) = Path(folder).glob("*/settings.json")
    inversion = InversionFolder.open(path.parent)
    target = caption(recoloured(one_object(SEED)))
    with parking(park, Path(folder)):
        if world > 1:
            dist.barrier()
        begin = time.perf_counter()
        run_edit(pipeline, inversion, target, group=group, resume=False, progress=False)
        if world > 1:
            dist.barrier()
        seconds = time.perf_counter() - begin
    if rank == 0:
        found.put(seconds)
    if world > 1:
        dist.destroy_process_group()


def seconds_of(way: str, folder: Path) -> float:
    """The seconds of one edit.

    Raises:
        RuntimeError: a process failed.
    """
    world, park = WAYS[way]
    context = multiprocessing.get_context("spawn")
    found: Queue[float] = context.Queue()
    (folder / "store").unlink(missing_ok=True)
    processes = [
        context.Process(target=edit, args=(rank, world, park, str(folder), found))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{way}: exit statuses {[each.exitcode for each in processes]}")
    return found.get()


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where, rows = results["provenance"], results["seconds"]
    alone = statistics.median(rows["one process"])
    lines = [
        "# Processes and parking",
        "",
        f"`fusion` recolours {FRAMES} frames of {PIXELS}x{PIXELS} pixels in chunks of {CHUNK}, "
        f"{STEPS} steps, the embedded model: seconds of the edit, without loading; median of "
        f"{ROUNDS} in turns (least to most). One thread a process. {where['cpu']}, torch "
        f"{where['versions']['torch']}, commit `{where['commit']}`.",
        "",
        "| | seconds | times one process |",
        "|---|---|---|",
    ]
    for way in WAYS:
        median = statistics.median(rows[way])
        spread = f"{min(rows[way]):.1f}-{max(rows[way]):.1f}"
        lines.append(f"| {way} | {median:.1f} ({spread}) | {alone / median:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure in turns, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "provenance": provenance("diffusers"),
        "seconds": {way: [] for way in WAYS},
    }
    clip = render(one_object(SEED), FRAMES, PIXELS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        invert(
            stem.load_pipeline("embedded"),
            Video(clip.frames, Fraction(8)),
            clip.caption,
            folder,
            num_steps=STEPS,
            chunk=CHUNK,
            progress=False,
        )
        for _ in range(ROUNDS):
            for way in WAYS:
                results["seconds"][way].append(round(seconds_of(way, folder), 2))
                print(way, results["seconds"][way][-1], flush=True)
                records.write(results, arguments.out)
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
