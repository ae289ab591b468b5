"""The kernels of a part, compiled before its clock runs, by a process on each core.

Triton keeps what it compiles on disk, where the process that measures finds it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stem_kernels.triton import device_capability, machine_reasons

from ..cases.bench import Survived
from . import correctness


def compile_ahead(
    part: str, device: torch.device, *, small: bool, said: Callable[[], None]
) -> None:
    """Compile what the Triton backend launches in a part of the suite, on a GPU of NVIDIA's.

    A kernel that does not compile is found again by the contender that launches it.

    Args:
        part: Name of the part.
        device: GPU that it will be measured on.
        small: Whether the sizes are toys.
        said: Function that is called after every kernel.
    """
    if machine_reasons() or torch.version.hip is not None:
        return
    major, minor = device_capability(device)
    arch = 10 * major + minor
    count = len(wanted(part, arch, small))
    workers = min(count, len(os.sched_getaffinity(0)))
    # A process that CUDA has started in cannot be forked.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(compile_one, part, arch, small, place) for place in range(count)]
        for done in as_completed(waiting):
            with Survived("compiling ahead"):
                done.result()
            said()


def compile_one(part: str, arch: int, small: bool, place: int) -> None:
    """Compile one of the launches that a part wants."""
    wanted(part, arch, small)[place].compiled()


@functools.cache
def wanted(part: str, arch: int, small: bool) -> Sequence[Any]:
    """Launches of kernels that differ, on a GPU of capability `arch`, in the same order always."""
    from ..counting.launches import launches

    found: dict[str, Any] = {}
    with torch.no_grad(), Recorded():
        for _, call in calls(part, small=small):
            for launch in launches(arch, call):
                found.setdefault(launch.digest(), launch)
    return list(found.values())


def calls(part: str, *, small: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the Triton backend that launch all that a part launches, on tensors without data,
    by name."""
    from ..counting.forms import forms

    if part != "correctness":
        for form in forms(torch.float16):
            yield form.name, form.call
        return
    with torch.device("meta"):
        for case in correctness.cases(torch.device("meta"), small=small):
            yield case.name, case.contenders["triton"].start(case.inputs())


class Recorded(TorchDispatchMode):
    """Within it, operators of the Triton backend are called on tensors without data, too."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        from stem_kernels.triton.registration import functions

        if func not in functions:
            return func(*args, **(kwargs or {}))
        with self:
            return functions[func](*args, **(kwargs or {}))
