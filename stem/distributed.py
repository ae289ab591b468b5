"""The processes that share a run, under torchrun or any other launcher of torch.distributed."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

MESSAGE_BYTES = 64 * 2**20
"""Bytes that a rank sends at once, so that messages take as much memory however long a video is."""
_ALONE_BYTES = 2**16
"""Bytes of a tensor that goes by itself, not with the object that it is in."""
_SHARED = (ArithmeticError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def fitting(size: int, count: int) -> int:
    """How many of `count` things of so many bytes go into one message, at least 1."""
    return max(1, min(count, MESSAGE_BYTES // max(1, size)))


class Ranks:
    """The ranks of a process group; one alone where there is no group.

    Args:
        group: Process group, or None.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    @property
    def main(self) -> bool:
        """Whether this process is the one that reads, shows progress and writes."""
        return self.number == 0

    @property
    def size(self) -> int:
        """The number N of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def number(self) -> int:
        """The number of this rank, 0 ... N - 1."""
        return 0 if self.group is None else self.group.rank()

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on the main rank, on every rank. What it raises there is raised
        everywhere, so that none waits for a rank that has gone."""
        if self.group is None:
            return make()
        # What was made but for its large tensors, what they are like, or what was raised.
        told: list[Any] = [None, [], None]
        tensors: list[torch.Tensor] = []
        value: Any = None
        if self.main:
            try:
                value = make()
                told[0], tensors = _without_tensors(value)
                told[1] = [(tensor.shape, tensor.dtype) for tensor in tensors]
            except _SHARED as error:
                told[2] = error
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        pickled, forms, raised = told
        if raised is not None:
            self._raise(raised)
        if not self.main:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in forms]
        for tensor in tensors:
            self._send(tensor)
        return value if self.main else _Joining(pickled, tensors).load()

    def _send(self, tensor: torch.Tensor) -> None:
        """Send the main rank's tensor of a CPU into that of every other, in messages."""
        assert self.group is not None
        on_cpu = dist.get_backend(self.group) != "nccl"
        source = dist.get_global_rank(self.group, 0)
        flat = tensor.reshape(-1).view(torch.uint8)
        for part in flat.split(MESSAGE_BYTES):
            message = part if on_cpu else part.to("cuda")
            dist.broadcast(message, source, group=self.group)
            if not on_cpu and not self.main:
                part.copy_(message)

    def fill(self, whole: torch.Tensor, own: Iterable[int]) -> None:
        """Fill in, in place, the rows of a tensor that other ranks have.

        Args:
            whole: Tensor [N, ...] of one shape on every rank.
            own: Numbers of the rows that this rank has.
        """
        if self.group is None:
            return
        rows: list[Any] = [None] * self.group.size()
        dist.all_gather_object(rows, sorted(own), group=self.group)
        most = max(map(len, rows))
        at_once = fitting(whole.nbytes // max(1, len(whole)), most)
        on_cpu = dist.get_backend(self.group) != "nccl"
        device = whole.device if on_cpu else torch.device("cuda")
        sent = whole.new_zeros((at_once, *whole.shape[1:]), device=device)
        received = [torch.empty_like(sent) for _ in rows]
        for first in range(0, most, at_once):
            parts = [numbers[first : first + at_once] for numbers in rows]
            mine = parts[self.number]
            sent[: len(mine)] = whole[mine].to(device)
            dist.all_gather(received, sent, group=self.group)
            for numbers, found in zip(parts, received, strict=True):
                whole[numbers] = found[: len(numbers)].to(whole.device)

    def from_each(self, make: Callable[[], Value]) -> list[Value]:
        """What `make` returns on every rank, in their order; tensors of a CPU among it. What it
        raises on one of them is raised everywhere."""
        if self.group is None:
            return [make()]
        outcome: tuple[Any, Any] = (None, None)
        try:
            outcome = make(), None
        except _SHARED as error:
            outcome = None, error
        outcomes: list[Any] = [None] * self.group.size()
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, raised in outcomes:
            if raised is not None:
                self._raise(raised)
        return [value for value, _ in outcomes]

    def share(self, count: int, multiple: int = 1) -> range:
        """This rank's of so many things in a row, which begin with a multiple of a number."""
        parts = -(-count // multiple)
        edges = (multiple * (rank * parts // self.size) for rank in (self.number, self.number + 1))
        return range(*(min(edge, count) for edge in edges))

    def check_equal(self, what: str, value: object) -> None:
        """Raise on every rank where the ranks do not hold the same.

        Raises:
            ValueError: naming `what`.
        """
        if self.group is None:
            return
        values: list[object] = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        if any(other != values[0] for other in values):
            self._raise(
                ValueError(
                    f"the processes do not have the same {what}; give all of them the same "
                    "arguments and files"
                )
            )

    def _raise(self, error: Exception) -> NoReturn:
        """Raise what every rank raises, after they have told each other of it."""
        # A process that ends at once aborts at times (torch 2.13): a thread of Gloo's lets go of
        # what was told, for which it needs Python. It has when this is done.
        dist.barrier(self.group)
        raise error


class _Parting(pickle.Pickler):
    """Pickles an object and keeps its large tensors out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.requires_grad:
            return None
        if value.layout is not torch.strided or value.nbytes < _ALONE_BYTES:
            return None
        known = (place for place, tensor in enumerate(self.tensors) if tensor is value)
        place = next(known, len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)
        return place


class _Joining(pickle.Unpickler):
    """Makes an object again that `_Parting` has pickled."""

    def __init__(self, pickled: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._tensors = tensors

    def persistent_load(self, place: int) -> torch.Tensor:
        return self._tensors[place]


def _without_tensors(value: object) -> tuple[bytes, list[torch.Tensor]]:
    file = io.BytesIO()
    parting = _Parting(file)
    parting.dump(value)
    return file.getvalue(), parting.tensors
