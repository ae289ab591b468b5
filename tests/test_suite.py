"""The GPU suite: it runs without a GPU, in parts, and survives what its contenders raise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from benchmarks import (
    correctness,
    gpu_suite,
    memory,
    operators,
    records,
    targets,
    tune,
    unets,
)
from benchmarks.attention_cases import attention_case
from benchmarks.bench import FAILED, MEASURED, UNAVAILABLE
from benchmarks.cases import AnyCase, Call, Trial
from benchmarks.memory import holders_at_peak
from stem_kernels.tuning import table

ON_CPU = ("--device", "cpu", "--small")
BARE = """
import sys
sys.modules.update(dict.fromkeys(("av", "diffusers", "matplotlib", "stem"), None))
import typer
from benchmarks import gpu_suite
typer.run(gpu_suite.main)
"""


def suite(*arguments: str) -> Result:
    made = typer.Typer()
    made.command()(gpu_suite.main)
    return CliRunner().invoke(made, arguments)


def outcomes(folder: Path) -> dict[tuple[str, str, str], str]:
    rows = records.read(folder / "results.json")["rows"]
    return {(row["part"], row["case"], row["contender"]): row["outcome"] for row in rows}


def test_the_suite_runs_in_parts_without_a_gpu(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    bare = subprocess.run(
        [sys.executable, "-c", BARE, *out, *ON_CPU, "--only", "correctness"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bare.returncode == 0, bare.stderr
    assert "no plots are drawn" in bare.stdout
    first = records.read(tmp_path / "results.json")
    assert {row["part"] for row in first["rows"]} == {"correctness"}
    done = suite(*out, *ON_CPU, "--only", "unet,memory,layer,operators")
    assert done.exit_code == 0, done.output
    results = records.read(tmp_path / "results.json")
    assert list(dict.fromkeys(row["part"] for row in results["rows"])) == list(gpu_suite.PARTS)
    assert results["rows"][: len(first["rows"])] == first["rows"]
    assert results["ceilings"] == first["ceilings"]
    found = outcomes(tmp_path)
    for row in (
        ("operators", "em key d=40", "torch"),
        ("operators", "em key d=40", "eager, torch.compile"),
        ("operators", "basis attention d=40", "sdpa math"),
        ("layer", "layer 8x8 N=2", "stem R=5"),
        ("memory", "memory N=16", "sparse-causal"),
        ("unet", "unet 64x64 N=2", "stem R=1"),
    ):
        assert found[row] == MEASURED
    assert found["operators", "em key d=40", "flash-kmeans"] == UNAVAILABLE
    for name in ("rows.csv", "times.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    assert report.count("| not measured: ") == len(targets.gpu_targets(1.0))
    records.write({**results, "device": "another"}, tmp_path / "results.json")
    with pytest.raises(SystemExit, match=r"results.json is of another device: another, now cpu"):
        gpu_suite.main(tmp_path, "memory", "cpu", True)


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
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contender in each part of a suite with little in it."""

    def one(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
        yield attention_case(2, 64, 40, device, dtype)

    monkeypatch.setattr(operators, "cases", one)
    monkeypatch.setattr(correctness, "DTYPES", (torch.float32,))
    monkeypatch.setattr(correctness, "_cases", one)
    monkeypatch.setattr(memory, "FRAMES", (8,))
    monkeypatch.setattr(unets, "unet_error", lambda *_: 0.0)
    started = Trial.start

    def start(trial: Trial[Any], name: str) -> Call:
        if (trial.case.name, name) in BROKEN:
            raise LaunchError("out of resource:\nshared memory")
        return started(trial, name)

    monkeypatch.setattr(Trial, "start", start)


@pytest.mark.usefixtures("broken")
def test_the_suite_survives_what_a_contender_raises(tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path), *ON_CPU)
    assert done.exit_code == 1
    assert "5 rows are wrong or failed: torch in basis attention d=40" in str(done.exception)
    found = outcomes(tmp_path)
    for (case, name), parts in BROKEN.items():
        for part in parts:
            assert found.pop((part, case, name)) == FAILED
            assert MEASURED in {outcome for key, outcome in found.items() if key[0] == part}
    assert FAILED not in found.values()
    report = (tmp_path / "report.md").read_text()
    assert report.count("LaunchError: out of resource: shared memory") == 5


@pytest.mark.usefixtures("broken")
def test_an_interrupted_suite_keeps_the_parts_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "cases", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(tmp_path, "operators,memory", "cpu", True)
    assert {part for part, _, _ in outcomes(tmp_path)} == {"operators"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed", *ON_CPU], "'speed' is none of correctness"),
        (["--device", "cpu"], "with --small only"),
        pytest.param(
            [],
            "torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path), *arguments)
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


def test_tuning_drops_what_spills_and_writes_tables_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(tune, "WARPS", (8,))
    monkeypatch.setattr(tune, "STAGES", (2,))
    monkeypatch.setitem(tune.TILES, "em_fused", {"block_n": (32, 128)})
    found = list(tune.candidates("em_fused 160", 90, 132))
    assert {row["block_n"] for row in found} == {32}
    assert [row["programs"] for row in found] == [132, 264, 528]
    committed = (tune.CONFIGS / "sm90.json").read_text()
    assert tune.text(table("sm90")) == committed
