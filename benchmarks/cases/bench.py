"""The harness: make ready, check, and only then measure; one row for every contender."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from stem_kernels.backends import BackendError
from stem_kernels.measure import PeakMemory
from stem_kernels.shared.memory import lacks_memory

from .case import AnyCase, Call, Trial, UnavailableError, dtype_name
from .floors import Ceilings
from .timing import Timing

MEASURED, UNAVAILABLE, WRONG, FAILED = "measured", "unavailable", "wrong", "failed"
SKIPPED = "not measured"
LONGEST_NOTE = 300


@dataclass(frozen=True)
class Row:
    """One contender in one case. Figures are None where there are none, and `note` says why.

    Args:
        part: Part of the suite.
        case: Name of the case.
        shape: Sizes, for people.
        contender: Name of the contender.
        backend: Argument `backend` of the call, or "".
        dtype: Type of the inputs, such as "float16".
        outcome: MEASURED; UNAVAILABLE: this machine cannot run it; WRONG: the check failed, and
            nothing was measured; FAILED: it raised an error, or its process ended; SKIPPED: the
            part's time was over.
        note: Reason why figures are missing.
        seconds, p20, p80, rounds: Times of a call, see `timing.Timing`.
        error: Error of the answer over the error allowed; above 1 it is wrong.
        extra_bytes: Peak memory of a call above its inputs.
        holders: Lines of code that held that peak, with their MiB; "" where it is not recorded.
        floor_seconds: Least time possible, see `floors.Ceilings.floor`.
        limit: Name of the ceiling that gives the floor.
    """

    part: str
    case: str
    shape: str
    contender: str
    backend: str
    dtype: str
    outcome: str = MEASURED
    note: str = ""
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    error: float | None = None
    extra_bytes: int | None = None
    holders: str = ""
    floor_seconds: float | None = None
    limit: str = ""


Examination = Callable[[AnyCase, Call], dict[str, Any]]
"""What is measured of a call whose answer is right: fields of its row."""


class Bench:
    """Checks and examines contenders one after the other.

    Attributes:
        rows: Rows so far.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._trial: Trial[Any] | None = None

    def run(self, part: str, cases: Iterable[AnyCase], examine: Examination) -> list[Row]:
        """Examine every contender of every case; the rows."""
        before = len(self.rows)
        for case in cases:
            for name in case.contenders:
                self.examine(part, case, name, examine)
        self._trial = None
        return self.rows[before:]

    def examine(self, part: str, case: AnyCase, name: str, examine: Examination) -> Row:
        """Examine the contender `name` of a case, if its answer is right; its row."""
        row = blank(part, case, name)
        with Survived(name) as survived:
            row = replace(row, **self._examined(case, name, examine))
        if survived.outcome:
            row = replace(row, outcome=survived.outcome, note=survived.note)
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def _examined(self, case: AnyCase, name: str, examine: Examination) -> dict[str, Any]:
        trial = self._begun(case)
        call = trial.start(name)
        error = trial.error(name, call())
        if not error <= 1:
            note = f"{error:.3g} times the error allowed"
            return {"error": error, "outcome": WRONG, "note": note}
        return {"error": error, **examine(case, call)}

    def _begun(self, case: AnyCase) -> Trial[Any]:
        if self._trial is None or self._trial.case is not case:
            self._trial = None  # its inputs go before the next ones are made
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._trial = Trial(case)
        return self._trial


def blank(part: str, case: AnyCase, name: str) -> Row:
    """The row of the contender `name` of a case, without a figure."""
    backend = case.contenders[name].backend
    return Row(part, case.name, case.shape, name, backend, dtype_name(case.dtype))


class Survived:
    """Context manager: an error inside becomes a row's note, and the contenders after it are run.

    Compilers, drivers and rivals raise classes of their own that share no base below Exception.
    What is not expected is printed with its traceback.

    Attributes:
        outcome: UNAVAILABLE or FAILED; "" if nothing was raised.
        note: Line that says what was raised.
    """

    def __init__(self, contender: str) -> None:
        self.outcome = self.note = ""
        self._contender = contender

    def __enter__(self) -> Survived:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, (BackendError, UnavailableError)):
            self.outcome, self.note = UNAVAILABLE, reason(self._contender, error)
        elif error is not None and lacks_memory(error):
            self.outcome, self.note = UNAVAILABLE, short(f"{type(error).__name__}: {error}")
        elif isinstance(error, Exception):
            self.outcome, self.note = FAILED, short(f"{type(error).__name__}: {error}")
            traceback.print_exception(error, file=sys.stderr)
        return bool(self.outcome)


def reason(contender: str, problem: Exception) -> str:
    """Why a contender cannot run, in one line."""
    lines = str(problem).splitlines()
    own = [text for text in lines if text.startswith(f"{contender}: ")]
    return short((own or [" ".join(lines)])[0].removeprefix(f"{contender}: "))


def short(text: str) -> str:
    """The beginning of a text, in one line."""
    return " ".join(text.split())[:LONGEST_NOTE]


def timed(
    device: torch.device, ceilings: Ceilings, clock: Callable[[Call, bool], Timing]
) -> Examination:
    """Times, extra memory and the floor.

    Args:
        device: Device of the calls.
        ceilings: Ceilings of this machine.
        clock: Function that times a call; the second argument is `Case.graph`.
    """

    def examine(case: AnyCase, call: Call) -> dict[str, Any]:
        with PeakMemory(device) as memory:
            call()
        timing = clock(call, case.graph)
        floor, limit = (None, "") if case.work is None else ceilings.floor(case.work)
        return {
            "seconds": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "rounds": timing.rounds,
            "extra_bytes": memory.extra_bytes,
            "floor_seconds": floor,
            "limit": limit,
        }

    return examine


def line(row: Row) -> str:
    """A row for people who watch."""
    head = f"{row.part:11} {row.case:28} {row.contender:24}"
    if row.outcome != MEASURED:
        return f"{head} {row.outcome}: {row.note}"
    if row.seconds is not None:
        over = f"{row.seconds / row.floor_seconds:7.2f} x floor" if row.floor_seconds else ""
        return f"{head} {1e3 * row.seconds:10.3f} ms {over}".rstrip()
    if row.extra_bytes is not None:
        return f"{head} {row.extra_bytes / 2**20:10.1f} MiB  {row.holders}".rstrip()
    return f"{head} {row.error:10.2f} of the error allowed, {row.dtype}"
