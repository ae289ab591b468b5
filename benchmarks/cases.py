"""What a benchmark compares: contenders that answer one question, and a check of every answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from stem_kernels.backends import BackendError
from stem_kernels.measure import PeakMemory

from .floors import Ceilings, Work
from .timing import time_call

Outputs = tuple[torch.Tensor, ...]


class UnavailableError(RuntimeError):
    """A contender that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to answer.

    Args:
        start: makes ready (compiles, say), and returns the call to time.
        check: the error of an answer over the error allowed, for contenders whose right answer is
            another; None: the case's check.
    """

    start: Callable[[], Callable[[], Outputs]]
    check: Callable[[Outputs], float] | None = None


@dataclass(frozen=True)
class Case:
    """One question.

    Args:
        name: such as "em key d=40".
        shape: for people.
        contenders: by name.
        check: the error of an answer over the error allowed; above 1 it is wrong.
        work: what no contender can avoid; None where that is not counted.
        graph: time replays of a CUDA graph; for calls that are shorter than their launches.
    """

    name: str
    shape: str
    contenders: dict[str, Contender]
    check: Callable[[Outputs], float]
    work: Work | None = None
    graph: bool = False

    def error(self, name: str, answer: Outputs) -> float:
        """Of the answer of the contender `name`, over the error allowed."""
        return (self.contenders[name].check or self.check)(answer)


def no_common_check(answer: Outputs) -> float:
    """For cases whose contenders differ in what is right: each has a check of its own."""
    raise AssertionError("a contender of this case has no check")


@dataclass(frozen=True)
class Row:
    """One contender in one case. Times in seconds; None where there is none, and `note` says why.

    Args:
        part: of the suite.
        case, shape, contender, dtype: what was timed.
        seconds, p20, p80, rounds: see `timing.Timing`.
        error: over the error allowed, at most 1.
        extra_bytes: peak memory of one call above its inputs.
        floor_seconds: see `floors.Ceilings.floor`; `limit` names the ceiling.
        wrong: the check failed, and nothing was timed.
        note: why figures are missing.
    """

    part: str
    case: str
    shape: str
    contender: str
    dtype: str
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    error: float | None = None
    extra_bytes: int | None = None
    floor_seconds: float | None = None
    limit: str = ""
    wrong: bool = False
    note: str = ""


@dataclass
class Bench:
    """Where and how long to measure."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    budget: float = 0.5
    rows: list[Row] = field(default_factory=list)

    def run(self, part: str, cases: Iterator[Case]) -> None:
        """Check, then time, every contender of every case; one row each."""
        for case in cases:
            for name in case.contenders:
                row = self._row(part, case, name)
                self.rows.append(row)
                print(line(row), flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _row(self, part: str, case: Case, name: str) -> Row:
        dtype = str(self.dtype).removeprefix("torch.")
        bare = Row(part, case.name, case.shape, name, dtype)
        floor, limit = (None, "") if case.work is None else self.ceilings.floor(case.work)
        try:
            call = case.contenders[name].start()
            answer = call()
            error = case.error(name, answer)
            if not error <= 1:
                note = f"wrong: {error:.3g} times the error allowed"
                return replace(bare, error=error, wrong=True, note=note)
            del answer
            with PeakMemory(self.device) as memory:
                call()
            timing = time_call(call, self.device, budget=self.budget, graph=case.graph)
        except (BackendError, UnavailableError) as problem:
            return replace(bare, note=reason(name, problem))
        except torch.OutOfMemoryError:
            return replace(bare, note="out of memory")
        return replace(
            bare,
            seconds=timing.median,
            p20=timing.p20,
            p80=timing.p80,
            rounds=timing.rounds,
            error=error,
            extra_bytes=memory.extra_bytes,
            floor_seconds=floor,
            limit=limit,
        )


def reason(contender: str, problem: Exception) -> str:
    """Why a contender cannot run, in one line."""
    lines = str(problem).splitlines()
    own = [text for text in lines if text.startswith(f"{contender}: ")]
    return (own or [" ".join(lines)])[0].removeprefix(f"{contender}: ")


def line(row: Row) -> str:
    """A row for people who watch."""
    if row.seconds is None:
        return f"{row.part:10} {row.case:28} {row.contender:24} {row.note}"
    over = f"{row.seconds / row.floor_seconds:7.2f} x floor" if row.floor_seconds else ""
    return f"{row.part:10} {row.case:28} {row.contender:24} {1e3 * row.seconds:10.3f} ms {over}"
