"""The benchmarks' harness: it times nothing wrong, and counts its targets right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import readme, records, test_cpu
from benchmarks.cases import attention, floors, timing
from benchmarks.cases.bench import MEASURED, UNAVAILABLE, WRONG, Bench, Row, timed
from benchmarks.cases.case import Call, Case, Contender, Outputs, UnavailableError
from benchmarks.cases.floors import Ceilings, Work
from benchmarks.suite import targets

CPU = torch.device("cpu")
CEILINGS = Ceilings(flops=100.0, exponentials=10.0, bytes=1000.0)


def test_timing() -> None:
    calls = []
    found = timing.time_call(lambda: calls.append(1), device=CPU, budget=0.0)
    assert found.rounds == timing.MIN_ROUNDS == len(calls) - 1
    assert 0 <= found.p20 <= found.median <= found.p80


class Device:
    """A GPU, its stream and the host's clock, in seconds that nothing takes.

    Args:
        launch: Time that the host takes to launch something.
    """

    L2_cache_size = 1
    flush = 30e-6

    def __init__(self, launch: float) -> None:
        self.launch = launch
        self.host = self.stream = 0.0

    def run(self, seconds: float) -> None:
        self.host += self.launch
        self.stream = max(self.stream, self.host) + seconds

    def synchronize(self, device: torch.device) -> None:
        self.host = max(self.host, self.stream)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)

    def empty(self, *sizes: int, **options: Any) -> Device:
        return self

    def zero_(self) -> None:
        self.run(self.flush)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = max(self.device.stream, self.device.host)

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.time - self.time)


@pytest.mark.parametrize("kernels", [1, 5])
def test_the_host_is_not_timed(kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(launch=40e-6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.run(cycles / 3e9))
    monkeypatch.setattr(torch, "empty", device.empty)
    monkeypatch.setattr(time, "perf_counter", lambda: device.host)

    def work() -> None:
        for _ in range(kernels):
            device.run(10e-6)

    found = timing.time_call(work, device=torch.device("cuda"), budget=0.0)
    assert found.median == pytest.approx(kernels * 10e-6)


def test_no_first_call_is_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[Any, int] = {}

    def clock(work: Callable[[], object], device: torch.device) -> timing.Timing:
        before = called.copy()
        work()
        (name,) = (name for name in called if called[name] != before.get(name, 0))
        assert before.get(name, 0) >= 1, f"{name} starts in time that is measured"
        return timing.summary([1.0, 1.0])

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called[name] = called.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(floors, "time_call", clock)
    monkeypatch.setattr(torch, "mm", noted("product", torch.mm))
    monkeypatch.setattr(torch, "exp", noted("exponentials", torch.exp))
    monkeypatch.setattr(torch.Tensor, "copy_", noted("copy", torch.Tensor.copy_))
    assert floors.measure_ceilings(CPU, torch.float32).flops == 2 * 1024**3
    assert called == {"product": 2, "exponentials": 2, "copy": 2}


@pytest.mark.parametrize(
    ("said", "megahertz"),
    [
        ("GPU-another, 2100\nGPU-1234, 1980\n", 1980),
        ("GPU-another, 2100\nGPU-1234, [N/A]\n", 1700),
        ("GPU-1234, [Not Supported]\n", 1700),
        ("No devices were found\n", 1700),
        (None, 1700),
    ],
)
def test_the_clock_that_exponentials_are_counted_with(
    said: str | None, megahertz: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    properties = SimpleNamespace(uuid="1234", clock_rate=1_700_000, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = floors._gpu_exponentials(torch.device("cuda"))
    assert found == pytest.approx(100 * 16 * megahertz * 1e6)


@pytest.mark.parametrize(
    "said",
    [
        "cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "No available kernel. Aborting execution.",
    ],
)
def test_what_a_rival_refuses_is_unavailable(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(said)

    case = attention.attention_case(1, 16, 16, CPU, torch.float32, num_bases=4)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", refuse)
    examined = Bench().examine("part", case, "sdpa cudnn", lambda case, call: {})
    assert examined.outcome == UNAVAILABLE
    assert said[:20] in examined.note


def contender(
    answer: float, error: Callable[[float, Outputs], float] | None = None
) -> Contender[float]:
    return Contender(lambda inputs: lambda: (torch.tensor(answer),), error)


def unavailable(inputs: float) -> Call:
    raise UnavailableError("not on this machine")


def test_what_is_wrong_is_not_timed() -> None:
    case = Case(
        "case",
        "shape",
        torch.float32,
        lambda: 1.0,
        {
            "right": contender(1.0),
            "wrong": contender(3.0),
            "not a number": contender(float("nan")),
            "judged otherwise": contender(3.0, lambda inputs, answer: 0.5),
            "absent": Contender(unavailable),
        },
        lambda inputs: lambda answer: float(answer[0] - inputs),
        Work(flops=50, exponentials=20, bytes=100),
    )
    clock = timed(CPU, CEILINGS, lambda call, graph: timing.summary([1.0, 2.0, 6.0]))
    rows = {row.contender: row for row in Bench().run("part", [case], clock)}
    assert (rows["right"].outcome, rows["right"].seconds) == (MEASURED, 2.0)
    assert (rows["right"].floor_seconds, rows["right"].limit) == (2.0, "exponentials")
    for name in ("wrong", "not a number"):
        assert rows[name].outcome == WRONG
        assert rows[name].seconds is None
    assert rows["judged otherwise"].error == 0.5
    assert (rows["absent"].outcome, rows["absent"].note) == (UNAVAILABLE, "not on this machine")


def row(case: str, contender: str, seconds: float | None, **figures: Any) -> Row:
    return Row("operators", case, "", contender, "", "float16", seconds=seconds, **figures)


def test_targets_follow_from_the_rows() -> None:
    rows = [
        row("em key d=40", "triton", 1.5, floor_seconds=1.0),
        row("em key d=40", "eager", 18.0),
        row("em key d=40", "eager, torch.compile", 6.0),
        row("basis attention d=40", "triton", 1.0),
        row("basis attention d=40", "sdpa flash", 1.2),
        row("basis attention d=40", "sdpa math", 9.0),
        row("em feature d=320", "triton", 4.0 * 131072 * 320 * 256 / 5e14),
        row("unet 512x512 N=32", "stem R=5", 8.0),
        row("unet 512x512 N=32", "stem R=1", 7.0),
        row("unet 512x512 N=32", "per-frame", 10.0),
        row("unet 512x512 N=32", "all-frame", 48.0),
    ]
    cells = by_target(targets.table(rows, targets.gpu_targets(1e15)))
    assert cells["EM pass, key form, over its floor"] == ["1.5", "<= 2", "yes |"]
    assert cells["... times faster than eager"] == ["12", ">= 10", "yes |"]
    assert cells["... than torch.compile"] == ["4", ">= 5", "**no** |"]
    assert cells["basis attention, d=40, times faster than the best SDPA"][0] == "1.2"
    assert cells["EM pass, feature form, share of the measured matrix rate"][0] == "0.5"
    step = "UNet step 512x512, N=32, {}share of {} dense"
    assert cells[step.format("stem R=5, ", "per-frame")][0] == "0.8"
    assert cells[step.format("stem R=1, ", "per-frame")] == ["0.7", "<= 0.85", "yes |"]
    assert cells[step.format("", "all-frame")][0] == "0.167"
    missing = cells["basis attention, d=64, times faster than the best SDPA"]
    assert missing[0].startswith("not measured: ")


def test_the_targets_of_a_cpu() -> None:
    rows = [
        row("soft_em d=40", "torch", 2.0, extra_bytes=10),
        row("soft_em d=40", "cuda", 1.0, floor_seconds=0.5),
        row("soft_em d=40", "eager", 9.0, extra_bytes=150),
        row("soft_em d=320", "torch", 1.2),
        row("soft_em d=320", "cuda", 1.1, floor_seconds=1.0),
        row("soft_em d=640", "torch", 1.2),
        row("soft_em d=640", "cuda", 1.1, floor_seconds=0.5),
    ]
    cells = by_target(targets.table(rows, targets.cpu_targets()))
    assert cells["soft_em d=40, times faster than eager"] == ["4.5", ">= 5", "**no** |"]
    assert cells["soft_em d=40, extra memory of eager over its own"][0] == "15"
    allowed = "C++ extension, soft_em d={}, over 2/3 of the torch backend's time or 1.3 floors"
    assert cells[allowed.format(40)] == ["0.75", "<= 1", "yes |"]
    assert cells[allowed.format(320)] == ["0.846", "<= 1", "yes |"]
    assert cells[allowed.format(640)] == ["1.38", "<= 1", "**no** |"]


def test_the_profile_of_the_extension() -> None:
    profiled = [
        (case.name, name)
        for _, case in test_cpu.CASES
        for name in case.contenders
        if test_cpu.profiled(case, name)
    ]
    assert len(set(profiled)) == len(profiled) == 2 * 3 * len(targets.PROFILED)
    rows = [row(*names, 0.003 if names[1] == "torch" else 0.0015) for names in profiled]
    results = {
        "rows": [asdict(each) for each in rows],
        "instructions": {"torch": "AVX2", "C++": "avx2"},
        "provenance": {"cpu": "A", "threads": 2, "versions": {"torch": "3"}, "commit": "c"},
    }
    written = readme.profile_table(Path("x.json"), results)
    assert "Torch with AVX2, C++ with avx2" in written
    assert written.count("| 3.0 / 1.5 = 2.0 ") == 3 * len(targets.PROFILED)


def by_target(table: str) -> dict[str, list[str]]:
    lines = table.splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}


@pytest.mark.long
def test_pytest_benchmark_times_the_same_cases(tmp_path: Path) -> None:
    options = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "-p", "no:cacheprovider"]
    chosen = ["-k", "1280 and torch and test_contender", "--results", str(tmp_path / "cpu.json")]
    # In a process of its own: pytest-benchmark measures nothing in a worker of pytest-xdist.
    outer = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, "-m", "pytest", test_cpu.__file__, *options, *chosen]
    done = subprocess.run(command, env=outer, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    results = records.read(tmp_path / "cpu.json")
    (found,) = (Row(**each) for each in results["rows"])
    assert (found.case, found.backend, found.outcome) == ("soft_em d=1280", "torch", MEASURED)
    assert found.p20 <= found.seconds <= found.p80
    assert results["provenance"]["versions"]["torch"] == torch.__version__
