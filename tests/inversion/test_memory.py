"""How many frames go through the UNet at once, and what becomes of an inversion's chunk."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import make_control_pipeline, shown
from inversions import all_latents, inverted
from pipelines import make_pipeline

import stem.distributed
from stem.diffusion import memory
from stem.diffusion.memory import LARGEST_CHUNK, chunk_that_fits, frames_shared, largest_chunk
from stem.diffusion.pipeline import decode_latents, encode_prompt
from stem.inversion import InversionFolder, reconstruct_latents

MIB = 2**20


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine on which a UNet call takes 10 MiB and 2 MiB a frame, of which 1 MiB waits."""
    machine = {"free": 0}
    monkeypatch.setattr(
        memory, "_probe", lambda pipeline, frames, *size: ((10 + 2 * frames) * MIB, MIB)
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: machine["free"])
    return machine


@pytest.mark.parametrize(
    ("free", "meets", "chunk"),
    [
        (2000 / 0.7, True, 64),  # the most that a chunk has, where all 100 frames would fit
        (210 / 0.7 + 1, True, 32),
        (200 / 0.7, True, 32),  # 10 + 100 that wait + 2 * 45
        (130 / 0.7, True, 8),
        (130 / 0.7, False, 32),
        (113 / 0.7, True, 1),
        (13 / 0.7, False, 1),
    ],
)
def test_the_chunk_fills_free_memory(
    counted: dict[str, int], free: float, meets: bool, chunk: int | None
) -> None:
    counted["free"] = int(free * MIB)
    found = chunk_that_fits(make_pipeline(), 100, 16, 16, branches=1, meets=meets)
    assert found == chunk


@pytest.mark.parametrize(("free", "chunk"), [(701, None), (611, 64), (200, 8), (117, 1), (113, 1)])
def test_an_edit_of_three_branches_fits_into_the_chunk(
    counted: dict[str, int], free: float, chunk: int | None
) -> None:
    # 10 + 6 a frame in hand, and 1 that waits a frame.
    counted["free"] = int(free / 0.7 * MIB) + 1
    frames = 60 if chunk is None else 100
    assert chunk_that_fits(make_pipeline(), frames, 16, 16, branches=3, meets=True) == chunk


def test_what_does_not_fit_at_all_says_how_much_it_needs(counted: dict[str, int]) -> None:
    counted["free"] = 100 * MIB
    with pytest.raises(MemoryError, match=r"100 frames of 16x24 need 117,440,512 bytes .* fit_fra"):
        chunk_that_fits(make_pipeline(), 100, 24, 16, branches=1, meets=True)


@pytest.mark.parametrize(
    ("frames", "fit_frames", "ranks", "largest"),
    [
        (240, None, 1, LARGEST_CHUNK),
        (5, None, 1, LARGEST_CHUNK),
        (240, None, 2, LARGEST_CHUNK),
        (240, None, 8, 16),
        (64, None, 2, 32),
        (256, 32, 8, 16),  # 224 frames are left when bases are found
        (256, 250, 8, 16),
        (5, 9, 2, 2),
        (3, None, 8, 1),  # some ranks have none
    ],
)
def test_automatic_chunks_leave_one_for_each_rank(
    counted: dict[str, int], frames: int, fit_frames: int | None, ranks: int, largest: int
) -> None:
    shared = frames_shared(frames, fit_frames)
    assert largest_chunk(shared, ranks) == largest
    assert -(-shared // largest) >= min(ranks, shared)
    counted["free"] = 10_000 * MIB
    size = {"branches": 1, "meets": True, "largest": largest}
    found = chunk_that_fits(make_pipeline(), frames, 16, 16, **size)
    assert found == (None if frames <= largest else largest)
    counted["free"] = int((12.5 + frames) / 0.7 * MIB)
    assert chunk_that_fits(make_pipeline(), frames, 16, 16, **size) == (1 if frames > 1 else None)


class Ranks(stem.distributed.Ranks):
    """Two ranks, of which this process is the first, as far as the folder is made."""

    size = 2

    def from_main(self, make: Any) -> Any:
        folder, _ = make()
        return folder, []


def test_ranks_take_up_only_what_they_can_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["stem.inversion.inverting"]

    def chunks(root: str, ranks: bool = True, **settings: Any) -> list[int | None]:
        with monkeypatch.context() as patch:
            if ranks:
                patch.setattr(module, "Ranks", Ranks)
            inverted(tmp_path / root, chunk="auto", num_steps=1, **settings)
        found = [InversionFolder.open(path) for path in (tmp_path / root).iterdir()]
        return [folder.settings["attention"]["chunk"] for folder in found]

    assert chunks("begun", ranks=False) == [None]
    assert sorted(map(str, chunks("begun"))) == ["1", "None"]
    assert len(chunks("begun")) == 2
    assert chunks("halves", cuts=(2,)) == [1]
    inverted(tmp_path / "two", chunk=2, num_steps=1)
    assert chunks("two") == [2]  # chunks of two frames and of one


def test_a_probe_measures_a_call() -> None:
    pipeline = make_pipeline()
    _, held = memory._probe(pipeline, 1, 32, 32, encode_prompt(pipeline, "", 32, 32))
    skips = 4 * (32 * 16 * 16 + 32 * 16 * 16)  # conv_in, then the resnet of the only level
    assert held == skips + 4 * 4 * 32 * 16 * 16
    assert not pipeline.unet.conv_in._forward_hooks
    assert chunk_that_fits(pipeline, 4, 32, 32, branches=1, meets=True) is None


def test_an_inversion_goes_on_with_the_chunk_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(size: int | None) -> None:
        module = sys.modules["stem.inversion.inverting"]
        monkeypatch.setattr(module, "chunk_that_fits", lambda *a, **k: size)

    choose(2)
    first = inverted(tmp_path, chunk="auto")
    assert first.settings["attention"]["chunk"] == 2
    choose(None)  # more memory is free now
    assert inverted(tmp_path, chunk="auto").path == first.path
    assert inverted(tmp_path, chunk=2).path == first.path
    whole = inverted(tmp_path, chunk=None)
    assert whole.path != first.path
    assert inverted(tmp_path, chunk=3).path == whole.path  # all of its three frames
    assert inverted(tmp_path / "new", chunk="auto").settings["attention"]["chunk"] is None
    difference = all_latents(whole) - all_latents(first)
    assert float(difference.norm() / all_latents(whole).norm()) < 1e-4


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "many", True])
def test_chunks_that_are_none(tmp_path: Path, chunk: Any) -> None:
    with pytest.raises(ValueError, match="it must be a number of frames of at least 1, or auto"):
        inverted(tmp_path, chunk=chunk)
    folder = inverted(tmp_path, chunk=None)
    with pytest.raises(ValueError, match="it must be a number of frames"):
        reconstruct_latents(make_pipeline(), folder, chunk=chunk)


@pytest.mark.parametrize("method", ["stem", "st-ddim", "inflated", "ddim"])
def test_an_inversion_in_chunks_is_one_in_a_batch(tmp_path: Path, method: str) -> None:
    pipeline = make_pipeline()
    options = {"num_bases": 8, "temperature": 0.1} if method == "stem" else None
    latents = []
    for chunk in (None, 2, 1):
        folder = inverted(tmp_path, method=method, options=options, chunk=chunk)
        assert folder.environment(4)["chunk"] == str(chunk or 3)
        latents.append(all_latents(folder))
        latents.append(reconstruct_latents(pipeline, folder, progress=False)[None])
        again = reconstruct_latents(pipeline, folder, chunk=1, progress=False)[None]
        assert float((again - latents[-1]).norm() / again.norm()) < 1e-4
    for found in (latents[2:4], latents[4:6]):
        for ours, whole in zip(found, latents[:2], strict=True):
            assert float((ours - whole).norm() / whole.norm()) < 1e-4


def test_a_halved_chunk_is_recorded_and_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward
    steps: list[None] = []

    def small(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] > 1 and len(steps) >= 2:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small)
    folder = inverted(tmp_path, chunk=2, on_step=lambda: steps.append(None))
    assert [folder.environment(step)["chunk"] for step in range(5)] == ["2", "2", "1", "1", "1"]
    assert "a chunk of 2 frames; going on in chunks of 1" in caplog.text
    caplog.clear()
    next((folder.path / "steps").glob("004-*")).unlink()
    inverted(tmp_path, chunk=2)
    assert "begun under other conditions (chunk 1 -> 2)" in caplog.text


def test_fit_frames_are_an_option_of_an_inversion(tmp_path: Path) -> None:
    folder = inverted(tmp_path, options={"num_bases": 8, "fit_frames": 2}, keep_bases=True)
    assert InversionFolder.open(folder.path).settings["attention"]["fit_frames"] == 2
    pipeline = make_pipeline()
    cached = reconstruct_latents(pipeline, folder, bases="cached", progress=False)
    fitted = reconstruct_latents(pipeline, folder, progress=False)
    assert cached.isfinite().all()
    assert not torch.equal(cached, fitted)
    with pytest.raises(ValueError, match="stem has no option 'chunk'"):
        inverted(tmp_path, options={"chunk": 2})


def test_a_vae_that_lacks_memory_takes_fewer_frames(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = make_pipeline()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, decode = decode_latents(pipeline, latents), pipeline.vae.decode
    most, said = 1, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"

    def small(part: torch.Tensor) -> Any:
        if part.shape[0] > most:
            raise RuntimeError(said)
        return decode(part)

    monkeypatch.setattr(pipeline.vae, "decode", small)
    found = decode_latents(pipeline, latents)
    assert int((found.int() - expected.int()).abs().max()) <= 1  # of rounding
    assert "memory ran out in the VAE; it takes 1 frames at a time now" in caplog.text
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match="has no memory for one frame: Def"):
        decode_latents(pipeline, latents)
    said = "another error"
    with pytest.raises(RuntimeError, match="another error"):
        decode_latents(pipeline, latents)


def test_residuals_are_gone_before_the_decoder(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    residuals: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def note(module: Any, args: Any, output: Any) -> None:
        residuals[:] = map(weakref.ref, output[0])

    def count(*_: Any) -> None:
        alive.append(sum(each() is not None for each in residuals))

    hooks = [
        pipeline.controlnet.register_forward_hook(note),
        pipeline.unet.up_blocks[0].register_forward_pre_hook(count),
    ]
    inverted(tmp_path, pipeline=pipeline, control=shown(), num_steps=2, chunk=None)
    for hook in hooks:
        hook.remove()
    assert len(residuals) > 1
    assert alive == [1, 1]  # the loop variable of diffusers holds the last, which is small
