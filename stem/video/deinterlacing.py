"""Frames of two fields made into pictures of one moment, by FFmpeg's filter bwdif."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby

import av
from av.filter import Graph

from .filtering import ready

DEINTERLACED = "the frames were deinterlaced (bwdif): of each the first field, its gaps filled in"


def deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """A frame for each frame, with the lines of the later field interpolated in space and time.

    Args:
        frames: Frames in their order; each is held until the next one is there.
    """
    # A graph takes frames of one kind: its filter reads past the end of smaller ones.
    for _, alike in groupby(frames, lambda each: (each.width, each.height, each.format.name)):
        first = next(alike)
        graph = Graph()
        graph.link_nodes(
            graph.add_buffer(
                width=first.width,
                height=first.height,
                format=first.format,
                time_base=first.time_base,
            ),
            graph.add("bwdif", "mode=send_frame:deint=all"),
            graph.add("buffersink"),
        ).configure()
        for frame in chain([first], alike, [None]):
            graph.push(frame)
            yield from ready(graph)
