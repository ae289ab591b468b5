"""Runs that start from an inversion: their names, their files, and the chunk that they record."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from interruptions import stop_after
from inversions import clip, inverted
from pipelines import make_pipeline

from stem import invert
from stem.editing import run_edit
from stem.inversion import InversionFolder, reconstruct_latents
from stem.inversion.runs import run_name


def flip(file: Path) -> None:
    """Flip a bit of the numbers."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_runs_of_other_versions_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inverted(tmp_path)
    reconstruct_latents(make_pipeline(), folder, progress=False)
    edit = run_name(folder, "edit-", ["a"])
    assert run_name(folder, "edit-", ["a"]) == edit
    (first,) = folder.path.glob("reconstruction-*")
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9" if name == "diffusers" else version(name)
    )
    reconstruct_latents(make_pipeline(), folder, progress=False)
    assert len(set(folder.path.glob("reconstruction-*")) - {first}) == 1
    assert run_name(folder, "edit-", ["a"]) != edit


def test_verify_reads_the_files_of_runs_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = inverted(tmp_path)
    reconstruct_latents(make_pipeline(), folder, progress=False)
    (state,) = folder.path.glob("reconstruction-*")
    assert run("verify", str(folder.path)) == 0
    flip(state)
    capfd.readouterr()
    assert run("verify", str(folder.path)) == 1
    assert f"damaged: {state} is damaged" in capfd.readouterr().out
    state.unlink()
    shutil.rmtree(folder.path / "steps")
    (folder.path / "steps").mkdir()
    assert folder.verify(to_come=False) == []
    assert len(folder.verify()) == 5
    flip(folder.path / "x0.safetensors")
    assert len(folder.verify(to_come=False)) == 1


def small_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A UNet call on more rows than these runs out of memory."""
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def small(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] > rows:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small)


@pytest.mark.parametrize("what", ["reconstruction", "edit"])
def test_a_run_records_the_chunk_that_it_ran_in(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inverted(tmp_path, chunk=2)

    def begin() -> None:
        settings: dict[str, Any] = {"progress": False, "on_step": stop_after(2)}
        if what == "edit":
            settings.update(prompt="a goose", method="sdedit")
        start: Any = run_edit if what == "edit" else reconstruct_latents
        with pytest.raises(KeyboardInterrupt):
            start(make_pipeline(), folder, **settings)

    with monkeypatch.context() as patch:
        small_memory(patch, 3 if what == "edit" else 1)
        begin()
    (file,) = folder.path.glob(f"{what}-*")
    found = folder.progress(file.stem)
    assert found is not None
    assert found.environment["chunk"] == "1"
    begin()
    assert "begun under other conditions (chunk 1 -> 2)" in caplog.text


def test_all_frames_at_once_are_a_chunk_of_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"cuts": (2,), "num_steps": 4, "chunk": None, "progress": False}

    def begin(**others: Any) -> InversionFolder:
        return invert(make_pipeline(), clip(), "a duck", tmp_path, **settings, **others)

    with pytest.raises(KeyboardInterrupt):
        begin(on_step=stop_after(2))
    folder = begin()
    # Where there are cuts the attention has a chunk, of all frames.
    assert {folder.environment(step)["chunk"] for step in range(4)} == {"3"}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reconstruct_latents(make_pipeline(), folder, progress=False, on_step=stop_after(1))
    assert "under other conditions" not in caplog.text
