"""The operators' cases at the shapes of Stable Diffusion 1.5's layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .attention import attention_case, projected_case
from .case import AnyCase, dtype_name
from .editing import blended_case, nearest_case
from .em import COMPILED, EAGER, LEAN_EAGER, em_case, soft_em_case

TOKENS = 131072  # of 32 frames of 64x64
CPU_TOKENS = 16384  # of 4
HEAD_WIDTHS = (40, 64, 80, 160)
HALVES = (torch.bfloat16, torch.float16)


def targeted(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """The shapes that targets are about, at N = 32 frames; `small`: toys of their kinds."""
    if small:
        yield em_case((2, 512, 40), device, dtype, compiled=True)
        yield em_case((1, 512, 320), device, dtype)
        yield attention_case(2, 512, 40, device, dtype)
        return
    yield em_case((8, TOKENS, 40), device, dtype, compiled=True)
    yield em_case((1, TOKENS, 320), device, dtype, compiled=True)
    for width in HEAD_WIDTHS:
        yield attention_case(8, TOKENS, width, device, dtype)
    yield em_case((8, TOKENS, 64), device, dtype)


def cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """Every operator, the targets' shapes first; `small`: of toys."""
    yield from targeted(device, dtype, small=small)
    if small:
        yield soft_em_case((2, 512, 40), device, dtype, rivals=(EAGER,), payload=True)
        yield nearest_case(512, 256, 40, device, dtype)
        yield blended_case(2, 512, 40, device, dtype)
        return
    yield soft_em_case((8, TOKENS, 40), device, dtype, rivals=(EAGER, COMPILED), payload=True)
    for width in HEAD_WIDTHS:
        yield blended_case(8, TOKENS, width, device, dtype)
    # A chunk of 8 frames against its pivot and the one before.
    yield nearest_case(TOKENS // 4, 8192, 320, device, dtype)
    yield nearest_case(TOKENS // 16, 2048, 640, device, dtype)
    for width in (80, 160):
        yield em_case((8, TOKENS, width), device, dtype)
    for width, share in ((640, 4), (1280, 16)):
        yield em_case((1, TOKENS // share, width), device, dtype)


def cpu_cases() -> Iterator[AnyCase]:
    """Every operator at N = 4 frames, and EM at the shape of the CPU's targets."""
    cpu, single = torch.device("cpu"), torch.float32
    yield em_case((8, CPU_TOKENS, 40), cpu, single, compiled=True)
    yield em_case((1, CPU_TOKENS, 320), cpu, single, compiled=True)
    yield soft_em_case((8, CPU_TOKENS, 40), cpu, single, rivals=(EAGER, COMPILED), payload=True)
    yield soft_em_case((8, 2 * CPU_TOKENS, 40), cpu, single, rivals=(EAGER, LEAN_EAGER))
    for width, share in ((320, 1), (640, 4), (1280, 16)):
        yield soft_em_case((1, CPU_TOKENS // share, width), cpu, single)
    for width in (40, 80, 160):
        yield attention_case(8, CPU_TOKENS, width, cpu, single)
        yield blended_case(8, CPU_TOKENS, width, cpu, single)
        yield projected_case(8, CPU_TOKENS * 1600 // width**2, width, cpu, single)
    for tokens in (4096, 8192):
        yield nearest_case(tokens, 2048, 320, cpu, single)
    for dtype in HALVES:
        yield from half_cases(dtype)


def half_cases(dtype: torch.dtype) -> Iterator[AnyCase]:
    """EM and attention in a half precision, the extension against the torch backend alone."""
    cpu = torch.device("cpu")
    several: list[AnyCase] = [
        soft_em_case((8, 2 * CPU_TOKENS, 40), cpu, dtype),
        soft_em_case((1, CPU_TOKENS, 320), cpu, dtype),
        attention_case(8, CPU_TOKENS, 40, cpu, dtype),
        attention_case(8, CPU_TOKENS, 80, cpu, dtype),
        projected_case(8, CPU_TOKENS, 40, cpu, dtype),
    ]
    for case in several:
        both = {name: case.contenders[name] for name in ("cuda", "torch")}
        yield replace(case, name=f"{case.name} {dtype_name(dtype)}", contenders=both)
