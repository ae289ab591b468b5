"""`python examples/edit.py`: invert a video, edit it by a prompt, compare with the exact answer."""

import argparse
from fractions import Fraction
from pathlib import Path

import stem
from stem.metrics import psnr
from stem.world import world_edit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--method", default="fusion", help="fusion, fatezero, tokenflow, pnp, sdedit")
parser.add_argument("--frames", type=int, default=8)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("out/example-edit"))
arguments = parser.parse_args()

# A scene drawn on the spot, whose exact answer to the edit is known; stem.read_video reads files.
wanted = world_edit(40_500_000, "colour", arguments.frames)
video = stem.Video(wanted.source.frames, Fraction(8), name="scene")
print(f"{wanted.source.caption!r} -> {wanted.exact.caption!r}")

pipeline = stem.load_pipeline("embedded")
inversion = stem.invert(
    pipeline,
    video,
    wanted.source.caption,
    arguments.out / "inversions",
    num_steps=arguments.steps,
)
edited = stem.edit(pipeline, inversion, wanted.exact.caption, method=arguments.method)

stem.write_video(arguments.out / "edit.mp4", edited, video.fps)
print(f"{psnr(edited, wanted.exact.frames):.1f} dB to the exact answer")
print(f"{psnr(video.frames, wanted.exact.frames):.1f} dB is the unedited video's")
print(arguments.out / "edit.mp4")
