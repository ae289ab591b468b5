"""An inversion's files: flipped, cut, swapped, edited, missing; found, named and mended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import stop_after
from inversions import all_latents, clip, inverted
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file

from stem import storage
from stem.inversion import InversionError, InversionFolder, invert, reconstruct_latents
from stem.models import load_pipeline, random_pipeline
from stem.storage import check_output, remove_stale, write_atomically


def step_file(folder: InversionFolder, step: int, kind: str = "steps") -> Path:
    (found,) = (folder.path / kind).glob(f"{step:03d}-*")
    return found


def flip(file: Path, count: int = 40) -> None:
    """Flip a bit in `count` bytes of the numbers, which no header check sees."""
    data = bytearray(file.read_bytes())
    for index in range(len(data) - count, len(data)):
        data[index] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_checksum(file: Path) -> None:
    save_file(load_file(file), file)


def other_tensor(file: Path) -> None:
    save_file({"noise": torch.zeros(2)}, file, {"stem": '{"sha256": "0"}'})


DAMAGE: dict[str, Callable[[Path], None]] = {
    "does not match its checksum": flip,
    r"is damaged \(.* bytes\)": cut,
    r"is damaged \(.*; 0 bytes\)": empty,
    "has no checksum that can be read": without_checksum,
    "its content does not match": other_tensor,
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_seen_on_reading_and_mended_in_place(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inverted(tmp_path)
    expected, x0 = all_latents(folder), folder.x0()
    assert folder.verify() == []
    for file in (step_file(folder, 1), step_file(folder, 4), folder.path / "x0.safetensors"):
        DAMAGE[what](file)
    with pytest.raises(InversionError, match=f"{what}.*run the same inversion again, it mends"):
        folder.latents(1)
    assert len(folder.verify()) == 3
    with pytest.raises(InversionError, match="run the"):
        reconstruct_latents(make_pipeline(), folder)
    steps: list[None] = []
    mended = inverted(tmp_path, on_step=lambda: steps.append(None))
    assert mended.path == folder.path
    assert len(steps) == 2
    assert torch.equal(all_latents(mended), expected)
    assert torch.equal(mended.x0(), x0)
    assert mended.verify() == []
    said = [record.getMessage() for record in caplog.records]
    assert any("the video is encoded again" in line for line in said)
    assert any("001-t0201" in line and "step 2 is computed again" in line for line in said)


def test_bases_are_mended_with_their_step(tmp_path: Path) -> None:
    folder = inverted(tmp_path, keep_bases=True)
    expected = folder.bases(2)
    flip(step_file(folder, 2, "bases"))
    assert "bases/002-t0401.safetensors is damaged" in folder.verify()[0]
    mended = inverted(tmp_path, keep_bases=True)
    assert all(torch.equal(mended.bases(2)[k].bases, v.bases) for k, v in expected.items())
    step_file(folder, 2, "bases").unlink()
    assert not folder.complete
    assert inverted(tmp_path, keep_bases=True).complete


def test_a_whole_file_in_another_s_place_is_seen(tmp_path: Path) -> None:
    first = inverted(tmp_path)
    second = inverted(tmp_path, options={"num_bases": 9, "num_iters": 2})
    shutil.copy(step_file(second, 2), step_file(first, 2))
    with pytest.raises(InversionError, match=r"is another file, .*002-t0401, under this name"):
        first.latents(2)
    shutil.copy(step_file(first, 1), step_file(first, 3))
    assert len(first.verify()) == 2
    assert inverted(tmp_path).verify() == []


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "was edited or its folder renamed": lambda d: {
        **d,
        "settings": {**d["settings"], "prompt": "a swan"},
    },
    "is damaged .KeyError": lambda d: {"timesteps": d["timesteps"]},
    "is damaged .TypeError": lambda d: {**d, "timesteps": 5},
    "is damaged": lambda d: [d],
}


@pytest.mark.parametrize("what", EDITS)
def test_edited_settings_are_not_believed(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inverted(tmp_path)
    file = folder.path / "settings.json"
    whole = file.read_bytes()
    file.write_text(json.dumps(EDITS[what](json.loads(whole))))
    with pytest.raises(InversionError, match=what):
        InversionFolder.open(folder.path)
    assert inverted(tmp_path).verify() == []
    assert file.read_bytes() == whole
    assert "the settings were written again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"settings"', b"[" * 100_000])
def test_settings_that_are_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(InversionError, match=r"settings\.json is damaged"):
        InversionFolder.open(tmp_path)


def test_no_settings_at_all(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match=r"holds no settings.json; name a folder"):
        InversionFolder.open(tmp_path)


def test_a_reconstruction_is_of_the_latents_it_began_with(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    folder = inverted(tmp_path)
    reconstruct_latents(pipeline, folder, progress=False)
    folder.save_latents(4, folder.latents(4) * 1.001, {})
    done: list[None] = []
    reconstruct_latents(pipeline, folder, progress=False, on_step=lambda: done.append(None))
    assert len(done) == 5


def test_another_dtype_is_named(tmp_path: Path) -> None:
    folder = inverted(tmp_path, pipeline=random_pipeline(0), method="ddim", num_steps=2)
    half = load_pipeline("random", dtype="bfloat16")
    with pytest.raises(InversionError, match="made in float32, and this pipeline is in bfloat16"):
        reconstruct_latents(half, folder)


def test_links_and_folders_in_a_file_s_place(tmp_path: Path) -> None:
    folder = inverted(tmp_path)
    (tmp_path / "link").symlink_to(folder.path)
    assert InversionFolder.open(tmp_path / "link").verify() == []
    step_file(folder, 2).unlink()
    (folder.path / "steps" / "002-t0401.safetensors").mkdir()
    assert "cannot be read (Is a directory)" in folder.verify()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b"]}, "prompt is a list; it must be one text"),
        ({"prompt": None}, "prompt is a NoneType"),
        ({"video": "clip.mp4"}, r"video is a str; pass what stem\.read_video"),
    ],
)
def test_arguments_of_other_types(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"video": clip(), "prompt": "a duck", **arguments}
    with pytest.raises(TypeError, match=message):
        invert(make_pipeline(), root=tmp_path, **given)


def test_folders_are_found(tmp_path: Path) -> None:
    made = [inverted(tmp_path / "a" / "b"), inverted(tmp_path, method="ddim")]
    assert InversionFolder.find(tmp_path) == sorted(folder.path for folder in made)
    assert InversionFolder.find(made[0].path) == [made[0].path]


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inverted(tmp_path / "whole")
    written = 0

    def full(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 4:  # settings, x0, two steps
            path = Path("/dev/full")
        with path.open("wb") as file:
            file.write(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"steps/002.*cannot be written: No space left.*free some"):
        inverted(tmp_path / "full")
    monkeypatch.undo()
    (path,) = (tmp_path / "full").iterdir()
    assert InversionFolder.open(path).steps_done == 2
    assert not list(path.rglob("*.part*"))
    assert torch.equal(all_latents(inverted(tmp_path / "full")), all_latents(whole))


def test_too_little_space_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(5000))
    steps: list[None] = []
    # 5 steps of 3 frames of 4 x 8 x 12 numbers
    with pytest.raises(OSError, match="needs 23,040 bytes, and 5,000 are free"):
        inverted(tmp_path, on_step=lambda: steps.append(None))
    assert not steps


@pytest.mark.long
def test_other_thread_counts_are_recorded_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        inverted(tmp_path, on_step=stop_after(1))
    (path,) = tmp_path.iterdir()
    assert InversionFolder.open(path).environment(0)["threads"] == str(threads)
    try:
        torch.set_num_threads(threads + 1)
        folder = inverted(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert f"begun under other conditions (threads {threads} -> {threads + 1})" in caplog.text
    assert folder.environment(4)["threads"] == str(threads + 1)
    caplog.clear()
    flip(step_file(folder, 0))
    inverted(tmp_path)
    assert f"(threads {threads + 1} -> {threads})" in caplog.text


@pytest.mark.parametrize("resume", [True, False])
def test_a_reconstruction_goes_on_where_it_stopped(tmp_path: Path, resume: bool) -> None:
    pipeline = make_pipeline()
    folder = inverted(tmp_path)
    expected = reconstruct_latents(pipeline, folder, resume=False, progress=False)
    done: list[None] = []

    def run(**settings: Any) -> torch.Tensor:
        return reconstruct_latents(pipeline, folder, resume=resume, progress=False, **settings)

    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop_after(2))
    assert torch.equal(run(on_step=lambda: done.append(None)), expected)
    assert len(done) == (3 if resume else 5)
    done.clear()
    assert torch.equal(run(on_step=lambda: done.append(None)), expected)
    assert len(done) == (0 if resume else 5)
    assert folder.verify() == []


def test_reconstructions_of_other_settings_are_kept_apart(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    folder = inverted(tmp_path, keep_bases=True)
    found = [
        reconstruct_latents(pipeline, folder, progress=False, **settings)
        for _ in range(2)
        for settings in (
            {},
            {"bases": "cached"},
            {"guidance": 3.0},
            {"guidance": 3.0, "negative_prompt": "a swan"},
        )
    ]
    for first, again in zip(found[:4], found[4:], strict=True):
        assert torch.equal(first, again)
    assert len({tuple(latents.flatten().tolist()) for latents in found}) == 4


def test_a_damaged_reconstruction_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inverted(tmp_path)
    expected = reconstruct_latents(make_pipeline(), folder, progress=False)
    (state,) = folder.path.glob("reconstruction-*")
    flip(state)
    assert "does not match its checksum" in folder.verify()[0]
    assert torch.equal(reconstruct_latents(make_pipeline(), folder, progress=False), expected)
    assert "does not match its checksum; the reconstruction starts afresh" in caplog.text


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        check_output(file / "below" / "out.mp4")
    with pytest.raises(OSError, match="are free on its disk; free some space") as caught:
        check_output(tmp_path / "a" / "b", 2**62)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="check the folder and its permissions"):
        check_output(Path("/proc/none"))
    check_output(tmp_path / "a" / "b", 10)
    assert list(tmp_path.iterdir()) == [file]


def test_only_dead_processes_partial_files_are_removed(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **PIPED)
    gone, here, there = int(ended.stdout), storage.host_id(), "abc123"
    dead = [
        tmp_path / f".x.mp4.{gone}.part",
        tmp_path / "a" / ".y.4194305.partial",
        tmp_path / f".x.mp4.{gone}@{here}.part",
        tmp_path / f".old.mp4.{os.getpid()}@{there}.part",
    ]
    living = [
        tmp_path / f".x.{os.getpid()}.partial",
        storage.partial_name(tmp_path / "x.mp4"),
        tmp_path / f".x.mp4.{gone}@{there}.part",
        tmp_path / "x.4194305.part",
        tmp_path / ".1.partially",
    ]
    for file in (*dead, *living):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"abc")
    a_day_ago = time.time() - 25 * 3600
    for file in (dead[-1], *living[:2]):
        os.utime(file, (a_day_ago, a_day_ago))
    assert sorted(remove_stale(tmp_path)) == sorted((file, 3) for file in dead)
    assert all(file.exists() for file in living)
    assert not any(file.exists() for file in dead)


PIPED: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


def test_contents_reach_the_disk_before_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(storage.os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        storage.os, "replace", lambda a, b: (events.append("replace"), replace(a, b))
    )
    write_atomically(tmp_path / "file", b"abc")
    assert events == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"abc"
