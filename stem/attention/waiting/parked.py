"""Where tensors of chunks that wait are kept: in memory-mapped files, or off the device.

A chunk that waits for the others holds the residual streams and skip connections of its frames.
`Parking` finds them among the local names of its suspended calls and puts their storage elsewhere.
The tensors stay the same objects with the same values, so that nothing else has to know.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import inspect
import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from greenlet import greenlet

from ...names import PARKING
from .memory import free_bytes

logger = logging.getLogger("stem")

LEAST_BYTES = 64 * 1024
"""Storages below this stay where they are, as a file costs more than they do."""
SHARE = 0.25
"""Share of a device's free memory that "auto" lets chunks hold while they wait."""
FRAMES_AT_ONCE = 64
"""Frames that `Parking.by_frames` has in hand."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt
_DONT_NEED = 4  # MADV_DONTNEED takes a mapping's pages from the process; its file keeps them.

_Held = dict[int, list[torch.Tensor]]
"""Tensors by the address of their storage."""


class Parking:
    """What takes the storage of tensors that wait.

    Tensors of a CPU go to memory-mapped files, from which the system reads what is used. Those of
    another device go to its host's memory or to files, and come back before their chunk goes on.

    Args:
        kind: Name in `stem.names.PARKING`. "auto": tensors are put away as soon as those that wait
            would take more than a quarter of the device's free memory; to the host's memory if they
            take a quarter of it at most, else to files. "cpu": to the host's memory, unless they
            are there. "disk": to files. "never": they stay.
        folder: Folder of the files, on a disk; None: the system's for temporary files. They have no
            names, so that nothing is left of them, however the process ends.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(self, kind: str = "auto", folder: Path | None = None) -> None:
        if kind not in PARKING:
            raise ValueError(f"park is {kind!r}; it must be one of {', '.join(PARKING)}")
        self.kind = kind
        self.folder = folder
        self._place = "never"
        self._away: dict[greenlet, list[tuple[torch.device, list[torch.Tensor]]]] = {}
        self._kept: list[weakref.ref[torch.Tensor]] = []

    def begin(self) -> None:
        """Before chunks take turns."""
        self._place = "never" if self.kind == "auto" else self.kind

    def foresee(self, chunk: greenlet, chunks: int) -> None:
        """Decide for "auto" by what one of so many chunks holds as it begins to wait."""
        if self.kind != "auto" or self._place != "never" or torch.is_grad_enabled():
            return
        storages = [tensors[0].untyped_storage() for tensors in _held_by(chunk, ()).values()]
        if storages:
            size = sum(storage.nbytes() for storage in storages) * chunks
            self._place = _place_of(size, storages[0].device)
        if self._place != "never":
            logger.info("%.1f GiB would wait on the device: park is %r", size / 2**30, self._place)

    def park(self, chunk: greenlet, read: Iterable[torch.Tensor]) -> None:
        """Put away what a chunk holds that has begun to wait.

        Args:
            chunk: Chunk.
            read: Tensors that others read while it waits; those of another device than the CPU
                stay.

        Raises:
            OSError: there is no room for the files.
        """
        self.leave()
        if self._place == "never" or torch.is_grad_enabled():
            return
        away = []
        staying = [tensor for tensor in read if tensor.device.type != "cpu"]
        for tensors in _held_by(chunk, staying).values():
            storage, device = tensors[0].untyped_storage(), tensors[0].device
            if storage.filename is None:
                if device.type != "cpu":
                    away.append((device, tensors))
                elif self._place != "disk":
                    continue
                _move(tensors, self._elsewhere(storage.nbytes(), device, self._place))
            _leave_to_file(tensors[0].untyped_storage())
        if away:
            self._away[chunk] = away

    def kept(self, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What a chunk returned; copies in files where it is of a CPU and chunks wait in files.

        Raises:
            OSError: there is no room for the files.
        """
        if self._place != "disk" or torch.is_grad_enabled():
            return results
        return tuple(
            self._empty_elsewhere(each, each.shape, "disk").copy_(each)
            if each.device.type == "cpu" and each.nbytes >= LEAST_BYTES
            else each
            for each in results
        )

    def bring(self, chunk: greenlet) -> None:
        """Bring back to its device what a chunk holds that goes on."""
        for device, tensors in self._away.pop(chunk, ()):
            size = tensors[0].untyped_storage().nbytes()
            _move(tensors, torch.UntypedStorage(size, device=device))

    def forget(self, chunk: greenlet) -> None:
        """Give up what was put away of a chunk that will not go on."""
        self._away.pop(chunk, None)

    def empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A tensor to be filled chunk by chunk, on the device or where it waits.

        Args:
            like: Tensor of its dtype and device.
            shape: Shape.

        Returns:
            Uninitialised, on the device of `like` or on the CPU.
        """
        size = like.element_size() * torch.Size(shape).numel()
        place = self.kind if self.kind != "auto" else _place_of(size, like.device)
        if place == "never" or (place == "cpu" and like.device.type == "cpu"):
            return like.new_empty(shape)
        return self._empty_elsewhere(like, torch.Size(shape), place)

    def joined(
        self, tensors: Sequence[torch.Tensor], dim: int = 0, *, waited: bool = False
    ) -> torch.Tensor:
        """`torch.cat`; what it makes on a CPU lies where that of `empty` does.

        Args:
            tensors: Tensors of one dtype, equal in size but for `dim`.
            dim: Dimension along which they are joined.
            waited: Whether they are of chunks that wait, whose memory is given up again where they
                have files.
        """
        like, parts = tensors[0], list(tensors)
        if self._stays(like, sum(part.numel() for part in parts) * like.element_size()):
            return torch.cat(parts, dim)
        counts = [part.shape[dim] for part in parts]
        shape = list(like.shape)
        shape[dim] = sum(counts)
        found = self.empty(like, shape)
        for place, part in zip(found.split(counts, dim), parts, strict=True):
            place.copy_(part)
            if waited:
                _leave_to_file(part.untyped_storage())
            self.leave()
        return found

    def by_frames(self, made: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """What a function makes of tensors with a row for each frame, of some frames at a time.

        Args:
            made: Function of as many tensors [n, ...], of which it returns one [n, ...] that holds
                of a frame what that frame's rows say alone.
            tensors: Tensors [N, ...].

        Returns:
            Tensor [N, ...]; of a CPU, and of many frames, it lies where that of `empty` does.
        """
        if len(tensors[0]) <= FRAMES_AT_ONCE:
            return made(*tensors)
        found: torch.Tensor | None = None
        begin = 0
        for parts in self.parts(FRAMES_AT_ONCE, *tensors):
            part = made(*parts)
            if found is None:
                shape = (len(tensors[0]), *part.shape[1:])
                stays = self._stays(part, part.nbytes // len(part) * len(tensors[0]))
                found = part.new_empty(shape) if stays else self.empty(part, shape)
            found[begin : begin + len(part)] = part
            begin += len(part)
        assert found is not None
        return found

    def parts(self, frames: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Parts of tensors [N, ...] of some frames each; after each part memory is given up as
        `leave` does."""
        for parts in zip(*(tensor.split(frames) for tensor in tensors), strict=True):
            yield parts
            self.leave()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, or its copy in a file where `empty` would make one for it.

        Raises:
            OSError: there is no room for the file.
        """
        return tensor if self._stays(tensor, tensor.nbytes) else self.joined([tensor])

    def _stays(self, like: torch.Tensor, size: int) -> bool:
        """Whether a tensor of so many bytes stays where `like` is, as all but a CPU's do."""
        if like.device.type != "cpu" or size < LEAST_BYTES or torch.is_grad_enabled():
            return True
        place = self.kind if self.kind != "auto" else _place_of(size, like.device)
        return place != "disk"

    def leave(self) -> None:
        """Give up the memory of what `empty` made in files; they keep the content."""
        kept = [(reference, reference()) for reference in self._kept]
        self._kept = [reference for reference, tensor in kept if tensor is not None]
        for _, tensor in kept:
            if tensor is not None:
                _leave_to_file(tensor.untyped_storage())

    def _empty_elsewhere(self, like: torch.Tensor, shape: torch.Size, place: str) -> torch.Tensor:
        storage = self._elsewhere(shape.numel() * like.element_size(), like.device, place)
        found = torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
        self._kept.append(weakref.ref(found))
        return found

    def _elsewhere(self, size: int, device: torch.device, place: str) -> torch.UntypedStorage:
        if place == "cpu":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).untyped_storage()
        _return_what_is_freed()
        handle, name = tempfile.mkstemp(prefix=".stem-parked-", dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, size)
            found = torch.UntypedStorage.from_file(name, True, size)
            assert isinstance(found, torch.UntypedStorage)
            return found
        except OSError as error:
            raise OSError(
                error.errno,
                f"{Path(name).parent} has no room for {size / 2**20:.1f} MiB that wait "
                f"({error.strerror}); free some, name another folder, or take park='never'",
            ) from error
        finally:
            os.close(handle)
            os.unlink(name)


def _place_of(size: int, device: torch.device) -> str:
    """Where "auto" keeps so many bytes of a device's."""
    if size <= SHARE * free_bytes(device):
        return "never"
    host = torch.device("cpu")
    return "cpu" if device != host and size <= SHARE * free_bytes(host) else "disk"


_current: contextvars.ContextVar[Parking | None] = contextvars.ContextVar("parking", default=None)


def current_parking() -> Parking:
    """The parking that is on; where none is, "auto"."""
    found = _current.get()
    if found is None:
        found = Parking()
        _current.set(found)
    return found


@contextlib.contextmanager
def parking(kind: str, folder: Path | None = None) -> Iterator[None]:
    """Say where chunks of a video wait, for the length of a `with` block.

    Results have the same bits wherever they wait.

    Args:
        kind: Name in `stem.names.PARKING`, see `Parking`.
        folder: Folder on a disk for files, see `Parking`.

    Raises:
        ValueError: the kind is unknown.
    """
    token = _current.set(Parking(kind, folder))
    try:
        yield
    finally:
        _current.reset(token)


def _held_by(chunk: greenlet, staying: Iterable[torch.Tensor]) -> _Held:
    """Large tensors among the local names of a chunk's suspended calls.

    Those that its first call was given are the caller's; those that stay are left out.
    """
    frames = []
    frame = chunk.gr_frame
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    found: _Held = {}
    *calls, first = frames
    for call in calls:
        names = call.f_locals
        _collect(tuple(names.values()), found)
        # Up to Python 3.12 it is a copy, and keeps what it holds alive as long as the call.
        if type(names) is dict and call.f_code.co_flags & inspect.CO_OPTIMIZED:
            names.clear()
    given: _Held = {}
    _collect((first.f_locals, tuple(staying)), given)
    return {address: tensors for address, tensors in found.items() if address not in given}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value: it alone, or in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def _collect(value: Any, found: _Held) -> None:
    for held in tensors_in(value):
        if type(held) is not torch.Tensor or held.layout is not torch.strided:
            continue
        storage = held.untyped_storage()
        if storage.nbytes() < LEAST_BYTES:
            continue
        tensors = found.setdefault(storage.data_ptr(), [])
        # A view keeps what it was made of, and with it the storage.
        for tensor in (held, held._base):
            if tensor is not None and all(tensor is not other for other in tensors):
                tensors.append(tensor)


def _move(tensors: list[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Let tensors that share a storage have another one with the same content."""
    storage.copy_(tensors[0].untyped_storage())
    for tensor in tensors:
        with torch.inference_mode(tensor.is_inference()):
            moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            moved.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            tensor.data = moved


@functools.cache
def _return_what_is_freed() -> None:
    """Keep glibc from raising the size from which it gives freed memory back to the system, 128 KiB
    at first, as it does with each larger block that is freed: what chunks hold and free in turns
    would leave it full of holes."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 128 * 1024)


def _leave_to_file(storage: torch.UntypedStorage) -> None:
    """Give up the memory of a storage that has a file."""
    if storage.filename is not None and os.name == "posix":
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _DONT_NEED
        )
