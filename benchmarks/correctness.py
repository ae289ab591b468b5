"""Every operator on every backend against float64: error, equal bits, and a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from stem_kernels.backends import BACKENDS, BackendError

from .cases import Case, Outputs, Row, reason
from .operators import attention_case, em_case

WIDTHS = (40, 64, 80, 160, 320, 640, 1280)
HEAD_WIDTHS = (40, 64, 80, 160)
OTHER_BASES = ((255, 16), (1000, 300))  # tokens and K of the odd shapes


def cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Shapes of every kernel's kind."""
    tokens = 300 if small else 4097
    for width in (40, 320) if small else WIDTHS:
        yield em_case((2, tokens, width), device, dtype)
    for width in HEAD_WIDTHS[:1] if small else HEAD_WIDTHS:
        yield attention_case(3, tokens, width, device, dtype)
    for count, num_bases in OTHER_BASES:
        yield em_case((2, count, 40), device, dtype, num_bases=num_bases)
        yield em_case((1, count, 320), device, dtype, num_bases=num_bases)
        yield attention_case(3, count, 80, device, dtype, num_bases=num_bases)


def check_all(device: torch.device, *, small: bool) -> list[Row]:
    """One row per backend, case and dtype."""
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in cases(device, dtype, small=small):
            for backend in BACKENDS:
                rows.append(_row(case, backend, dtype, device))
    bad = [row for row in rows if row.wrong]
    ran = [row for row in rows if row.error is not None]
    print(f"correctness: {len(ran)} checks, {len(bad)} wrong", flush=True)
    for row in bad:
        print(f"  {row.case} {row.shape} {row.dtype} {row.contender}: {row.note}", flush=True)
    return rows


def _row(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Row:
    bare = Row("correctness", case.name, case.shape, backend, str(dtype).removeprefix("torch."))
    try:
        call = case.contenders[backend].start()
        answer = call()
    except BackendError as problem:
        return replace(bare, note=reason(backend, problem))
    error = case.error(backend, answer)
    if not error <= 1:
        return replace(bare, error=error, wrong=True, note=f"{error:.3g} times the error allowed")
    if not _equal(answer, call()):
        return replace(bare, error=error, wrong=True, note="two equal calls gave different bits")
    if device.type == "cuda" and not _equal(answer, _replayed(call)):
        return replace(bare, error=error, wrong=True, note="a CUDA graph gave other bits")
    return replace(bare, error=error)


def _equal(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _replayed(call: Callable[[], Outputs]) -> Outputs:
    """The outputs of a captured graph of `call`, poisoned before the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return outputs
