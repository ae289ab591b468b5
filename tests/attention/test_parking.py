"""Chunks that wait in files or off the device: the same bits, and the memory that they give up."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import ONE_LEVEL, call, make_unet

import stem
from stem import InflatedConfig, StemConfig
from stem.attention.layers import frames
from stem.attention.layers.exchange import Lockstep
from stem.attention.waiting import parked as module
from stem.attention.waiting.parked import Parking, current_parking, parking

CHUNKS = StemConfig(num_bases=4, sample_per_base=4, num_frames=4, chunk=1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tensors are worth a file."""
    monkeypatch.setattr(module, "LEAST_BYTES", 1)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each storage that was put away or brought back."""
    found: list[int] = []
    move = module._move

    def counted(tensors: list[torch.Tensor], storage: torch.UntypedStorage) -> None:
        found.append(storage.nbytes())
        move(tensors, storage)

    monkeypatch.setattr(module, "_move", counted)
    return found


def waiting(hold: Callable[[], Any]) -> Iterator[tuple[Any, ...]]:
    """What two chunks hold while both wait, and after it."""
    exchange = Lockstep([0, 1], 1)
    seen: list[tuple[Any, ...]] = []

    def run(frames: list[int]) -> tuple[torch.Tensor]:
        return inner()

    def inner() -> tuple[torch.Tensor]:
        held = hold()
        exchange.meet((torch.ones(1),), lambda parts: seen.append(held))
        seen.append(held)
        return (torch.ones(1, 1),)

    exchange.run(run)
    yield from seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("inference", [False, True])
def test_chunks_in_files_have_the_same_bits(
    tmp_path: Path, moved: list[int], inference: bool
) -> None:
    unet = make_unet(**ONE_LEVEL)
    with stem.enabled(unet, CHUNKS), torch.inference_mode(inference), torch.no_grad():
        with parking("never"):
            expected = call(unet)
        assert not moved
        with parking("disk", tmp_path):
            found = call(unet)
    assert torch.equal(found, expected)
    assert len(moved) > 20
    assert list(tmp_path.iterdir()) == []  # files without names


@pytest.mark.usefixtures("small")
def test_keys_and_values_of_all_frames_lie_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_unet(**ONE_LEVEL)
    files = set()
    by_parts = frames.attend_by_parts

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        files.update({key.untyped_storage().filename, value.untyped_storage().filename})
        return by_parts(query, key, value)

    monkeypatch.setattr(frames, "KEYS_AT_ONCE", 50)
    with stem.enabled(unet, InflatedConfig(num_frames=4, chunk=1)), torch.no_grad():
        with parking("never"):
            expected = call(unet)
        monkeypatch.setattr(frames, "attend_by_parts", watched)
        with parking("disk", tmp_path):
            found = call(unet)
    assert torch.equal(found, expected)
    assert len(files) > 2
    assert None not in files


@pytest.mark.usefixtures("small")
def test_views_stay_views_of_one_storage_in_a_file(tmp_path: Path) -> None:
    def hold() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        whole = torch.arange(24.0).view(4, 6)
        return whole, whole[1:, ::2], [whole.T]

    with parking("disk", tmp_path), torch.no_grad():
        for whole, part, (turned,) in waiting(hold):
            assert len({each.untyped_storage().data_ptr() for each in (whole, part, turned)}) == 1
            assert whole.untyped_storage().filename is not None
            assert torch.equal(whole, torch.arange(24.0).view(4, 6))
            assert torch.equal(part, whole[1:, ::2])
            assert torch.equal(turned, whole.T)


def test_small_tensors_and_those_with_gradients_stay(tmp_path: Path) -> None:
    def hold() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(4), torch.ones(module.LEAST_BYTES)

    with parking("disk", tmp_path):
        for few, many in waiting(hold):
            assert few.untyped_storage().filename is None
            assert many.untyped_storage().filename is None
        with torch.no_grad():
            for few, many in waiting(hold):
                assert few.untyped_storage().filename is None
                assert many.untyped_storage().filename is not None


@pytest.mark.usefixtures("small")
def test_what_a_view_was_made_of_does_not_keep_its_memory(tmp_path: Path) -> None:
    def hold() -> tuple[torch.Tensor]:
        return (torch.arange(24.0).view(4, 6),)  # nothing has a name for the 24 numbers

    with parking("disk", tmp_path), torch.no_grad():
        for (held,) in waiting(hold):
            assert held._base is not None
            assert held._base.untyped_storage().filename is not None
            assert held._base.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
            assert torch.equal(held, torch.arange(24.0).view(4, 6))


@pytest.mark.usefixtures("small")
def test_what_chunks_return_and_their_own_rows_lie_in_files(tmp_path: Path) -> None:
    unet = make_unet(**ONE_LEVEL)
    own: list[torch.Tensor] = []
    unet.conv_in.register_forward_pre_hook(lambda module, args: own.append(args[0]))
    config = dataclasses.replace(CHUNKS, chunk=2)
    with stem.enabled(unet, config), parking("disk", tmp_path):
        found = call(unet, rows=8)  # rows of two frames of two videos are no view of the caller's
    assert found.untyped_storage().filename is not None
    assert len(own) == 2
    assert all(rows.untyped_storage().filename is not None for rows in own)


@pytest.mark.usefixtures("small")
def test_what_the_caller_gave_stays_and_what_is_brought_waits_in_files(tmp_path: Path) -> None:
    exchange = Lockstep([0, 1], 1)
    given, brought = torch.ones(3), [torch.ones(5), torch.full((5,), 2.0)]
    merged: list[torch.Tensor] = []

    def run(frames: list[int]) -> tuple[torch.Tensor]:
        named = given
        return inner(named, frames[0])

    def inner(named: torch.Tensor, frame: int) -> tuple[torch.Tensor]:
        exchange.meet((brought[frame],), lambda parts: merged.extend(each for (each,) in parts))
        return (named.unsqueeze(0),)

    with parking("disk", tmp_path), torch.no_grad():
        found = exchange.run(run)
    assert given.untyped_storage().filename is None
    assert all(each.untyped_storage().filename is not None for each in merged)
    assert [float(each[0]) for each in merged] == [1.0, 2.0]
    assert torch.equal(found[0], torch.ones(2, 3))


class Elsewhere(Parking):
    """There is no other device here: what is away has other content until it comes back."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.content: dict[int, torch.UntypedStorage] = {}

    def park(self, chunk: Any, read: Any) -> None:
        for tensors in module._held_by(chunk, tuple(read)).values():
            storage, device = tensors[0].untyped_storage(), tensors[0].device
            module._move(tensors, torch.UntypedStorage(storage.nbytes()))
            self.content[id(tensors)] = tensors[0].untyped_storage().clone()
            tensors[0].untyped_storage().fill_(255)  # nan
            self._away.setdefault(chunk, []).append((device, tensors))

    def bring(self, chunk: Any) -> None:
        for _, tensors in self._away.get(chunk, ()):
            tensors[0].untyped_storage().copy_(self.content.pop(id(tensors)))
        super().bring(chunk)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample_per_base": None, "num_iters": 3},
        {"sample_per_base": None, "empty": "reseed", "num_iters": 3},
        {"calibration": "linear"},
        {"calibration": "joint", "key_share": 0.5},
    ],
    ids=str,
)
def test_tensors_of_another_device_come_back_before_anybody_reads_them(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    away = Elsewhere()
    monkeypatch.setattr("stem.attention.layers.exchange.current_parking", lambda: away)
    unet = make_unet(**ONE_LEVEL)
    with stem.enabled(unet, dataclasses.replace(CHUNKS, **changes)), torch.no_grad():
        found = call(unet)
        monkeypatch.undo()
        assert len(moved) > 20
        assert torch.equal(call(unet), found)
    assert not away._away


@pytest.mark.usefixtures("small")
def test_nothing_is_kept_of_chunks_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Elsewhere()
    monkeypatch.setattr("stem.attention.layers.exchange.current_parking", lambda: away)
    exchange = Lockstep([0, 1], 1)

    def run(frames: list[int]) -> tuple[torch.Tensor]:
        if frames == [1]:
            assert away._away
            raise MemoryError
        return held_while_it_waits()

    def held_while_it_waits() -> tuple[torch.Tensor]:
        held = torch.ones(1000)
        exchange.meet((torch.ones(1),), len)
        return (held,)

    with torch.no_grad(), pytest.raises(MemoryError):
        exchange.run(run)
    assert not away._away


@pytest.mark.usefixtures("small")
def test_auto_begins_where_a_quarter_of_the_memory_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    def hold() -> tuple[torch.Tensor]:
        return (torch.ones(1000),)

    for free, files in ((40_000, False), (31_000, True)):  # two chunks of 4,000 bytes
        monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free)
        with parking("auto", tmp_path), torch.no_grad():
            for (held,) in waiting(hold):
                assert (held.untyped_storage().filename is not None) == files


def test_where_the_disk_is_full_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with parking("disk", tmp_path), torch.no_grad():
        match = f"{tmp_path} has no room for 1.0 MiB that wait .No space left on device.; free"
        with pytest.raises(OSError, match=match):
            list(waiting(lambda: (torch.ones(2**18),)))
    assert list(tmp_path.iterdir()) == []


def test_what_is_filled_chunk_by_chunk_lies_in_a_file(tmp_path: Path) -> None:
    like = torch.ones(1, dtype=torch.float16)
    for kind, in_file in (("disk", True), ("auto", False), ("cpu", False), ("never", False)):
        with parking(kind, tmp_path):
            found = current_parking().empty(like, (3, 1000))
            assert (found.untyped_storage().filename is not None) == in_file
            found[1] = 5
            current_parking().leave()
            assert found.dtype == torch.float16
            assert bool((found[1] == 5).all())


def test_chunks_that_never_meet_leave_what_they_read_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(module, "_leave_to_file", lambda storage: left.append(storage.nbytes()))
    with parking("disk", tmp_path):
        kept = current_parking().empty(torch.ones(1), (3, 1000))
        kept.fill_(1)
        Lockstep([0, 1, 2], 1).run(lambda frames: (kept[frames],))
    assert left.count(kept.nbytes) == 3


@pytest.mark.parametrize(("kind", "in_file"), [("disk", True), ("auto", False), ("never", False)])
def test_what_is_made_by_frames_lies_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, in_file: bool
) -> None:
    monkeypatch.setattr(module, "FRAMES_AT_ONCE", 4)
    one, other = torch.randn(2, 11, 3000, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def made(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(len(one))
        return one * other

    with parking(kind, tmp_path), torch.no_grad():
        found = current_parking().by_frames(made, one, other)
        put = current_parking().put(one)
        small = current_parking().by_frames(lambda part: part.sum(1) > 0, one)
    assert seen == [4, 4, 3]
    for tensor, expected in ((found, one * other), (put, one)):
        assert (tensor.untyped_storage().filename is not None) == in_file
        assert torch.equal(tensor, expected)
    assert (put is one) == (not in_file)
    assert small.untyped_storage().filename is None
    assert torch.equal(small, one.sum(1) > 0)
    one.requires_grad_()
    with parking(kind, tmp_path):
        current_parking().by_frames(made, one, other).sum().backward()
    assert torch.equal(one.grad, other)


def test_a_kind_that_is_none() -> None:
    match = "park is 'ram'; it must be one of auto, cpu, disk, never"
    with pytest.raises(ValueError, match=match), parking("ram"):
        pass
