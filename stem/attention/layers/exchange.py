"""Where the chunks of a video meet in a layer that needs the whole of it.

A chunk is a run of frames that goes through the UNet by itself. `Lockstep` runs every chunk up to
its next meeting, brings together what they carry, and lets each of them go on: one chunk computes
at a time, and only what waits (residual streams, skip connections) is held for all. With a process
group the chunks are spread over its ranks, and what they carry is gathered from all of them.

Everything is merged in the order of the chunks, so bits depend on the size of a chunk and not on
how many devices hold them.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from greenlet import GreenletExit, getcurrent, greenlet

from ...distributed import fitting
from ..waiting.parked import current_parking, tensors_in
from .settings import Settings

Merged = TypeVar("Merged")
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Meeting:
    """What one chunk brings to a meeting.

    Args:
        tensors: Tensors of this chunk.
        merge: Function of the tensors of all chunks, in their order.
        counts: Sizes of the tensors along `dim`, a chunk each; None: all have one shape.
        dim: Dimension along which sizes differ.
    """

    tensors: Tensors
    merge: Callable[[list[Tensors]], Any]
    counts: Sequence[int] | None
    dim: int


class Lockstep:
    """Chunks of one video that run in turns and meet.

    Args:
        frames: Numbers of the video's frames that go through the UNet, ascending.
        chunk: Number of frames in a chunk, at least 1; the last may have fewer.
        group: Process group whose ranks share the chunks; None: this process runs all.

    Raises:
        ValueError: there are fewer chunks than ranks.
    """

    def __init__(
        self, frames: Sequence[int], chunk: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.num_frames = len(frames)
        starts = range(0, len(frames), chunk)
        self.chunks = [list(frames[start : start + chunk]) for start in starts]
        self._group = group
        ranks = 1 if group is None else group.size()
        if len(frames) < ranks:
            raise ValueError(
                f"{ranks} processes cannot share {len(frames)} frames, of which each takes one at "
                f"least; start {len(frames)} processes at most"
            )
        if len(self.chunks) < ranks:
            raise ValueError(
                f"{len(frames)} frames in chunks of {chunk} are {len(self.chunks)} chunks, fewer "
                f"than the {ranks} processes; take chunks of at most {len(frames) // ranks} frames"
            )
        edges = [rank * len(self.chunks) // ranks for rank in range(ranks + 1)]
        self._of_rank = [range(start, end) for start, end in pairwise(edges)]
        self._own = self._of_rank[0 if group is None else group.rank()]
        self._running = 0
        self._outside = Settings.now()
        self._shared: list[weakref.ref[torch.Tensor]] = []

    @property
    def running(self) -> list[int]:
        """The numbers of the frames of the chunk that computes now."""
        return self.chunks[self._running]

    @property
    def number(self) -> int:
        """The number of the running chunk."""
        return self._running

    @property
    def position(self) -> int:
        """The position of the running chunk's first frame among all frames of this run."""
        return sum(map(len, self.chunks[: self._running]))

    def run(self, call: Callable[[list[int]], Tensors], dim: int = 0) -> Tensors:
        """Run every chunk, and join the results.

        Autocast, grad mode and the other `Settings` that a chunk puts on are its own: they are put
        on and off where chunks take turns.

        Args:
            call: Function of the numbers of a chunk's frames; inside it `meet` may be called, by
                every chunk equally often.
            dim: Dimension of the results along which frames lie.

        Returns:
            The results of all chunks, joined along `dim`, on every rank.

        Raises:
            RuntimeError: some chunks meet and others have ended.
            Exception: what a chunk raised; the others are ended first.
        """
        waiting: dict[int, Any] = {index: self.chunks[index] for index in self._own}
        greenlets = {index: greenlet(call) for index in self._own}
        for running in greenlets.values():
            running.gr_context = contextvars.copy_context()
        self._outside = Settings.now()
        parking = current_parking()
        parking.begin()
        alone = len(greenlets) == 1
        results: list[Tensors] = []
        try:
            while waiting:
                meetings: list[_Meeting] = []
                for index, given in waiting.items():
                    self._running = index
                    parking.bring(greenlets[index])
                    answer = greenlets[index].switch(given)
                    self._outside.set()
                    if isinstance(answer, _Meeting):
                        meetings.append(answer)
                        if not alone:
                            if index == self._own[0]:
                                parking.foresee(greenlets[index], len(greenlets))
                            parking.park(greenlets[index], self._staying(answer))
                    else:
                        results.append(answer if alone else parking.kept(answer))
                        parking.leave()  # chunks that never meet have read files, too
                if not meetings:
                    break
                if results:
                    raise RuntimeError("some chunks of a video wait for others that have ended")
                merged = meetings[0].merge(
                    self._collect(
                        [meeting.tensors for meeting in meetings],
                        meetings[0].counts,
                        meetings[0].dim,
                    )
                )
                del meetings, answer
                waiting = dict.fromkeys(waiting, self.share(merged))
        finally:
            for running in greenlets.values():
                if not running.dead:
                    running.throw(GreenletExit)
                parking.forget(running)
            self._outside.set()
        counts = [len(frames) for frames in self.chunks]
        gathered = self._collect(results, counts, dim)
        return tuple(parking.joined(column, dim) for column in zip(*gathered, strict=True))

    def meet(
        self,
        tensors: Tensors,
        merge: Callable[[list[Tensors]], Merged],
        *,
        counts: Sequence[int] | None = None,
        dim: int = 0,
    ) -> Merged:
        """Wait until every chunk has come here, and take what `merge` makes of all they bring.

        Args:
            tensors: Tensors of the running chunk.
            merge: Function of the tensors of all chunks, in the order of the chunks. It is called
                once on every rank, and its result is every chunk's: it must not be changed.
            counts: Sizes of the tensors along `dim`, a chunk each; None: all have one shape.
            dim: Dimension along which sizes differ.
        """
        with self._outside.on():
            found: Merged = getcurrent().parent.switch(_Meeting(tensors, merge, counts, dim))
        return found

    def share(self, value: Merged) -> Merged:
        """Have the tensors of a value stay where they are while chunks wait, as chunks that run
        read them, too.

        Args:
            value: Tensors, alone or in tuples, lists and dicts; returned as it is.
        """
        alive = [each for each in self._shared if each() is not None]
        self._shared = [*alive, *map(weakref.ref, tensors_in(value))]
        return value

    def _staying(self, meeting: _Meeting) -> Iterator[torch.Tensor]:
        """What is read while the chunk waits that has come to a meeting."""
        yield from meeting.tensors
        # One chunk's function is called for all, before that chunk goes on.
        for cell in getattr(meeting.merge, "__closure__", None) or ():
            yield from tensors_in(cell.cell_contents)
        yield from (tensor for each in self._shared if (tensor := each()) is not None)

    def _collect(self, own: list[Tensors], counts: Sequence[int] | None, dim: int) -> list[Tensors]:
        """The tensors of the chunks of all ranks, of those of this one, some chunks a message."""
        if self._group is None:
            return own
        sizes = [None] * len(self.chunks) if counts is None else counts
        most = max(map(len, self._of_rank))
        at_once = fitting(max(_Layout(own[0], dim, [size]).num_bytes for size in sizes), most)
        found: dict[int, Tensors] = {}
        for first in range(0, most, at_once):
            some = self._collect_some(own, sizes, dim, slice(first, first + at_once))
            if at_once < most:  # what comes in several messages waits where chunks do
                parking = current_parking()
                some = {chunk: parking.kept(tensors) for chunk, tensors in some.items()}
            found.update(some)
        return [found[chunk] for chunk in sorted(found)]

    def _collect_some(
        self, own: list[Tensors], sizes: Sequence[int | None], dim: int, some: slice
    ) -> dict[int, Tensors]:
        """The tensors of some of each rank's chunks by their numbers, in one message a rank."""
        assert self._group is not None
        chosen = [chunks[some] for chunks in self._of_rank]
        layouts = [_Layout(own[0], dim, [sizes[chunk] for chunk in chunks]) for chunks in chosen]
        longest = max(layout.num_bytes for layout in layouts)
        sent = own[0][0].new_zeros(longest, dtype=torch.uint8)
        for places, tensors in zip(
            layouts[self._group.rank()].places(sent), own[some], strict=True
        ):
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
        received = [torch.empty_like(sent) for _ in layouts]
        dist.all_gather(received, sent, group=self._group)
        return {
            chunk: tensors
            for chunks, layout, message in zip(chosen, layouts, received, strict=True)
            for chunk, tensors in zip(chunks, layout.places(message), strict=True)
        }


class _Layout:
    """Where the tensors of some chunks lie in one message, which is bytes.

    Args:
        like: Tensors of the dtypes and, but for the sizes, of the shapes of each chunk's.
        dim: Dimension along which sizes differ.
        sizes: Sizes along it, a chunk each; None: that of `like`.

    Attributes:
        num_bytes: Length of the message.
    """

    def __init__(self, like: Tensors, dim: int, sizes: Sequence[int | None]) -> None:
        self.num_bytes = 0
        self._chunks: list[list[tuple[int, torch.Size, torch.dtype]]] = []
        for size in sizes:
            self._chunks.append([])
            for tensor in like:
                shape = list(tensor.shape)
                if size is not None:
                    shape[dim] = size
                found = torch.Size(shape)
                self._chunks[-1].append((self.num_bytes, found, tensor.dtype))
                end = self.num_bytes + found.numel() * tensor.element_size()
                self.num_bytes = -(-end // 16) * 16  # where a tensor of any dtype may begin

    def places(self, message: torch.Tensor) -> list[Tensors]:
        """The tensors of each chunk, as views of a message of at least `num_bytes`."""
        return [
            tuple(
                message[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for begin, shape, dtype in chunk
            )
            for chunk in self._chunks
        ]


def in_order(statistics: list[Tensors]) -> Tensors:
    """Sums over chunks, added in the order of the chunks."""
    totals = list(statistics[0])
    for tensors in statistics[1:]:
        totals = [total + tensor for total, tensor in zip(totals, tensors, strict=True)]
    return tuple(totals)
