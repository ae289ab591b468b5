"""The GPU suite: in parts, without a GPU; it survives its contenders, its process and its call."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import records
from benchmarks.cases import operators
from benchmarks.cases.attention import attention_case
from benchmarks.cases.bench import FAILED, MEASURED, SKIPPED, UNAVAILABLE
from benchmarks.cases.case import AnyCase, Call, Trial
from benchmarks.cases.memory import holders_at_peak
from benchmarks.suite import compiling, correctness, gpu_suite, targets
from benchmarks.suite import parts as suite_parts
from benchmarks.suite import report as suite_report
from benchmarks.suite.file import SuiteFile
from benchmarks.suite.gpu_suite import PARTS

CPU = torch.device("cpu")
# On a machine that lacks these, with an operator that ends the process.
DYING = """
import os, sys
sys.modules.update(dict.fromkeys(("av", "diffusers", "greenlet", "matplotlib", "stem"), None))
import torch, typer
from benchmarks.cases import operators
from benchmarks.cases.attention import attention_case
from benchmarks.cases.case import Trial
from benchmarks.suite import correctness, parts

def one(device, dtype, *, small):
    yield attention_case(2, 64, 40, device, dtype)

operators.cases = correctness.targeted = one
correctness.DTYPES, correctness.of_kinds = (torch.float32,), lambda *_, small: ()
started = Trial.start
def start(trial, name):
    if name == "sdpa math":
        os._exit(9)
    return started(trial, name)
Trial.start = start
typer.run(parts.main)
"""


def run(folder: Path, parts: str) -> None:
    """A call of its own for some parts."""
    suite_parts.run(folder, parts.split(","), CPU, small=True)


def outcomes(folder: Path) -> dict[tuple[str, str, str], str]:
    rows = records.read(folder / "results.json")["rows"]
    return {(row["part"], row["case"], row["contender"]): row["outcome"] for row in rows}


def test_another_process_goes_on_when_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "MEASURING", (sys.executable, "-c", DYING))
    with pytest.raises(SystemExit, match="1"):
        gpu_suite.main(tmp_path, "correctness,operators", "cpu", True)
    said = capfd.readouterr()
    assert "the measuring process died with status 9; another goes on" in said.err
    assert "1 rows are wrong or failed: sdpa math in basis attention d=40" in said.err
    assert "no plots are drawn" in said.out
    found = outcomes(tmp_path)
    assert found["operators", "basis attention d=40", "sdpa math"] == FAILED
    for name in ("torch", "sdpa flash"):
        assert found["operators", "basis attention d=40", name] == MEASURED
    assert found["correctness", "basis attention d=40", "torch"] == MEASURED
    assert len(records.read(tmp_path / "results.json")["calls"]) == 1
    assert "died with status 9" in (tmp_path / "report.md").read_text()


def test_a_silent_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "SILENCE", 0.5)
    begin = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu_suite.watched(command, tmp_path / "results.json") == (-9, "gave no answer for 0 s")
    assert time.monotonic() - begin < 30


class LaunchError(Exception):
    """Of no class that the suite knows, as Triton's OutOfResources is."""


BROKEN = {
    ("basis attention d=40", "torch"): ("correctness", "operators"),
    ("layer 8x8 N=2", "stem R=1"): ("layer",),
    ("unet 64x64 N=2", "stem R=1"): ("unet",),
    ("memory N=8", "stem"): ("memory",),
}
"""Contenders that raise an error, and the parts that they are in."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite with little in it."""

    def one(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
        yield attention_case(2, 64, 40, device, dtype)

    monkeypatch.setattr(operators, "cases", one)
    monkeypatch.setattr(correctness, "targeted", one)
    monkeypatch.setattr(correctness, "DTYPES", (torch.float32,))
    monkeypatch.setattr(correctness, "of_kinds", lambda *_, small: ())


def raise_in(monkeypatch: pytest.MonkeyPatch, error: BaseException, where: Any) -> None:
    started = Trial.start

    def start(trial: Trial[Any], name: str) -> Call:
        if (trial.case.name, name) in where:
            raise error
        return started(trial, name)

    monkeypatch.setattr(Trial, "start", start)


@pytest.mark.long
def test_three_calls_survive_what_contenders_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_in(monkeypatch, LaunchError("out of resource:\nshared memory"), BROKEN)
    failed = "rows are wrong or failed: torch in basis attention d=40"
    with pytest.raises(SystemExit, match=failed):
        run(tmp_path, "correctness,operators")
    first = records.read(tmp_path / "results.json")
    assert {row["part"] for row in first["rows"]} == {"correctness", "operators"}
    for parts in ("layer,memory", "unet"):
        with pytest.raises(SystemExit, match=failed):
            run(tmp_path, parts)
    results = records.read(tmp_path / "results.json")
    assert list(dict.fromkeys(row["part"] for row in results["rows"])) == list(PARTS)
    assert [call["parts"] for call in results["calls"]] == [
        ["correctness", "operators"],
        ["layer", "memory"],
        ["unet"],
    ]
    assert results["seconds"].keys() == PARTS.keys()
    assert results["rows"][: len(first["rows"])] == first["rows"]
    assert results["ceilings"] == first["ceilings"]
    found = outcomes(tmp_path)
    for row in (
        ("correctness", "em feature d=320", "torch"),
        ("correctness", "basis attention d=80", "torch"),
        ("operators", "em key d=40", "torch"),
        ("operators", "em key d=40", "eager, torch.compile"),
        ("operators", "basis attention d=40", "sdpa math"),
        ("layer", "layer 8x8 N=2", "stem R=5"),
        ("memory", "memory N=16", "sparse-causal"),
        ("unet", "unet 64x64 N=2", "stem R=5"),
    ):
        assert found[row] == MEASURED
    assert found["operators", "em key d=40", "flash-kmeans"] == UNAVAILABLE
    for (case, name), where in BROKEN.items():
        for part in where:
            assert found.pop((part, case, name)) == FAILED
    assert set(found.values()) == {MEASURED, UNAVAILABLE}
    for name in ("rows.csv", "times.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    assert report.count("| not measured: ") == len(targets.gpu_targets(1.0))
    assert report.count("LaunchError: out of resource: shared memory") == 8
    (tmp_path / "report.md").unlink()
    suite_report.main(tmp_path)
    assert (tmp_path / "report.md").read_text() == report


@pytest.mark.usefixtures("few")
def test_a_part_that_cannot_begin_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "benchmarks.cases.unets", None)
        with pytest.raises(SystemExit, match="1 rows are wrong or failed: every contender left"):
            run(tmp_path, "unet,operators")
    assert outcomes(tmp_path)["operators", "basis attention d=40", "torch"] == MEASURED
    assert "**unet ended early**: ModuleNotFoundError" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("few")
def test_an_interrupted_suite_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopped:
        raise_in(stopped, KeyboardInterrupt(), {("basis attention d=40", "sdpa flash")})
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "operators")
    assert list(outcomes(tmp_path)) == [
        ("operators", "basis attention d=40", name) for name in ("triton", "cuda", "torch")
    ]
    raise_in(monkeypatch, LaunchError("measured twice"), {("basis attention d=40", "torch")})
    run(tmp_path, "operators")
    assert outcomes(tmp_path)["operators", "basis attention d=40", "sdpa flash"] == MEASURED


@pytest.mark.usefixtures("few")
def test_what_no_time_is_left_for_is_measured_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as hurried:
        hurried.setitem(PARTS, "correctness", 0.0)
        run(tmp_path, "correctness")
    assert set(outcomes(tmp_path).values()) == {SKIPPED}
    (row, *_) = records.read(tmp_path / "results.json")["rows"]
    assert (row["outcome"], row["note"]) == ("not measured", "time: the part's 0 s were over")
    run(tmp_path, "correctness")
    assert outcomes(tmp_path)["correctness", "basis attention d=40", "torch"] == MEASURED
    assert SKIPPED not in outcomes(tmp_path).values()


@pytest.mark.usefixtures("few")
def test_what_failed_is_measured_again_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("basis attention d=40", "torch")
    with monkeypatch.context() as broken:
        raise_in(broken, LaunchError("once"), {where})
        with pytest.raises(SystemExit, match="1 rows are wrong or failed"):
            run(tmp_path, "operators")
    # Another part's call leaves it, as does a process that goes on for one that died.
    run_and_fail = pytest.raises(SystemExit, match="1 rows are wrong or failed")
    with run_and_fail:
        run(tmp_path, "correctness")
    with run_and_fail:
        suite_parts.run(tmp_path, ["operators"], CPU, small=True, died="died with status 9")
    run(tmp_path, "operators")
    assert outcomes(tmp_path)["operators", *where] == MEASURED
    assert len(records.read(tmp_path / "results.json")["rows"]) == 3 + 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.int64], ids=str)
def test_outputs_of_every_dtype_are_poisoned_before_a_graph_is_replayed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = torch.tensor([0, 7], dtype=dtype)
    seen: list[torch.Tensor] = []

    class Graph:
        def replay(self) -> None:
            seen.append(answer.clone())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    correctness._replayed(lambda: (answer,))
    (poisoned,) = seen
    assert not torch.equal(poisoned, torch.tensor([0, 7], dtype=dtype))
    assert torch.equal(poisoned, poisoned[:1].expand(2)) or bool(poisoned.isnan().all())


@pytest.mark.usefixtures("few")
def test_what_is_compiled_ahead_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from triton import knobs

    from benchmarks.counting.launch_counts import ARCH, SilentDriver
    from benchmarks.counting.launches import absent_gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(correctness, "DTYPES", (torch.float16,))
    monkeypatch.setattr(compiling, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(compiling, "device_capability", lambda _: divmod(ARCH, 10))
    said: list[int] = []
    compiling.wanted.cache_clear()
    compiling.compile_ahead(
        "correctness", torch.device("cuda"), small=True, said=lambda: said.append(1)
    )
    wanted = compiling.wanted("correctness", ARCH, True)
    compiling.wanted.cache_clear()
    assert len(said) == len(wanted) > 0
    hits: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda cache_hit, **_: hits.append(cache_hit)
    )
    for launch in wanted:
        launch.kernel.device_caches.clear()
    (case,) = correctness.cases(CPU, small=True)
    with absent_gpu(ARCH, SilentDriver()):
        Trial(case).start("triton")()
    assert hits
    assert all(hits)


def test_kernels_are_compiled_before_a_parts_clock_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def compile_ahead(part: str, device: torch.device, *, small: bool, said: Any) -> None:
        clock[0] += 1000.0
        said()

    monkeypatch.setattr(suite_parts.compiling, "compile_ahead", compile_ahead)
    monkeypatch.setattr(suite_parts, "plan", lambda *_, **__: ((), None))
    file = SuiteFile(tmp_path / "results.json", CPU, torch.float32, small=True)
    begun: list[float] = []
    monkeypatch.setattr(file, "begin_part", lambda part: begun.append(clock[0]) or 0.0)
    suite_parts.measure(file, "operators", torch.device("cuda"), small=True)
    assert begun == [1000.0]


@pytest.mark.usefixtures("few")
def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "correctness")
    path = tmp_path / "results.json"
    results = records.read(path)
    versions = results["provenance"]["versions"]
    absent = {**versions, "diffusers": "not installed"}
    records.write({**results, "provenance": {**results["provenance"], "versions": absent}}, path)
    run(tmp_path, "correctness")
    assert records.read(path)["provenance"]["versions"] == versions
    other = {**versions, "triton": "3.0"}
    provenance = {**results["provenance"], "versions": other}
    records.write({**results, "device": "another", "provenance": provenance}, path)
    differing = (
        rf"results.json differs in device another, now cpu; triton 3.0, now {versions['triton']}"
    )
    with pytest.raises(SystemExit, match=differing):
        run(tmp_path, "correctness")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "speed", "--device", "cpu", "--small"], "'speed' is none of correctness"),
        (["--parts", "unet", "--device", "cpu"], "with --small only"),
        pytest.param(
            ["--parts", "unet", "--device", "cuda"],
            "torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    made = typer.Typer()
    made.command()(suite_parts.main)
    done = CliRunner().invoke(made, ["--out", str(tmp_path), *arguments])
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split())


def test_what_holds_the_peak() -> None:
    def event(action: str, address: int, size: int, name: str) -> dict[str, Any]:
        frames = [
            {"filename": "/x/torch/nn/functional.py", "line": 1},
            {"filename": f"/x/stem/{name}.py", "line": 7},
        ]
        return {"action": action, "addr": address, "size": size, "frames": frames}

    events = [
        event("alloc", 1, 10, "early"),
        event("alloc", 2, 30, "attend"),
        event("free_requested", 1, 10, ""),
        event("alloc", 3, 15, "attend"),
        event("free_requested", 2, 30, ""),
        event("alloc", 1, 20, "late"),
    ]
    assert holders_at_peak(events) == {"stem/attend.py:7": 45}
    assert holders_at_peak(events[:2]) == {"stem/attend.py:7": 30, "stem/early.py:7": 10}
