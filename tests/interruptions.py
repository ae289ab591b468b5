"""Runs that are stopped in the middle."""

from __future__ import annotations

import itertools
from collections.abc import Callable


def stop_after(steps: int) -> Callable[[], None]:
    """A function for `on_step` that stops a run as Ctrl-C does, once so many steps are done."""
    done = itertools.count(1)

    def on_step() -> None:
        if next(done) == steps:
            raise KeyboardInterrupt

    return on_step
