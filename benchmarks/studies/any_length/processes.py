"""Time of an edit by several processes: `python -m benchmarks.studies.any_length.processes`.

A world video is inverted once, and edited by fusion in chunks: by one process whose chunks wait in
memory, where `auto` puts them, or in files, and by two that share the chunks over gloo; one thread
each, in turns. So is a step of an inversion at Stable Diffusion 1.5's shape with random weights.
Two processes that each do the whole work by themselves, at once, show what the machine allows.
Time is that of the edit or step alone, on the first process, without loading. Writes
benchmarks/results/any-length-processes.json and .md. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import stem
from stem import InversionFolder, StemConfig, Video, invert, parking
from stem.diffusion.loop import denoise, guided
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import inverse_scheduler
from stem.editing import run_edit
from stem.inversion.methods import attention_on
from stem.world import caption, render
from stem_kernels.info import provenance

from ... import records
from ...cases.unets import sd15_unet
from ..editing.memory import pipeline_of_sd_shape
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
    "two at once, each its own": (2, "never"),
}
"""Numbers of processes, and where chunks wait, by what the table calls it."""
STEPS_OF: dict[str, tuple[int, str]] = {
    "a step of an inversion, one process": (1, "never"),
    "a step of an inversion, two processes": (2, "never"),
    "two steps at once, each its own": (2, "never"),
}
"""The same at Stable Diffusion 1.5's shape."""
ALL_WAYS = {**WAYS, **STEPS_OF}
APART = ("two at once, each its own", "two steps at once, each its own")
"""Ways whose processes share nothing; each does all the work."""
STEP_PIXELS = 256
STEP_ROUNDS = 2


def work_of(way: str, folder: Path) -> Callable[[Any], object]:
    """What is timed, as a function of a process group, its model loaded."""
    if way not in STEPS_OF:
        pipeline = stem.load_pipeline("embedded")
        (path,) = folder.glob("*/settings.json")
        inversion = InversionFolder.open(path.parent)
        target = caption(recoloured(one_object(SEED)))
        return lambda group: run_edit(
            pipeline, inversion, target, group=group, resume=False, progress=False
        )
    pipeline = pipeline_of_sd_shape(sd15_unet(64))
    scheduler = inverse_scheduler(pipeline, 1)
    conditioning = encode_prompt(pipeline, "a ball", STEP_PIXELS, STEP_PIXELS)
    shape = (FRAMES, 4, STEP_PIXELS // 8, STEP_PIXELS // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    config = StemConfig(num_frames=FRAMES, chunk=CHUNK)

    def step(group: Any) -> None:
        with attention_on(pipeline, config, group):
            denoise(latents, scheduler, guided(pipeline, conditioning), name="invert")

    return step


def timed(rank: int, world: int, way: str, folder: str, found: Queue[float]) -> None:
    """What a process does; the first one puts the seconds of its work."""
    torch.set_num_threads(1)
    group = None
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        group = dist.group.WORLD
    work = work_of(way, Path(folder))
    with parking(ALL_WAYS[way][1], Path(folder)):
        if world > 1:
            dist.barrier()
        begin = time.perf_counter()
        work(None if way in APART else group)
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
    world, _ = ALL_WAYS[way]
    context = multiprocessing.get_context("spawn")
    found: Queue[float] = context.Queue()
    (folder / "store").unlink(missing_ok=True)
    processes = [
        context.Process(target=timed, args=(rank, world, way, str(folder), found))
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
    lines = [
        "# Processes and parking",
        "",
        f"`fusion` recolours {FRAMES} frames of {PIXELS}x{PIXELS} pixels in chunks of {CHUNK}, "
        f"{STEPS} steps, the embedded model: seconds of the edit, without loading; median of "
        f"{ROUNDS} in turns (least to most). Then a step of {FRAMES} frames of "
        f"{STEP_PIXELS}x{STEP_PIXELS} pixels through a UNet of Stable Diffusion 1.5's shape, "
        f"random weights, in chunks of {CHUNK}, {STEP_ROUNDS} in turns. One thread a process. Two "
        "that each do their own work do twice one's work: as much as the machine allows. "
        f"{where['cpu']}, torch {where['versions']['torch']}, commit `{where['commit']}`.",
        "",
        "| | seconds | times one process |",
        "|---|---|---|",
    ]
    for way in ALL_WAYS:
        first = next(iter(STEPS_OF if way in STEPS_OF else WAYS))
        alone, median = (statistics.median(rows[name]) for name in (first, way))
        spread = f"{min(rows[way]):.1f}-{max(rows[way]):.1f}"
        times = alone / median * (ALL_WAYS[way][0] if way in APART else 1)
        lines.append(f"| {way} | {median:.1f} ({spread}) | {times:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure in turns, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "provenance": provenance("diffusers"),
        "seconds": {way: [] for way in ALL_WAYS},
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
        for way in (*WAYS,) * ROUNDS + (*STEPS_OF,) * STEP_ROUNDS:
            results["seconds"][way].append(round(seconds_of(way, folder), 2))
            print(way, results["seconds"][way][-1], flush=True)
            records.write(results, arguments.out)
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
