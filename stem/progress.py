"""How far a run has come: a bar on a terminal, a line in the log now and then elsewhere.

A process that started this one may name a file in the environment variable STEM_PROGRESS; every
step is told there, too.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm.auto import tqdm

logger = logging.getLogger("stem")

_SECONDS = 30.0
_PERCENT = 10.0
_LEAST_SECONDS = 2.0  # a run that takes seconds needs no lines
TOLD_FILE = "STEM_PROGRESS"
"""Environment variable with the path of a file that gets a line of JSON at a run's start and after
each of its steps: its name, the steps done before, done and in all, and seconds since its start."""


class Progress(Protocol):
    """What is told of every step done."""

    def update(self) -> object:
        """Count one more step."""


@contextlib.contextmanager
def steps(total: int, *, initial: int = 0, name: str, show: bool = True) -> Iterator[Progress]:
    """Show the steps of a `with` block, in which `update()` is called after each of them.

    On a terminal this is a progress bar. Elsewhere the log says with INFO, every tenth of the
    steps or every 30 seconds, how many are done and how long the rest will take.

    Args:
        total: Number of all steps.
        initial: Number of steps that were done before; time is measured without them.
        name: Name of the run.
        show: Whether to show anything.
    """
    told = os.environ.get(TOLD_FILE)
    if show and told:
        yield _Told(told, total, initial, name)
    elif show and sys.stderr.isatty():
        with tqdm(total=total, initial=initial, desc=name) as bar:
            yield bar
    else:
        yield _Lines(total, initial, name, show)


class _Told:
    def __init__(self, path: str, total: int, initial: int, name: str) -> None:
        self._path, self._total, self._initial, self._name = path, total, initial, name
        self._done, self._start = initial, time.monotonic()
        self._tell()

    def update(self) -> None:
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        told = {"name": self._name, "before": self._initial, "done": self._done}
        told |= {"total": self._total, "seconds": time.monotonic() - self._start}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


class _Lines:
    def __init__(self, total: int, initial: int, name: str, show: bool) -> None:
        self._total, self._initial, self._done = total, initial, initial
        self._name, self._show = name, show
        self._start = time.monotonic()
        self._said, self._said_at = initial, self._start

    def update(self) -> None:
        self._done += 1
        now = time.monotonic()
        waited = now - self._said_at
        further = 100 * (self._done - self._said) / self._total
        due = waited >= _SECONDS or (further >= _PERCENT and waited >= _LEAST_SECONDS)
        if not self._show or not due or self._done == self._total:
            return
        self._said, self._said_at = self._done, now
        left = (now - self._start) / (self._done - self._initial) * (self._total - self._done)
        logger.info(
            "%s: %d of %d steps, %s left",
            self._name,
            self._done,
            self._total,
            datetime.timedelta(seconds=round(left)),
        )
