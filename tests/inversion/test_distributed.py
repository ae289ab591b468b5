"""Several processes over gloo: the same bits as one, and what happens when one of them dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import make_control_pipeline, pictures
from inversions import clip
from pipelines import make_pipeline
from ranks import one_thread, start

from stem import Control, invert
from stem.attention.layers.exchange import Lockstep
from stem.inversion import InversionFolder, reconstruct_latents
from stem.names import INVERSION_METHODS

# (method, options, frames in a chunk); under "control" with a ControlNet, under "scenes" of two
# scenes, of which the second is shorter than three chunks.
BY_CHUNK = {"sample_per_base": None, "init": "gaussian", "empty": "reseed", "calibration": "joint"}
RUNS: list[tuple[str, dict[str, Any], int]] = [
    ("stem", {"num_bases": 8, **BY_CHUNK}, 2),
    ("scenes", {"num_bases": 8, "space": "key", "fit_frames": 3}, 1),
    ("st-ddim", {}, 2),
    ("inflated", {}, 2),
    ("control", {"num_bases": 8}, 2),
]


def run(
    root: Path, runs: list[Any], group: Any = None, num_steps: int = 2
) -> dict[str, list[float]]:
    """Invert and reconstruct; sums of the reconstructions, which say whether ranks agree."""
    found = {}
    for method, options, chunk in runs:
        control = Control(pictures(7)) if method == "control" else None
        pipeline = make_pipeline() if control is None else make_control_pipeline()
        folder = invert(
            pipeline,
            clip(7),
            "a duck",
            root / "inversions",
            method=method if method in INVERSION_METHODS else "stem",
            cuts=(5,) if method == "scenes" else (),
            control=control,
            options=options,
            num_steps=num_steps,
            chunk=chunk,
            group=group,
            progress=False,
            on_step=lambda: print("step", flush=True),
        )
        latents = reconstruct_latents(pipeline, folder, guidance=2.0, group=group, progress=False)
        found[folder.path.name] = latents.double().sum(dim=(1, 2, 3)).tolist()
    return found


def files(root: Path) -> dict[str, bytes]:
    found = root / "inversions"
    return {str(f.relative_to(found)): f.read_bytes() for f in found.rglob("*") if f.is_file()}


WORLDS = """
import json
two = dist.new_group([0, 1])
for ranks, group in ((1, None), (2, two), (3, dist.group.WORLD)):
    if rank < ranks:
        found = run(root / str(ranks), {runs!r}, group)
        print(json.dumps([ranks, found]), flush=True)
    dist.barrier()
"""


def test_one_two_and_three_processes_give_the_same_bits(tmp_path: Path) -> None:
    processes = start(__name__, tmp_path, 3, WORLDS.format(runs=RUNS))
    found = []
    for process in processes:
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        found += [json.loads(line) for line in process.lines() if line != "step"]
    assert sorted(ranks for ranks, _ in found) == [1, 2, 2, 3, 3, 3]
    assert all(sums == found[0][1] for _, sums in found)
    expected = files(tmp_path / "1")
    assert len(expected) == len(RUNS) * (2 + 2 + 1) + 1  # control pictures
    assert files(tmp_path / "2") == expected
    assert files(tmp_path / "3") == expected


def brought(frames: list[int]) -> tuple[torch.Tensor, ...]:
    """Tensors of a chunk; the first has a row for each frame."""
    rows = torch.tensor(frames).bfloat16().unsqueeze(1).expand(-1, 3)
    return rows, torch.tensor(float(frames[0]), dtype=torch.float64), torch.full((2, 5), True)


def meet(group: Any) -> None:
    """Three chunks of five frames meet and bring `brought`."""
    exchange = Lockstep(range(5), 2, group)
    expected = [brought(frames) for frames in ([0, 1], [2, 3], [4])]

    def call(frames: list[int]) -> tuple[torch.Tensor]:
        first, *others = brought(frames)
        rows = exchange.meet((first,), lambda parts: parts, counts=[2, 2, 1])
        rest = exchange.meet(tuple(others), lambda parts: parts)
        for (row,), other, (whole, *of_chunk) in zip(rows, rest, expected, strict=True):
            torch.testing.assert_close((row, *other), (whole, *of_chunk), rtol=0, atol=0)
        print("met", flush=True)
        return (torch.zeros(len(frames)),)

    exchange.run(call)


def test_tensors_of_any_dtype_meet_in_the_order_of_chunks(tmp_path: Path) -> None:
    processes = start(__name__, tmp_path, 2, "meet(dist.group.WORLD)")
    for process, chunks in zip(processes, (1, 2), strict=True):
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        assert process.lines() == ["met"] * chunks


def test_begun_with_two_killed_and_finished_by_one(tmp_path: Path) -> None:
    processes = start(__name__, tmp_path, 2, f"run(root, {RUNS[:1]!r}, dist.group.WORLD, 4)")
    processes[0].wait_for(["step", "step"])
    processes[1].process.kill()
    for process in processes:
        assert process.ended() != 0  # the other rank ends by itself, with an error
    (path,) = (tmp_path / "inversions").iterdir()
    assert 2 <= InversionFolder.open(path).steps_done < 4
    with one_thread():
        assert run(tmp_path, RUNS[:1], None, 4) == run(tmp_path / "whole", RUNS[:1], None, 4)
    assert files(tmp_path) == files(tmp_path / "whole")


def test_an_error_on_the_main_rank_is_every_rank_s(tmp_path: Path) -> None:
    (tmp_path / "inversions").write_text("a file where the folder should be")
    for process in start(__name__, tmp_path, 2, f"run(root, {RUNS[:1]!r}, dist.group.WORLD)"):
        error = process.ended(), process.errors.read_text()
        assert error[0] == 1, error
        assert "NotADirectoryError" in error[1]


IN_PARTS = """
from stem import distributed, parking

distributed.MESSAGE_BYTES = 2 * WIDTH * 4
sent, gather = [], dist.all_gather

def watched(received, tensor, group):
    sent.append(tensor.nbytes)
    gather(received, tensor, group=group)

dist.all_gather = watched
ranks, every = distributed.Ranks(dist.group.WORLD), rows()
for own in (range(rank, len(every), 2), range(rank * len(every))):
    whole = torch.zeros_like(every)
    whole[list(own)] = every[list(own)]
    ranks.fill(whole, own)
    assert torch.equal(whole, every)
filled = len(sent)
assert max(sent) == distributed.MESSAGE_BYTES
lockstep = Lockstep(range(len(every)), 1, dist.group.WORLD)

def brought(frames):
    mine = every[frames]
    merged = lockstep.meet((mine, mine.double()[:, :5]), lambda parts: [
        torch.cat(column) for column in zip(*parts, strict=True)
    ])
    return (merged[0][frames] + merged[1].sum(),)

with parking("disk", root):
    (found,) = lockstep.run(brought)
assert torch.equal(found, every + every.double()[:, :5].sum())
assert max(sent[filled:]) <= distributed.MESSAGE_BYTES + 5 * 8
print(len(sent) - filled, filled, flush=True)
"""
WIDTH = 20_000


def rows() -> torch.Tensor:
    return torch.arange(7 * WIDTH, dtype=torch.float32).view(7, WIDTH)


def test_long_messages_go_in_parts(tmp_path: Path) -> None:
    """Of seven frames a rank has four at most: two messages of two, or four of one."""
    for process in start(__name__, tmp_path, 2, IN_PARTS):
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        # What meets has a few more bytes a frame, so one frame goes at a time; results go by two.
        assert process.lines() == ["6 6"]


FROM_MAIN = """
from stem import distributed

distributed.MESSAGE_BYTES = 2 * WIDTH * 4
sent, broadcast = [], dist.broadcast

def watched(tensor, source, group):
    sent.append(tensor.nbytes)
    broadcast(tensor, source, group=group)

dist.broadcast = watched
ranks, every = distributed.Ranks(dist.group.WORLD), rows()
made = {"all": every.bfloat16(), "few": torch.arange(3), "again": [every.mT, every.mT, "text"]}
found = ranks.from_main(lambda: made if rank == 0 else 1 / 0)
assert found["few"].tolist() == [0, 1, 2] and found["again"][2] == "text"
assert found["all"].dtype == torch.bfloat16 and torch.equal(found["all"], made["all"])
assert all(torch.equal(each, every.mT) for each in found["again"][:2])
assert ranks.from_main(lambda: rank) == 0
print(sent, flush=True)
"""


def test_what_the_main_rank_has_goes_in_parts(tmp_path: Path) -> None:
    whole = 2 * WIDTH * 4
    parts = [whole, whole - WIDTH * 2, *[whole, whole, whole, whole // 2] * 2]
    for process in start(__name__, tmp_path, 2, FROM_MAIN):
        assert process.ended() == 0, process.errors.read_text()[-2000:]
        assert process.lines() == [str(parts)]


class ThreeRanks:
    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 0


def test_fewer_chunks_than_processes() -> None:
    with pytest.raises(ValueError, match="are 2 chunks, fewer than the 3 processes; take chunks"):
        Lockstep(range(4), 2, ThreeRanks())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"3 processes cannot share 2 frames.*start 2 processes"):
        Lockstep(range(2), 1, ThreeRanks())  # type: ignore[arg-type]
