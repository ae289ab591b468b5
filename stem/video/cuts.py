"""Where a video cuts to another scene, by the scores of FFmpeg's filter select."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import av
from av.filter import Graph

from .filtering import ready

if TYPE_CHECKING:
    from .frames import Video
    from .reading import VideoFile

LEAST_SCENE = 8
"""Frames that a scene has at least: bases of fewer gain nothing, and a flash is no scene."""
THRESHOLD = 0.1
"""Score, 0 ... 1, from which a change is a cut: the default of FFmpeg's filter scdet."""
_PART = 16  # frames in memory at once


def find_cuts(video: Video | VideoFile) -> tuple[int, ...]:
    """The frames at which another scene begins.

    A frame's score is the smaller of two numbers: the mean absolute difference of its pixels from
    the frame before, as a share of their range, and how much this differs from the frame before's
    own, so that steady motion scores nothing. A cut is where the score is at least THRESHOLD and
    both scenes have LEAST_SCENE frames. A slow dissolve is not found.

    Args:
        video: Video; a few of its frames are in memory at once.

    Returns:
        Numbers of frames, ascending.

    Source: FFmpeg's documentation of the filters select and scdet.
    """
    found: list[int] = []
    for number in _changes(video) if video.num_frames >= 2 * LEAST_SCENE else ():
        before = found[-1] if found else 0
        if number - before >= LEAST_SCENE and video.num_frames - number >= LEAST_SCENE:
            found.append(number)
    return tuple(found)


def _changes(video: Video | VideoFile) -> Iterator[int]:
    """The numbers of the frames whose score is at least THRESHOLD."""
    graph = Graph()
    time_base = Fraction(1, 1)
    graph.link_nodes(
        graph.add_buffer(
            width=video.width,
            height=video.height,
            format=av.VideoFormat("rgb24"),
            time_base=time_base,
        ),
        graph.add("select", f"gte(scene\\,{THRESHOLD})"),
        graph.add("buffersink"),
    ).configure()
    number = 0
    for part in video.parts(_PART):
        for pixels in part:
            frame = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = number, time_base
            number += 1
            graph.push(frame)
            yield from _numbers(graph)
    graph.push(None)
    yield from _numbers(graph)


def _numbers(graph: Graph) -> Iterator[int]:
    for frame in ready(graph):
        assert frame.pts is not None
        yield frame.pts
