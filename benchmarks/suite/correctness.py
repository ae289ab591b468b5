"""Every operator on every backend against float64: error, equal bits, and a captured graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from stem_kernels.backends import BACKENDS

from ..cases.attention import attention_case, partial_case
from ..cases.bench import WRONG, Examination
from ..cases.case import AnyCase, Call, Outputs
from ..cases.editing import blended_case, nearest_case
from ..cases.em import em_case
from ..cases.operators import HEAD_WIDTHS, targeted

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (40, 64, 80, 160, 320, 640, 1280)
OTHER_BASES = ((255, 16), (1000, 300))  # tokens and K of the odd shapes


def cases(device: torch.device, *, small: bool) -> Iterator[AnyCase]:
    """The shapes that targets are about in half precision, then those of every kernel's kind."""
    few = (of_kinds(device, dtype, small=small) for dtype in DTYPES)
    for case in itertools.chain(targeted(device, DTYPES[0], small=small), *few):
        yield replace(case, contenders={name: case.contenders[name] for name in BACKENDS})


def of_kinds(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """Few tokens, odd numbers of them, of every width and operator."""
    tokens = 300 if small else 4097
    for width in (40, 320) if small else WIDTHS:
        yield em_case((2, tokens, width), device, dtype)
    for width in HEAD_WIDTHS[:1] if small else HEAD_WIDTHS:
        yield attention_case(3, tokens, width, device, dtype)
        yield blended_case(3, tokens, width, device, dtype)
        yield partial_case(3, 100, tokens, width, device, dtype)
    for width in (40,) if small else (40, 320, 1280):
        yield nearest_case(tokens, 300, width, device, dtype)
    for count, num_bases in OTHER_BASES:
        yield em_case((2, count, 40), device, dtype, num_bases=num_bases)
        yield em_case((1, count, 320), device, dtype, num_bases=num_bases)
        yield attention_case(3, count, 80, device, dtype, num_bases=num_bases)


def repeatable(device: torch.device) -> Examination:
    """Whether equal calls, and on a GPU a captured graph, give equal bits."""

    def examine(case: AnyCase, call: Call) -> dict[str, Any]:
        answer = call()
        if not _equal(answer, call()):
            return {"outcome": WRONG, "note": "two equal calls gave different bits"}
        if device.type == "cuda" and not _equal(answer, _replayed(call)):
            return {"outcome": WRONG, "note": "a CUDA graph gave other bits"}
        return {}

    return examine


def _equal(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _poison(dtype: torch.dtype) -> float:
    """A number that no operator answers."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _replayed(call: Call) -> Outputs:
    """The outputs of a captured graph of `call`, poisoned before the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for output in outputs:
        output.fill_(_poison(output.dtype))
    graph.replay()
    torch.cuda.synchronize()
    return outputs
