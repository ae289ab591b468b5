"""The suite's launches through Triton's own launcher, and that wrong ones are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU needs no stand-in", allow_module_level=True)

from stem_kernels import basis_attention
from stem_kernels.triton import machine_reasons, program, tuning
from stem_kernels.triton.attention import resident

if machine_reasons():
    pytest.skip(machine_reasons()[0], allow_module_level=True)

from benchmarks.counting.forms import forms
from benchmarks.suite.dry_run import dry_run

FORMS = {
    "em key d=40 with payload", "em key d=64", "bases of a layer d=320",
    "basis attention d=80 with bias", "blended attention d=40", "calibrated attention d=40",
    "partial attention d=64", "moments d=40", "nearest token n=32768",
}  # fmt: skip
"""Of every operator at least one."""


def test_launches_are_packed_as_kernels_take_them() -> None:
    chosen = [(form.name, form.call) for form in forms(torch.float16) if form.name in FORMS]
    assert len(chosen) == len(FORMS)
    count, faults = dry_run(chosen)
    assert not faults
    assert count > 2 * len(FORMS)


def attention(*offsets: int) -> Callable[[], object]:
    """Attention; each call has its queries at another place of memory."""
    memory, key = torch.zeros(97 * 64).half(), torch.zeros(1, 1, 16, 64).half()
    places = iter(offsets)

    def call() -> object:
        query = memory[next(places) :][: 96 * 64].view(1, 1, 96, 64)
        return basis_attention(query, key, key, backend="triton")

    return call


def other_number(launch: Any) -> None:
    assert 96 in launch._numbers
    launch._arguments = tuple(80 if value == 96 else value for value in launch._arguments)


def one_less(launch: Any) -> None:
    launch._arguments = launch._arguments[1:]


def other_constant(launch: Any) -> None:
    launch._arguments = (*launch._arguments[:-1], 7)


def other_type(launch: Any) -> None:
    launch._arguments = tuple(2**40 if value == 96 else value for value in launch._arguments)


def long_grid(launch: Any) -> None:
    launch._grid = (1, 70_000, 1)


def no_grid(launch: Any) -> None:
    launch._grid = (0, 1, 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (other_number, "a repeated call launches something else than the first"),
        (one_less, " arguments; the kernel has "),
        (other_constant, " is 7; it was compiled for "),
        (other_type, " is 1099511627776, no i32"),
        (long_grid, ": 70000 programs along axis 1 of the grid; it has 1 to 65535"),
        (no_grid, "a grid of (0, 1, 1) launches nothing"),
    ],
)
def test_a_wrong_launch_is_seen(
    fault: Callable[[Any], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = program._Launch.__init__

    def wrong(launch: Any, *given: Any) -> None:
        made(launch, *given)
        fault(launch)

    assert dry_run([("attention", attention(0, 0))]) == (2, [])
    monkeypatch.setattr(program._Launch, "__init__", wrong)
    _, (found,) = dry_run([("attention", attention(0, 8))])
    assert said in found


def test_memory_that_is_not_aligned_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ALIGNMENT", 1)  # one program for both of the calls
    _, (found,) = dry_run([("attention", attention(0, 1))])
    assert "; it was compiled for multiples of 16" in found


def test_more_programs_than_a_launch_has_are_refused() -> None:
    # 70,000 x 40,000 is negative in 32 bits; Triton's launcher returns without a launch.
    def launch(*grid: int) -> None:
        one = program.Program(torch.device("cpu"))
        buffer = one.input(program.Layout.of(torch.zeros(4)))
        one.launch(resident._resident_kernel, grid, [buffer], ())

    with pytest.raises(ValueError, match="would take 2800000000 programs, and a launch has 2147"):
        launch(70_000, 40_000)
    launch(70_000, 30_000, 1)


def test_more_shared_memory_than_there_is_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tuning.table("default")["nearest_token"]
    larger = {**tuning.table("sm90"), "nearest_token": {**row, "num_stages": 9}}
    monkeypatch.setattr(tuning, "table", lambda name: larger if name == "sm90" else {})
    (call,) = (form.call for form in forms(torch.float16) if form.name == "nearest token n=32768")
    _, (found,) = dry_run([("nearest", call)])
    assert "OutOfResources" in found
