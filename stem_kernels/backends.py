"""Which backend can run an operator on given tensors, and, where it cannot, why not.

A backend states facts (dtypes, devices, limits). `Backend.reasons` turns them into the list of
reasons why it cannot serve a call; an empty list means that it can.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from . import cuda, triton
from .shared.tangents import carries_tangent

logger = logging.getLogger("stem_kernels")

BACKEND_VARIABLE = "STEM_KERNELS_BACKEND"

Tensors = Mapping[str, "torch.Tensor | None"]


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message lists every reason."""


@dataclass(frozen=True)
class Backend:
    """The facts of one backend.

    Args:
        name: Value of the `backend` argument that selects it.
        dtypes: Dtypes of features, payload, query, key and value that it takes.
        max_bases: Largest number K of bases, or None.
        max_widths: Function of a device: the largest last sizes, by argument name.
        differentiable: Whether autograd passes through it, backward and forward.
        machine: Function: the reasons why it cannot run on this machine at all.
        device: Function of a device: the reasons why it cannot run there.
        auto: Function of a device: the reasons why `backend="auto"` passes it over there though
            it can run.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    max_bases: int | None
    max_widths: Callable[[torch.device], Mapping[str, int]]
    differentiable: bool
    machine: Callable[[], list[str]]
    device: Callable[[torch.device], list[str]]
    auto: Callable[[torch.device], list[str]]

    def reasons(self, tensors: Tensors, num_bases: int | None) -> list[str]:
        """Why this backend cannot run a call on `tensors`; empty if it can.

        An operator without bases has the `num_bases` None, and no backend limits its sizes, or 0,
        and only its widths are limited.
        """
        return self.machine() or self.call_reasons(tensors, num_bases)

    def call_reasons(self, tensors: Tensors, num_bases: int | None) -> list[str]:
        """The same for a machine on which it runs."""
        found: list[str] = []
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        found += _device_reasons(self.device, _devices(present))
        for name, tensor in present.items():
            if tensor.dtype not in self.dtypes:
                names = ", ".join(
                    sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
                )
                found.append(f"{name} is {_dtype_name(tensor)}; it takes {names}")
        if num_bases is not None:
            found += self._size_reasons(present, num_bases)
        if not self.differentiable and torch.is_grad_enabled():
            needing = [name for name, tensor in present.items() if tensor.requires_grad]
            if needing:
                found.append(
                    f"{', '.join(needing)} require(s) grad and it has no backward pass; "
                    'use backend="torch" or torch.no_grad()'
                )
        if not self.differentiable:
            found += self._forward_reasons(present)
        return found

    def _forward_reasons(self, present: Mapping[str, torch.Tensor]) -> list[str]:
        carrying = [name for name, tensor in present.items() if carries_tangent(tensor)]
        if not carrying:
            return []
        return [
            f"{', '.join(carrying)} carry or carries tangents of forward-mode derivatives, which "
            'do not pass through it; use backend="torch"'
        ]

    def _size_reasons(self, present: Mapping[str, torch.Tensor], num_bases: int) -> list[str]:
        found = []
        if self.max_bases is not None and num_bases > self.max_bases:
            found.append(f"{num_bases} bases; it takes at most {self.max_bases}")
        # One question a call, not one a tensor: operators have checked that they share a device.
        widths = self.max_widths(next(iter(present.values())).device) if present else {}
        for name, tensor in present.items() if widths else ():
            most = widths.get(name)
            if most is not None and tensor.shape[-1] > most:
                found.append(f"{name} has {tensor.shape[-1]} channels a head; it takes {most}")
        return found


def _devices(tensors: Tensors) -> list[torch.device]:
    """The devices of tensors, by name where they are several."""
    found: list[torch.device] = []  # making a set of one takes longer
    for tensor in tensors.values():
        if tensor is not None and tensor.device not in found:
            found.append(tensor.device)
    return sorted(found, key=str) if len(found) > 1 else found


def _device_reasons(
    of: Callable[[torch.device], list[str]], devices: list[torch.device]
) -> list[str]:
    return [reason for device in devices for reason in of(device)]


def _any_device(device: torch.device) -> list[str]:
    return []


def _any_width(device: torch.device) -> Mapping[str, int]:
    return {}


_HALF_AND_SINGLE = frozenset({torch.float16, torch.bfloat16, torch.float32})

BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        name="triton",
        dtypes=_HALF_AND_SINGLE,
        max_bases=1024,
        max_widths=triton.max_widths,
        differentiable=False,
        machine=triton.machine_reasons,
        device=triton.device_reasons,
        auto=triton.auto_reasons,
    ),
    "cuda": Backend(
        name="cuda",
        dtypes=_HALF_AND_SINGLE,
        max_bases=1024,
        max_widths=cuda.max_widths,
        differentiable=False,
        machine=cuda.machine_reasons,
        device=cuda.device_reasons,
        auto=cuda.auto_reasons,
    ),
    "torch": Backend(
        name="torch",
        dtypes=_HALF_AND_SINGLE | {torch.float64},
        max_bases=None,
        max_widths=_any_width,
        differentiable=True,
        machine=list,
        device=_any_device,
        auto=_any_device,
    ),
}
"""Every backend, in the order in which `backend="auto"` tries them."""


def named(backend: str) -> bool:
    """Whether the argument `backend`, or the environment, asks for a backend by its name."""
    return backend != "auto" or BACKEND_VARIABLE in os.environ


def select(
    op: str,
    backend: str,
    tensors: Tensors,
    num_bases: int | None,
    refused: Collection[str] = (),
) -> str:
    """The name of the backend that runs this call.

    Args:
        op: Name of the operator, for messages.
        backend: Argument `backend` of the caller. `"auto"` asks the environment variable
            STEM_KERNELS_BACKEND, and where that is not set takes the first that can.
        tensors: Tensors of the call by argument name; None entries are ignored.
        num_bases: Number K of bases of the call; for an operator without them None, or 0 where
            backends limit its widths.
        refused: Names of backends that "auto" does not take.

    Raises:
        ValueError: `backend` is not a backend's name.
        BackendError: a backend was asked for by name and cannot run the call.
    """
    source = "the argument backend"
    if backend == "auto" and BACKEND_VARIABLE in os.environ:
        backend = os.environ[BACKEND_VARIABLE]
        source = f"the environment variable {BACKEND_VARIABLE}"
    if backend != "auto":
        if backend not in BACKENDS:
            names = ", ".join(f'"{name}"' for name in ("auto", *BACKENDS))
            raise ValueError(f'{source} is "{backend}"; it must be one of {names}')
        if BACKENDS[backend].reasons(tensors, num_bases):
            raise BackendError(_refusal(op, backend, tensors, num_bases))
        return backend
    passed_over: list[tuple[str, tuple[str, ...]]] = []
    devices = _devices(tensors)
    for name, candidate in BACKENDS.items():
        if name in refused:
            continue
        # A backend that is not for this device is asked no more: every call comes by here.
        reasons = candidate.machine() or _device_reasons(candidate.device, devices)
        reasons = reasons or candidate.call_reasons(tensors, num_bases)
        reasons = reasons or _device_reasons(candidate.auto, devices)
        if not reasons:
            if passed_over and not torch.compiler.is_compiling():
                on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors.values())
                _log_fallback_once(op, name, tuple(passed_over), on_gpu)
                missed = cuda.missed()
                if missed and not BACKENDS["cuda"].call_reasons(tensors, num_bases):
                    _warn_once(missed)
            return name
        passed_over.append((name, tuple(reasons)))
    raise BackendError(_refusal(op, "auto", tensors, num_bases))


@functools.cache
def _log_fallback_once(
    op: str, name: str, passed_over: tuple[tuple[str, tuple[str, ...]], ...], on_gpu: bool
) -> None:
    # On a CPU the others are what anyone expects; on a GPU it is a loss worth a warning.
    level = logging.WARNING if on_gpu else logging.INFO
    reasons = "; ".join(f"{other}: {', '.join(why)}" for other, why in passed_over)
    logger.log(level, "%s runs on backend %s (%s)", op, name, reasons)


@functools.cache
def _warn_once(missed: str) -> None:
    logger.warning("the operators run in torch, about half as fast as they could: %s", missed)


def _refusal(op: str, backend: str, tensors: Tensors, num_bases: int | None) -> str:
    lines = [f'{op} cannot run with backend="{backend}" on']
    for name, tensor in tensors.items():
        if tensor is not None:
            shape = list(tensor.shape)
            lines.append(f"  {name}: {shape} {_dtype_name(tensor)} on {tensor.device}")
    for name, candidate in BACKENDS.items():
        reasons = candidate.reasons(tensors, num_bases)
        lines.append(f"{name}: {'; '.join(reasons) if reasons else 'can run this call'}")
    return "\n".join(lines)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
