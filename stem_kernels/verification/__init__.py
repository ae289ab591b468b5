"""Proof on the spot: the first launch of each kernel form is compared with the torch backend.

A form (see `shared.forms`) is what selects another compiled kernel on a device. `run` calls an
operator on the backend that is chosen for it. Where that launches a form for the first time in this
process, a part of the very call is computed again by torch, in float64. Where they disagree, or
where the launch raises, the form is refused: `backend="auto"` warns once and goes on with the next
backend, and a backend that was asked for by name raises.

Nothing is compared where it could not be (while torch.compile traces, with fake tensors, under a
dispatch mode) or would wait for the device where that must not be (while a CUDA graph is captured):
the next eager call of the form is compared then. Graphs of torch.compile are never compared.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..backends import BackendError, Tensors, named, select
from ..shared import forms
from ..shared.memory import lacks_memory
from .comparison import Comparison
from .report import said

logger = logging.getLogger("stem_kernels")

VERIFY_VARIABLE = "STEM_KERNELS_VERIFY"
POLICIES = ("first", "always", "never")

Out = TypeVar("Out")


def policy() -> str:
    """When launches are compared, from the environment: "first", "always" or "never".

    Raises:
        ValueError: the variable has another value.
    """
    value = os.environ.get(VERIFY_VARIABLE, POLICIES[0])
    if value not in POLICIES:
        names = ", ".join(f'"{name}"' for name in POLICIES)
        raise ValueError(
            f'the environment variable {VERIFY_VARIABLE} is "{value}"; it must be one of {names}'
        )
    return value


def run(
    op: str,
    backend: str,
    tensors: Tensors,
    num_bases: int | None,
    on: Callable[[str], Out],
    check: Callable[[Out, str], Sequence[Comparison] | None],
) -> Out:
    """The result of an operator, from a backend whose kernels are proved or being proved.

    Args:
        op: Name of the operator, for messages.
        backend: Argument `backend` of the caller.
        tensors: Tensors of the call by argument name.
        num_bases: Number of bases, as for `backends.select`.
        on: Function of a backend's name: the result by that backend.
        check: Function of a result and its backend's name: comparisons with torch on a part of
            the call; None where the call has nothing that can be compared. It may call `on`.

    Returns:
        What `on` returned, the same bits whether compared or not.

    Raises:
        BackendError: a backend that was asked for by name gives wrong results or cannot launch.
        ValueError, BackendError: as `backends.select`; the variable STEM_KERNELS_VERIFY.
    """
    # Graphs are never compared: they take no backend that an eager call found wrong.
    compiling = torch.compiler.is_compiling() and not named(backend)
    refused = forms.passed_over(op) if compiling else ()
    while True:
        chosen = select(op, backend, tensors, num_bases, refused)
        if chosen == "torch" or torch.compiler.is_compiling():
            return on(chosen)
        entered = forms.entered()
        wrong: Comparison | Exception | None
        try:
            out = on(chosen)
            if not entered:
                return out
            fresh = entered[:]  # what a comparison launches beside is no part of it
            wrong = _wrong(fresh, tensors, lambda: check(out, chosen))  # noqa: B023
            if wrong is None:
                return out
        except Exception as error:
            # Memory that is lacking, and a policy that is none, are no fault of the kernel.
            known = isinstance(error, forms.RefusedFormError)
            fresh = entered[:]
            if not known and (not fresh or lacks_memory(error)):
                raise
            if policy() == "never":
                raise
            wrong = error
        known = isinstance(wrong, forms.RefusedFormError)
        fault = str(wrong) if known else said(op, chosen, tensors, wrong)
        if not known:
            forms.refuse(fresh, fault)
        if named(backend):
            raise BackendError(fault) from (wrong if isinstance(wrong, Exception) else None)
        if not known:
            logger.warning('%s\n  backend="auto" goes on with the next backend.', fault)
            forms.pass_over(op, chosen)
        refused = (*refused, chosen)


def _wrong(
    fresh: list[Hashable],
    tensors: Tensors,
    check: Callable[[], Sequence[Comparison] | None],
) -> Comparison | Exception | None:
    """What is wrong with a call that launched these forms; settles them where nothing is."""
    when = policy()
    if when == "never":
        forms.settle(fresh)
        return None
    if not _comparable(tensors):
        return None
    device = next(tensor for tensor in tensors.values() if tensor is not None).device
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = check()
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        found = None  # the part did not fit beside the call; that of the next one may
    if not found:
        if when == "first":
            forms.put_off(fresh)
        return None
    worst = max(found, key=lambda one: one.ratio())
    if worst.ratio() > 1:
        return worst
    if when == "first":
        forms.settle(fresh)
    return None


def _comparable(tensors: Tensors) -> bool:
    """Whether there are values to compare now, and waiting for them is allowed and unseen."""
    present = [tensor for tensor in tensors.values() if tensor is not None]
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in present)
    if not plain or any(tensor.is_meta for tensor in present):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    on_gpu = any(tensor.is_cuda for tensor in present)
    return not (on_gpu and torch.cuda.is_current_stream_capturing())
