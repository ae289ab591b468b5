#!/usr/bin/env bash
# One would guess that a bare H.264 stream has the rate that its parameter sets state, or none.
# PyAV's stream.average_rate, which is FFmpeg's, says 25 whatever the stream states; the rate stands
# in codec_context.framerate. A tool that reads the first plays a film of 60 frames a second at 25.
# Where: FFmpeg's raw video demuxer (libavformat/rawdec.c, its option framerate).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
cd "$work"
env/bin/python - <<'PY'
import importlib.metadata

import av
import numpy as np

print("av", importlib.metadata.version("av"))
for rate in (24, 50, 60):
    with av.open("film.h264", "w", format="h264") as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in range(12):
            picture = np.full((64, 64, 3), 20 * level, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    with av.open("film.h264") as film:
        stream = film.streams.video[0]
        next(film.decode(stream))
        print(f"written at {rate}: average_rate {stream.average_rate}, "
              f"codec_context.framerate {stream.codec_context.framerate}")
        assert stream.average_rate == 25
        assert stream.codec_context.framerate == rate
PY
echo "as found: 25, whatever the stream states"
