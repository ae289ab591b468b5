"""Inversions on disk: equal from run to run, resumed after a kill, reused, and the way back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import stop_after
from inversions import STEM, all_latents, clip, inverted
from pipelines import SHAPES, make_pipeline

import stem
from stem.inversion import (
    METHODS,
    InversionError,
    InversionFolder,
    reconstruct,
    reconstruct_latents,
    round_trip,
)
from stem.inversion.methods import attention_config
from stem_kernels import BackendError, cuda

pytestmark = pytest.mark.thinned


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_inverts_and_reconstructs(tmp_path: Path, method: str, shape: str) -> None:
    pipeline = make_pipeline(shape)
    processors = dict(pipeline.unet.attn_processors)
    folder = inverted(tmp_path, method=method, pipeline=pipeline, num_steps=25)
    assert folder.complete
    assert folder.path.name.startswith(f"{method}-")
    latents = reconstruct_latents(pipeline, folder, progress=False)
    x0 = folder.x0()
    assert (latents - x0).norm() / x0.norm() < 0.5
    noisiest = folder.latents(-1)
    assert (noisiest - x0).norm() > 2 * (latents - x0).norm()
    frames = reconstruct(pipeline, folder, progress=False)
    assert frames.shape == clip().frames.shape
    assert frames.dtype == torch.uint8
    assert all(pipeline.unet.attn_processors[name] is old for name, old in processors.items())


def test_v_prediction(tmp_path: Path) -> None:
    pipeline = make_pipeline(prediction_type="v_prediction")
    folder = inverted(tmp_path, pipeline=pipeline, num_steps=25)
    latents = reconstruct_latents(pipeline, folder, progress=False)
    assert (latents - folder.x0()).norm() / folder.x0().norm() < 0.5


@pytest.mark.parametrize("init", ["gaussian", "tokens"])
def test_inversion_is_bit_identical_and_leaves_the_global_state(tmp_path: Path, init: str) -> None:
    options = {**STEM, "init": init}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = inverted(tmp_path / "a", options=options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second = inverted(tmp_path / "b", options=options)
    assert torch.equal(all_latents(first), all_latents(second))


def test_methods_differ(tmp_path: Path) -> None:
    ends = [inverted(tmp_path, method=method).latents(-1) for method in METHODS]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("init", ["gaussian", "tokens"])
@pytest.mark.parametrize("keep_bases", [False, True])
def test_going_on_gives_the_same_bits(tmp_path: Path, init: str, keep_bases: bool) -> None:
    settings: dict[str, Any] = {"options": {**STEM, "init": init}, "keep_bases": keep_bases}
    whole = inverted(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        inverted(tmp_path / "broken", on_step=stop_after(3), **settings)
    (path,) = (tmp_path / "broken").iterdir()
    broken = InversionFolder.open(path)
    assert broken.steps_done == 3
    with pytest.raises(InversionError, match="has 3 of 5 steps; run the inversion again"):
        reconstruct(make_pipeline(), broken)
    # What a kill in the middle of writing leaves behind is never read, and goes.
    half = path / "steps" / ".003-t0601.safetensors.4194305.partial"
    half.write_bytes(b"half a file")
    resumed = inverted(tmp_path / "broken", **settings)
    assert resumed.path == path
    assert torch.equal(all_latents(resumed), all_latents(whole))
    assert not half.exists()
    assert len(list((path / "bases").iterdir())) == (5 if keep_bases else 0)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from inversions import inverted
def slowly():
    print("step", flush=True)
inverted(Path({root!r}), options={options!r}, num_steps=10, on_step=slowly)
"""


def test_killed_half_way(tmp_path: Path) -> None:
    options = {**STEM, "init": "gaussian"}
    code = KILLED.format(
        tests=str(Path(__file__).parents[1]), root=str(tmp_path / "killed"), options=options
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = (tmp_path / "killed").iterdir()
    assert 4 <= InversionFolder.open(path).steps_done < 10
    resumed = inverted(tmp_path / "killed", options=options, num_steps=10)
    whole = inverted(tmp_path / "whole", options=options, num_steps=10)
    assert resumed.path == path
    assert torch.equal(all_latents(resumed), all_latents(whole))


def test_equal_settings_are_reused_and_others_start_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = inverted(tmp_path)
    written = (first.path / "steps").stat().st_mtime_ns
    time.sleep(0.01)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    with caplog.at_level("INFO", "stem"):
        again = inverted(tmp_path, on_step=count)
    assert again.path == first.path
    assert steps == 0
    assert (first.path / "steps").stat().st_mtime_ns == written
    assert "is complete; it is reused" in caplog.text
    others = [
        {"options": {**STEM, "num_bases": 9}},
        {"options": {**STEM, "seed": 1}},
        {"num_steps": 4},
        {"keep_bases": True},
        {"pipeline": make_pipeline("sd2")},
        {"model": "another/name"},
        {"method": "ddim"},
    ]
    for other in others:
        steps = 0
        folder = inverted(tmp_path, on_step=count, **other)
        assert folder.path != first.path
        assert steps == len(folder.timesteps)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    assert torch.equal(all_latents(InversionFolder.open(first.path)), all_latents(first))


@pytest.mark.parametrize("space", ["feature", "key"])
def test_cached_bases(tmp_path: Path, space: str) -> None:
    pipeline = make_pipeline()
    options = {**STEM, "space": space}
    folder = inverted(tmp_path, options=options, keep_bases=True, num_steps=10)
    x0 = folder.x0()
    cached = reconstruct_latents(pipeline, folder, bases="cached", progress=False)
    estimated = reconstruct_latents(pipeline, folder, progress=False)
    assert not torch.equal(cached, estimated)
    assert (cached - x0).norm() / x0.norm() < 0.7
    with pytest.raises(ValueError, match="bases is 'saved'; it must be one of estimate, cached"):
        reconstruct_latents(pipeline, folder, bases="saved")
    without = inverted(tmp_path, options=options)
    with pytest.raises(InversionError, match="has no cached bases; invert with keep_bases"):
        reconstruct_latents(pipeline, without, bases="cached")
    with pytest.raises(ValueError, match='keep_bases needs method "stem"; ddim has no bases'):
        inverted(tmp_path, method="ddim", keep_bases=True)


def test_ddim_is_ddim_whatever_is_enabled(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    expected = inverted(tmp_path / "a", method="ddim")
    with stem.enabled(pipeline, stem.StemConfig(num_bases=4)) as handle:
        folder = inverted(tmp_path / "b", method="ddim", pipeline=pipeline)
        assert handle.active
    assert torch.equal(all_latents(folder), all_latents(expected))


def test_the_environment_s_backend_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "load_error", lambda part: "the C++ extension is not built")
    assert inverted(tmp_path).settings["backend"] == "torch"
    monkeypatch.setenv("STEM_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"the C\+\+ extension is not built"):
        inverted(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = inverted(tmp_path, model="the/first")
    with pytest.raises(InversionError, match="made with the model 'the/first', whose"):
        reconstruct(make_pipeline("sd2"), folder)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sdedit", {}, "method is 'sdedit'; it must be one of ddim, st-ddim, inflated, stem"),
        ("ddim", {"num_bases": 3}, "ddim has no option 'num_bases'; it has no options"),
        ("stem", {"bases": 3}, "stem has no option 'bases'; it has num_bases"),
        ("stem", {"num_frames": 3}, "stem has no option 'num_frames'"),
        ("stem", {"num_bases": 0}, "num_bases is 0"),
    ],
)
def test_options_that_do_not_exist(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_config(method, options, num_frames=4)


@pytest.mark.parametrize("method", METHODS)
def test_in_memory_it_is_the_same(tmp_path: Path, method: str) -> None:
    pipeline = make_pipeline()
    folder = inverted(tmp_path, method=method)
    config = attention_config(method, STEM if method == "stem" else {}, 3)
    seen: list[int] = []
    latents = round_trip(pipeline, folder.x0(), "a duck", 5, config, on_inverted=seen.append)
    assert torch.equal(latents, reconstruct_latents(pipeline, folder, progress=False))
    assert seen == list(folder.timesteps)


def test_in_memory_with_the_bases_of_the_inversion(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    folder = inverted(tmp_path, keep_bases=True)
    config = attention_config("stem", STEM, 3)
    latents = round_trip(pipeline, folder.x0(), "a duck", 5, config, cached=True)
    expected = reconstruct_latents(pipeline, folder, bases="cached", progress=False)
    assert torch.equal(latents, expected)
    with pytest.raises(ValueError, match="only StemConfig has bases"):
        round_trip(pipeline, folder.x0(), "a duck", 5, cached=True)
