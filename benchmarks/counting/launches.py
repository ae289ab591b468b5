"""What a launch on a GPU that is not here would compile: recorded from the launchers themselves.

An operator is called as ever, on tensors in the CPU's memory, while Triton is told of a GPU of some
compute capability. Triton specialises the arguments as it always does (pointers and sizes that are
multiples of 16, sizes that are 1, flags), and instead of compiling and launching it tells us.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import stem_kernels.triton
import stem_kernels.triton.tuning
from stem_kernels.backends import BACKENDS
from stem_kernels.triton.program import forget_programs
from stem_kernels.verification import VERIFY_VARIABLE

DEFAULTS = {"enable_fp_fusion": True}
"""Options that this Triton takes where none are given: with and without, the same is compiled."""
MULTIPROCESSORS = 132
"""Of a GPU that is not here: as many as an H100 has."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        kernel: Kernel, a function under `triton.jit`.
        arch: Compute capability that it is compiled for, such as 90; of AMD's GPUs the
            architecture, such as "gfx942".
        signature: Type of every argument by name; "constexpr" for constants.
        constants: Values of the constants by their places.
        attributes: What is known of the other arguments by their places, such as divisibility.
        options: Options of the launch, such as num_warps.
        grid: Numbers of programs along up to three axes.
        arguments: Values of all arguments by name.
    """

    kernel: Any
    arch: int | str
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, such as "fused"."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def digest(self) -> str:
        """Identity of what is compiled: the sources, whatever their comments, and all of the above
        but sizes that the compiler does not see."""
        told = (
            _source(self.kernel), self.arch, dict(self.signature), dict(self.constants),
            dict(self.attributes), sorted(self.options.items() - DEFAULTS.items()),
        )  # fmt: skip
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def compiled(self) -> Any:
        """The kernel as `triton.compile` gives it, from Triton's cache where it is there."""
        source = self.kernel.ASTSource(
            self.kernel, dict(self.signature), dict(self.constants), dict(self.attributes)
        )
        return triton.compile(source, target=target(self.arch), options=dict(self.options))


def target(arch: int | str) -> GPUTarget:
    """What Triton compiles for."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


@functools.cache
def _source(kernel: Any) -> str:
    """The syntax of a kernel and of all that it calls, without comments and places."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        if function.__name__ in found:
            continue
        tree = ast.parse(function.src)
        found[function.__name__] = ast.dump(tree)
        for node in ast.walk(tree):
            named = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(named, JITFunction):
                waiting.append(named)
            elif isinstance(named, int | float | triton.language.constexpr):
                found[node.id] = repr(named)  # type: ignore[attr-defined]
    return repr(sorted(found.items()))


class _AbsentGPU:
    """What Triton asks of a driver before it compiles. Its caches are kept by device, so a device's
    number is its compute capability."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)


@contextmanager
def absent_gpu(arch: int | str, stand_in: Any) -> Iterator[None]:
    """Within it, tensors that are on no GPU are served by Triton, as on a GPU.

    Args:
        arch: Compute capability of that GPU, such as 90, or AMD's architecture.
        stand_in: Driver that Triton gets in place of CUDA's.
    """

    amd = arch if isinstance(arch, str) else None

    def capability(device: object) -> tuple[int, int]:
        assert isinstance(arch, int)
        return divmod(arch, 10)

    def amd_architecture(device: object) -> str | None:
        return amd

    def multiprocessors(device: object) -> int:
        return MULTIPROCESSORS

    present = replace(BACKENDS["triton"], device=lambda device: [])
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(driver, "_active", stand_in),
            mock.patch.object(stem_kernels.triton, "device_capability", capability),
            mock.patch.object(stem_kernels.triton.tuning, "device_capability", capability),
            mock.patch.object(stem_kernels.triton.tuning, "multiprocessors", multiprocessors),
            mock.patch.object(stem_kernels.triton.tuning, "amd_architecture", amd_architecture),
            mock.patch.dict(BACKENDS, triton=present),
            # Nothing is computed that could be compared.
            mock.patch.dict(os.environ, {VERIFY_VARIABLE: "never"}),
        ):
            stack.enter_context(patch)
        # What was prepared for another GPU, or for none, is not for this one.
        forget_programs()
        stack.callback(forget_programs)
        yield


@contextmanager
def recorded(arch: int | str) -> Iterator[list[Launch]]:
    """Within it, operators with `backend="triton"` compute nothing; their launches are listed."""
    found: list[Launch] = []
    run = JITFunction.run

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        arguments = inspect.signature(kernel.fn).bind(
            *args, **{name: kwargs[name] for name in kwargs if name in kernel.arg_names}
        )
        options = {name: kwargs[name] for name in kwargs if name not in kernel.arg_names}

        def hook(*, compile: Mapping[str, Any], **_: Any) -> bool:
            (attributes,) = compile["configs"]
            found.append(
                Launch(
                    kernel, arch, compile["signature"], compile["constants"], attributes, options,
                    tuple(grid), arguments.arguments,
                )
            )  # fmt: skip
            return True

        with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with absent_gpu(arch, _AbsentGPU(arch)), mock.patch.object(JITFunction, "run", noted):
        yield found


def launches(arch: int | str, call: Callable[[], object]) -> list[Launch]:
    """The launches of one call of operators."""
    with recorded(arch) as found:
        call()
    return found
