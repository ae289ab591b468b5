"""What FFmpeg's filters give back."""

from __future__ import annotations

from collections.abc import Iterator

import av
from av.filter import Graph


def ready(graph: Graph) -> Iterator[av.VideoFrame]:
    """The frames that a graph of filters has ready."""
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(frame, av.VideoFrame)
        yield frame
