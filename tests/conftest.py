"""What tests share: this process's backends and device, and what files and models they need."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from stem_kernels import cuda
from stem_kernels.testing import clustered_tokens

# How fast a machine is that has other work to do says nothing of the code.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

NO_CLIP = "hf download nobody/clip"
"""End of the advice where CLIP's weights are not on this machine."""
SLOWEST = 5
"""Tests that a run names at its end."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
if INTERPRETED:
    BACKENDS = ["triton"]
else:
    BACKENDS = ["torch"]
    BACKENDS += ["triton"] if DEVICE == "cuda" else []
    BACKENDS += ["cuda"] if cuda.load_error("cpu" if DEVICE == "cpu" else "cuda") is None else []


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(DEVICE)


def write_clip(path: Path, frames: int, height: int, width: int) -> str:
    # Here, as in fixtures below: tests of kernels alone need not wait for diffusers.
    from inversions import clip

    from stem import write_video

    smooth = clip(frames).frames.permute(0, 3, 1, 2).float()
    large = torch.nn.functional.interpolate(smooth, size=(height, width)).permute(0, 2, 3, 1)
    write_video(path, large.to(torch.uint8), 10)
    return str(path)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that reading what was not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """No test cuts the power; what a killed process has written is there without fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def mapped_blocks() -> Iterator[None]:
    """What glibc hands out comes and goes by the block, for a process's memory to be measured.

    Blocks that lie in a heap with holes, as earlier tests leave it, raise the peak by what is
    between them: by a quarter of the limit that is tested, in a trial.
    """
    blocks, kept = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(blocks, 2**18)
    yield
    if set_option is not None:  # what glibc's own rule ends in, once 32 MiB were freed
        set_option(blocks, 2**25)
        set_option(kept, 2**26)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel was compared with torch yet, and none is afterwards."""
    from verified import forget

    monkeypatch.delenv("STEM_KERNELS_VERIFY", raising=False)
    if not INTERPRETED:
        monkeypatch.setattr(cuda, "instructions", lambda: "avx2")  # for "auto" to take it
    forget()
    yield
    forget()


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of a module's `files`, where its commands run."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels, built for their emulator once for all of xdist's workers."""
    from cuda_emulator import Kernels

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulator"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Kernels(folder)


@pytest.fixture
def kernels(emulated: Any) -> Iterator[Any]:
    """The same; what a test sets of them is as before afterwards."""
    names = ("shared_limit", "multiprocessors", "chunk_bytes", "longest_sum")
    before = {name: getattr(emulated, name) for name in names}
    yield emulated
    vars(emulated).update(before)


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes a module that is None for one that is not installed."""
    for name in ("torchvision", "torchvision.models", "torchvision.models.optical_flow"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of random weights, in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from stem import random_pipeline

    tokenizer = random_pipeline().tokenizer
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    config = CLIPConfig(
        text_config={**tower, **words, "vocab_size": len(tokenizer)},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("models") / "clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline of random weights, in a folder."""
    from stem import random_pipeline

    folder = tmp_path_factory.mktemp("models") / "small"
    random_pipeline(1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def video(tmp_path: Path) -> str:
    return write_clip(tmp_path / "clip.mp4", 4, 70, 100)


@pytest.fixture(scope="session")
def inversion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An inversion of a video in two steps, by the embedded model."""
    from commands import run

    out = tmp_path_factory.mktemp("inverted")
    video = write_clip(out / "clip.mp4", 3, 32, 40)
    arguments = ("--methods", "ddim", "--size", "32x32", "--steps", "2", "--prompt", "a red ball")
    assert run("invert", video, *arguments, "--out", str(out)) == 0
    (folder,) = (out / "inversions").iterdir()
    return str(folder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that commands loaded; none can be."""
    loaded: list[str] = []

    def record(model: str, **_: Any) -> None:
        loaded.append(model)
        raise ValueError("no model can be loaded in this test")

    monkeypatch.setattr("stem.models.load_pipeline", record)
    monkeypatch.setenv("COLUMNS", "300")
    return loaded


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests that are marked "thinned" every second case stays, every third where there are three
    parameters or more; the others are marked "long". Each value of a parameter is still tried with
    some values of each other one. Tests of one parameter lose every other value where they are
    marked themselves, not their file."""
    for item in items:
        case = getattr(item, "callspec", None)
        if case is None or item.get_closest_marker("thinned") is None:
            continue
        itself = any(mark.name == "thinned" for mark in getattr(item.function, "pytestmark", []))  # type: ignore[attr-defined]
        count = 3 if len(case.indices) > 2 else 2
        if (itself or len(case.indices) > 1) and sum(case.indices.values()) % count:
            item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line with the tests that took longest, set-up included."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]
    slowest = [name for name in slowest if seconds[name] >= 1]
    if slowest:
        shown = [f"{name.rpartition('/')[2]} {seconds[name]:.0f} s" for name in slowest]
        terminalreporter.write_line(f"slowest: {', '.join(shown)}")
