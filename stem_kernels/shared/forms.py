"""Kernel forms: which of them this process has launched, found right, or found wrong.

A form is all that selects another compiled kernel: a hashable value that starts with the device and
the kernel's name. Backends tell of a form before they launch it (`enter`); who called them finds
in `entered` what is not settled yet, and settles or refuses it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

MOST_TRIES = 8
"""Calls in which there may be nothing to compare, or no memory for it, before a form counts as
settled all the same."""


class RefusedFormError(RuntimeError):
    """A kernel form that was found wrong before is not launched again; the message says why."""


class _Calls(threading.local):
    suspended = False

    def __init__(self) -> None:
        self.entered: list[Hashable] = []


_calls = _Calls()
_settled: set[Hashable] = set()
_refused: dict[Hashable, str] = {}
_tries: dict[Hashable, int] = {}
_passed_over: dict[str, tuple[str, ...]] = {}


def enter(form: Hashable) -> bool:
    """Tell that `form` is about to be launched; whether it is settled.

    Raises:
        RefusedFormError: it was found wrong before.
    """
    if form in _settled:
        return True
    if not _calls.suspended:
        if form in _refused:
            raise RefusedFormError(_refused[form])
        if form not in _calls.entered:  # graphs of torch.compile never empty it
            _calls.entered.append(form)
    return False


def entered() -> list[Hashable]:
    """The forms that this thread has entered and that were not settled, emptied of earlier calls'.

    It is the very list that grows: who calls a backend asks for it before, and looks after.
    """
    found = _calls.entered
    if found:
        found.clear()
    return found


@contextmanager
def suspended() -> Iterator[None]:
    """Within it this thread's forms are neither kept in `entered` nor refused."""
    before, _calls.suspended = _calls.suspended, True
    try:
        yield
    finally:
        _calls.suspended = before


def settle(forms: list[Hashable]) -> None:
    """These forms are right."""
    _settled.update(forms)


def refuse(forms: list[Hashable], reason: str) -> None:
    """These forms are wrong: entering one raises `RefusedFormError` from now on."""
    _refused.update(dict.fromkeys(forms, reason))


def put_off(forms: list[Hashable]) -> None:
    """A call could not be compared; the next one may be. Settled after `MOST_TRIES` such calls."""
    for form in forms:
        _tries[form] = _tries.get(form, 0) + 1
        if _tries[form] >= MOST_TRIES:
            _settled.add(form)


def pass_over(op: str, backend: str) -> None:
    """`backend` has a wrong form of an operator: graphs of torch.compile do not take it for that.

    They are never compared, and cannot go on with another backend when they run.
    """
    _passed_over[op] = tuple(dict.fromkeys((*passed_over(op), backend)))


def passed_over(op: str) -> tuple[str, ...]:
    """The backends that graphs do not take for an operator."""
    return _passed_over.get(op, ())


def forget() -> None:
    """Nothing is known of any form any more."""
    for known in (_settled, _refused, _tries, _passed_over):
        known.clear()
