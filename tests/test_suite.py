"""The measuring suite: it runs without a GPU, times nothing wrong, and counts its targets right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_suite, targets, timing, tune
from benchmarks.cases import Bench, Case, Contender, Outputs, Row, UnavailableError
from benchmarks.floors import Ceilings, Work
from benchmarks.memory import holders_at_peak
from stem_kernels.tuning import table

CPU = torch.device("cpu")
CEILINGS = Ceilings(flops=100.0, exponentials=10.0, bytes=1000.0)


def app() -> Any:
    import typer

    made = typer.Typer()
    made.command()(gpu_suite.main)
    return made


def test_the_suite_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--small"]
    done = CliRunner().invoke(app(), arguments)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["part"] for row in results["rows"]} == set(gpu_suite.PARTS) - {"memory"}
    timed = {(row["case"], row["contender"]) for row in results["rows"] if row["seconds"]}
    for case, contender in (
        ("em key d=40", "torch"),
        ("em key d=40", "eager, torch.compile"),
        ("basis attention d=40", "sdpa math"),
        ("layer 8x8 N=2", "stem R=5"),
        ("unet 64x64 N=2", "stem R=1 warm"),
    ):
        assert (case, contender) in timed
    for name in ("rows.csv", "times.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    goals = targets.targets(1.0)
    assert report.count("| not measured | >=") + report.count("| not measured | <=") == len(goals)
    again = CliRunner().invoke(app(), [*arguments, "--only", "memory"])
    assert again.exit_code == 0, again.output
    merged = json.loads((tmp_path / "results.json").read_text())
    assert merged["rows"] == results["rows"]
    with pytest.raises(SystemExit, match="figures in --out are of another device"):
        gpu_suite.merged(results, {**results, "device": "another"}, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed", "--device", "cpu", "--small"], "'speed' is none of correctness"),
        (["--device", "cpu"], "with --small only"),
        pytest.param(
            [],
            "torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["--out", str(tmp_path), *arguments])
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split())


def contender(answer: float, error: Callable[[Outputs], float] | None = None) -> Contender:
    return Contender(lambda: lambda: (torch.tensor(answer),), error)


def unavailable() -> Callable[[], Outputs]:
    raise UnavailableError("not on this machine")


def test_what_is_wrong_is_not_timed() -> None:
    case = Case(
        "case",
        "shape",
        {
            "right": contender(1.0),
            "wrong": contender(3.0),
            "not a number": contender(float("nan")),
            "judged otherwise": contender(3.0, lambda answer: 0.5),
            "absent": Contender(unavailable),
        },
        lambda answer: float(answer[0] - 1),
        Work(flops=50, exponentials=20, bytes=100),
    )
    bench = Bench(CPU, torch.float32, CEILINGS, budget=0.0)
    bench.run("part", iter([case]))
    rows = {row.contender: row for row in bench.rows}
    assert rows["right"].seconds is not None
    assert (rows["right"].floor_seconds, rows["right"].limit) == (2.0, "exponentials")
    for name in ("wrong", "not a number"):
        assert rows[name].wrong
        assert rows[name].seconds is None
    assert rows["judged otherwise"].error == 0.5
    assert rows["absent"].note == "not on this machine"
    assert not rows["absent"].wrong


def test_targets_follow_from_the_rows() -> None:
    row = Row("operators", "em key d=40", "", "triton", "float16", seconds=1.5, floor_seconds=1.0)
    rows = [
        row,
        replace(row, contender="eager", seconds=18.0),
        replace(row, contender="eager, torch.compile", seconds=6.0),
        replace(row, case="basis attention d=40", seconds=1.0),
        replace(row, case="basis attention d=40", contender="sdpa flash", seconds=1.2),
        replace(row, case="basis attention d=40", contender="sdpa math", seconds=9.0),
        replace(row, case="em feature d=320", seconds=4.0 * 131072 * 320 * 256 / 5e14),
        replace(row, case="unet 512x512 N=32", contender="stem R=5", seconds=8.0),
        replace(row, case="unet 512x512 N=32", contender="per-frame", seconds=10.0),
        replace(row, case="unet 512x512 N=32", contender="all-frame", seconds=48.0),
    ]
    lines = targets.table(rows, 1e15, on_gpu=True).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
    assert cells["EM pass, key form, over its floor"] == ["1.5", "<= 2", "yes |"]
    assert cells["... times faster than eager"] == ["12", ">= 10", "yes |"]
    assert cells["... than torch.compile"] == ["4", ">= 5", "**no** |"]
    assert cells["basis attention, d=40, times faster than the best SDPA"][0] == "1.2"
    assert cells["EM pass, feature form, share of the measured matrix rate"][0] == "0.5"
    assert cells["UNet step 512x512, N=32, stem R=5, share of per-frame dense"][0] == "0.8"
    assert cells["UNet step 512x512, N=32, share of all-frame dense"][0] == "0.167"
    missing = cells["basis attention, d=64, times faster than the best SDPA"]
    assert missing[0].startswith("not measured: ")


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


def test_timing() -> None:
    calls = []
    found = timing.time_call(lambda: calls.append(1), CPU, budget=0.0)
    assert found.rounds == timing.MIN_ROUNDS == len(calls) - 1
    assert 0 <= found.p20 <= found.median <= found.p80


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
