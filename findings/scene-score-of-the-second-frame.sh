#!/usr/bin/env bash
# One would guess that FFmpeg's scene score tells cuts from steady motion in every frame but the
# first, as it takes the smaller of the change and of how much the change itself has changed.
# Of the second frame the change before it is taken for 0, so that its score is its whole change: a
# steady camera move begins with a "cut" at frame 1, and split tools make a scene of one frame.
# Where: get_scene_score in libavfilter/vf_scdet.c and f_select.c, whose prev_mafd begins with 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    av==18.1.0 numpy==2.4.6
cat >"$work/scores.py" <<'PY'
import sys
from fractions import Fraction

import av
import numpy
from av.filter import Graph

# A pan over a wall of random tiles of 8 pixels, 8 pixels a frame: every frame differs alike from
# the one before.
tiles = numpy.random.default_rng(0).integers(0, 256, (8, 24))
wall = numpy.kron(tiles, numpy.ones((8, 8)))
frames = [wall[:, 8 * number : 8 * number + 64] for number in range(12)]

graph = Graph()
graph.link_nodes(
    graph.add_buffer(
        width=64, height=64, format=av.VideoFormat("gray"), time_base=Fraction(1, 8)
    ),
    graph.add("scdet", "threshold=10"),
    graph.add("buffersink"),
).configure()
found = []
for number, frame in enumerate(frames):
    given = av.VideoFrame.from_ndarray(frame.astype(numpy.uint8), format="gray")
    given.pts, given.time_base = number, Fraction(1, 8)
    graph.push(given)
    told = graph.pull().metadata
    found.append((float(told["lavfi.scd.mafd"]), float(told["lavfi.scd.score"])))
print("av", av.__version__, "libavfilter", ".".join(map(str, av.library_versions["libavfilter"])))
print("frame, change in percent, score:")
for number, (change, score) in enumerate(found):
    print(f"{number:5d} {change:7.2f} {score:7.2f}")
later = [score for _, score in found[2:]]
steady = max(later) < 10 < found[1][1] == found[1][0]
print(
    "as found: the second frame of a steady pan is a cut, the others are none"
    if steady
    else "changed: the second frame of a steady pan scores as the others do"
)
sys.exit(not steady)
PY
"$work/env/bin/python" "$work/scores.py"
