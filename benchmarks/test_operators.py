"""The operators against their rivals with pytest-benchmark: UNet shapes of N = 4 frames.

On a GPU the host's times that pytest-benchmark takes are synchronised, and the device's own stand
beside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stem_kernels.backends import BACKENDS, BackendError

from .cases import Case, UnavailableError
from .operators import COMPILED, EAGER, FLASH_KMEANS, SDPA, attention_case, em_case, soft_em_case
from .timing import time_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
TOKENS = 4 * 64 * 64
BUILDERS: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {
    "em key": (
        lambda: em_case((8, TOKENS, 40), DEVICE, DTYPE, compiled=True),
        (*BACKENDS, EAGER, COMPILED, FLASH_KMEANS),
    ),
    "em feature": (
        lambda: em_case((1, TOKENS, 320), DEVICE, DTYPE, compiled=True),
        (*BACKENDS, EAGER, COMPILED),
    ),
    "soft_em": (
        lambda: soft_em_case((8, TOKENS, 40), DEVICE, DTYPE),
        (*BACKENDS, "eager, without payload", COMPILED),
    ),
    "basis attention": (
        lambda: attention_case(8, TOKENS, 40, DEVICE, DTYPE),
        (*BACKENDS, *SDPA),
    ),
}


@functools.lru_cache(maxsize=1)
def built(name: str) -> Case:
    return BUILDERS[name][0]()


@pytest.mark.parametrize(
    ("name", "contender"),
    [(name, contender) for name, (_, contenders) in BUILDERS.items() for contender in contenders],
)
def test_operator(benchmark: Any, name: str, contender: str) -> None:
    case = built(name)
    benchmark.group = f"{case.name}, {case.shape}"
    try:
        call = case.contenders[contender].start()
        answer = call()
    except (BackendError, UnavailableError) as problem:
        pytest.skip(" ".join(str(problem).split()))
    error = case.error(contender, answer)
    benchmark.extra_info["error_over_allowed"] = error
    assert error <= 1

    def synchronised() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)
    if DEVICE.type == "cuda":
        benchmark.extra_info["device"] = dataclasses.asdict(time_call(call, DEVICE))
