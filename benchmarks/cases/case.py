"""What a benchmark compares: contenders that answer one question, and a check of every answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from stem_kernels.backends import BACKENDS
from stem_kernels.testing import max_error, parity_bound

from .floors import Work

Outputs = tuple[torch.Tensor, ...]
Call = Callable[[], Outputs]
Check = Callable[[Outputs], float]
"""The error of an answer over the error allowed; above 1 it is wrong."""
Inputs = TypeVar("Inputs")


class UnavailableError(RuntimeError):
    """A contender that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Contender(Generic[Inputs]):
    """One way to answer.

    Args:
        start: Function that makes ready (compiles, say), and returns the call to time.
        check: Error of an answer over the error allowed, for contenders whose right answer is
            another; None: the case's check.
        backend: Argument that the call gives as `backend`; "" where it has none.
    """

    start: Callable[[Inputs], Call]
    check: Callable[[Inputs, Outputs], float] | None = None
    backend: str = ""


@dataclass(frozen=True)
class Case(Generic[Inputs]):
    """One question; it holds no tensor until a Trial makes its inputs.

    Args:
        name: Identity in files of results, such as "em key d=40".
        shape: Sizes, for people.
        dtype: Type of the inputs.
        inputs: Function that makes what all contenders are given.
        contenders: Ways to answer, by name.
        check: Function that finds the right answer to the inputs; None where every contender has
            a check of its own.
        work: Work that no contender can avoid; None where it is not counted.
        graph: Whether replays of a CUDA graph are timed; for calls shorter than their launches.
    """

    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    contenders: Mapping[str, Contender[Inputs]]
    check: Callable[[Inputs], Check] | None = None
    work: Work | None = None
    graph: bool = False


AnyCase = Case[Any]


class Trial(Generic[Inputs]):
    """A case with its inputs."""

    def __init__(self, case: Case[Inputs]) -> None:
        self.case = case
        self._inputs = case.inputs()
        self._check: Check | None = None

    def start(self, name: str) -> Call:
        """Make the contender `name` ready; the call to time."""
        return self.case.contenders[name].start(self._inputs)

    def error(self, name: str, answer: Outputs) -> float:
        """Error of an answer of the contender `name` over the error allowed."""
        own = self.case.contenders[name].check
        if own is not None:
            return own(self._inputs, answer)
        if self._check is None:
            assert self.case.check is not None
            self._check = self.case.check(self._inputs)
        return self._check(answer)


def ours(call: Callable[[Inputs, str], Outputs]) -> dict[str, Contender[Inputs]]:
    """A contender for every backend; `call` takes the inputs and the backend's name."""

    def contender(backend: str) -> Contender[Inputs]:
        return Contender(lambda inputs: lambda: call(inputs, backend), backend=backend)

    return {backend: contender(backend) for backend in BACKENDS}


def ready(call: Callable[[Inputs], Outputs]) -> Contender[Inputs]:
    """A contender that needs no making ready."""
    return Contender(lambda inputs: lambda: call(inputs))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type without the package's, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def finite(inputs: object, answer: Outputs) -> float:
    """A contender's check that wants finite numbers only: 0, or inf."""
    return 0.0 if all(bool(part.isfinite().all()) for part in answer) else float("inf")


def parity(
    exact: Outputs, same: Outputs, rounding: dict[torch.dtype, float], largest_logit: float = 0.0
) -> Check:
    """A check against float64.

    Args:
        exact: Float64 results, perhaps of the first entries of the leading axis only.
        same: Results of plain torch in the dtype under test.
        rounding: Tolerances, see `stem_kernels.testing.parity_bound`.
        largest_logit: Largest |S|, see there.
    """
    bounds = [
        parity_bound(right, alike, rounding, largest_logit)
        for right, alike in zip(exact, same, strict=True)
    ]

    def check(answer: Outputs) -> float:
        return max(
            max_error(part[: right.shape[0]], right) / bound
            for part, right, bound in zip(answer, exact, bounds, strict=True)
        )

    return check
