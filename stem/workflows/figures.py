"""Figures of an edit, each with what it was measured by, or what is missing for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ..metrics import UnmeasuredError

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One metric of one edit.

    Args:
        metric: Name of the metric, with its factor or unit.
        value: Value; None where it could not be measured.
        measured_by: Variant, model or flow that it depends on. Figures of the same metric belong
            in one column only where this is the same.
        higher_is_better: Whether more is better.
        missing: Why there is no value, such as weights that are not here; empty where there is.
        remedy: Command or advice that gets the value; empty where there is one.
    """

    metric: str
    value: float | None
    measured_by: str
    higher_is_better: bool
    missing: str = ""
    remedy: str = ""


@dataclass
class Sheet:
    """Figures so far.

    Args:
        figures: Figures, in their order.
    """

    figures: list[Figure] = field(default_factory=list)

    def add(
        self,
        metric: str,
        measured_by: str,
        compute: Callable[[], float],
        higher_is_better: bool = True,
    ) -> float | UnmeasuredError:
        """Add a figure, with or without a value; gives what `given` takes.

        Args:
            metric: Name of the metric.
            measured_by: What it is measured by.
            compute: Function that gives the value, or raises UnmeasuredError.
            higher_is_better: Whether more is better.
        """
        found = attempt(compute)
        if isinstance(found, UnmeasuredError):
            figure = Figure(metric, None, measured_by, higher_is_better, found.reason, found.remedy)
        else:
            figure = Figure(metric, found, measured_by, higher_is_better)
        self.figures.append(figure)
        return found


def attempt(compute: Callable[[], T]) -> T | UnmeasuredError:
    """What several figures share, or why they have none."""
    try:
        return compute()
    except UnmeasuredError as error:
        return error


def given(found: T | UnmeasuredError) -> T:
    """What `attempt` found; raises UnmeasuredError where that is why there is nothing."""
    if isinstance(found, UnmeasuredError):
        # A new one: each raising of the same would keep the videos of its callers alive.
        raise UnmeasuredError(found.reason, found.remedy)
    return found
