"""`torchrun --nproc-per-node=2 examples/long_video.py`: a video's chunks over two processes.

Their bases are those of the whole video; one process, or more, give the same bits.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import stem
from stem.world import render, sample_scene

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--frames", type=int, default=32)
parser.add_argument("--chunk", type=int, default=8)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", type=Path, default=Path("out/long-video"))
arguments = parser.parse_args()

group, main, device = None, True, None
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo")
    group, main = dist.group.WORLD, dist.get_rank() == 0

scene, path = render(sample_scene(1), arguments.frames, 64), arguments.out / "long.mp4"
if main:
    stem.write_video(path, scene.frames, fps=8)
if group is not None:
    dist.barrier()

video = stem.open_video(path)  # decoded a few frames at a time, never as a whole
pipeline = stem.load_pipeline("embedded", device=device)
inversion = stem.invert(
    pipeline,
    video,
    scene.caption,
    arguments.out / "inversions",
    num_steps=arguments.steps,
    chunk=arguments.chunk,
    group=group,
    progress=main,
)
frames = stem.reconstruct(pipeline, inversion, group=group, progress=main)
if main:
    stem.write_video(arguments.out / "reconstruction.mp4", frames, video.fps)
    print(f"{inversion.path}, by {1 if group is None else group.size()} processes")
if group is not None:
    dist.destroy_process_group()
