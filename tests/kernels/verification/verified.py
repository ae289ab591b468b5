"""Calls whose kernels are compared at their first launch, for the tests of that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from stem_kernels import (
    BackendError,
    basis_attention,
    blended_attention,
    cuda,
    em_statistics,
    em_update,
    nearest_token,
    soft_em,
)
from stem_kernels.ops.calibration import moments
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.projected_attention import projected_attention
from stem_kernels.ops.soft_em import attended_bases
from stem_kernels.shared import forms
from stem_kernels.testing import clustered_tokens, max_error
from stem_kernels.video import video_attention, window_attention

Outputs = tuple[torch.Tensor, ...]
BACKEND = "triton" if INTERPRETED else "cuda"
"""The backend whose kernels are made wrong."""
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and cuda.load_error("cpu") is not None, reason="there is no extension"
)
in_triton = pytest.mark.skipif(not INTERPRETED, reason="its launches are Triton's")
in_extension = pytest.mark.skipif(
    INTERPRETED or cuda.load_error("cpu") is not None, reason="its results are the extension's"
)


def forget() -> None:
    forms.forget()
    if INTERPRETED:
        from stem_kernels.triton.program import forget_programs

        forget_programs()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(dtype)


def attend(backend: str, dtype: torch.dtype = torch.float16, num_bases: int = 48) -> Outputs:
    query = drawn(2, 3, 70, 40, dtype=dtype)
    key, value = (drawn(2, 3, num_bases, 40, seed=seed, dtype=dtype) for seed in (1, 2))
    return (basis_attention(query, key, value, bias=BIAS[:, :num_bases], backend=backend),)


BIAS = torch.linspace(-2, 2, 3 * 48).view(3, 48)


def attend_without_bias(backend: str) -> Outputs:
    query, key, value = (drawn(2, 3, n, 40, seed=n, dtype=torch.float16) for n in (70, 48, 49))
    return (basis_attention(query, key, value[:, :, :48], backend=backend),)


def attend_in_tiles(backend: str) -> Outputs:
    return attend(backend, torch.float32)


def attend_corrected(backend: str) -> Outputs:
    query = drawn(2, 3, 70, 40, dtype=torch.float16)
    key, value = (drawn(2, 3, 48, 40, seed=seed, dtype=torch.float16) for seed in (1, 2))
    more = {"correction": 0.05 * drawn(1, 3, 41, 40, seed=3), "query_mean": drawn(1, 3, 40, seed=4)}
    return (basis_attention(query, key, value, **more, backend=backend),)


def blend(backend: str) -> Outputs:
    queries = [drawn(1, 2, 70, 40, seed=seed) for seed in (0, 1)]
    keys = [drawn(1, 2, 20, 40, seed=seed) for seed in (2, 3)]
    mask = torch.linspace(-0.2, 1.2, 70).clamp(0, 1)[None]
    value = drawn(1, 2, 20, 40, seed=4)
    return (
        blended_attention(queries[0], keys[0], queries[1], keys[1], value, mask, backend=backend),
    )


def attend_projected(backend: str) -> Outputs:
    features, to_query, to_output = drawn(2, 70, 48), drawn(80, 48, seed=1), drawn(24, 80, seed=2)
    key, value = (drawn(1, 2, 20, 40, seed=seed) for seed in (3, 4))
    found = projected_attention(
        features, 0.2 * to_query, key, value, 0.2 * to_output, query_bias=to_query[:, 0],
        output_bias=to_output[:, 0], bias=BIAS[:2, :20],
        correction=0.1 * drawn(1, 2, 41, 40, seed=5), query_mean=drawn(2, 2, 40, seed=6),
        backend=backend,
    )  # fmt: skip
    return (found,)


def attend_partly(backend: str) -> Outputs:
    query, key, value = (drawn(1, 2, n, 40, seed=n) for n in (20, 600, 601))
    return tuple(partial_attention(query, key, value[:, :, :600], backend=backend))


def find_nearest(backend: str) -> Outputs:
    return (nearest_token(drawn(2, 70, 40), drawn(2, 50, 40, seed=1), backend=backend),)


def narrow_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Views, so that what lies behind the tokens is memory of ours."""
    return drawn(2, 300, 40, dtype=torch.float16)[:, :250], drawn(2, 300, 24, seed=1).half()[
        :, :250
    ]


def summed(backend: str) -> Outputs:
    features, payload = narrow_tokens()
    bases = features[:, ::20].float()
    found = em_statistics(features, bases, temperature=0.5, payload=payload, backend=backend)
    assert found.payload_sums is not None
    return found.sums, found.mass, found.payload_sums


def summed_wide(backend: str) -> Outputs:
    features = drawn(1, 300, 200, dtype=torch.float16)
    found = em_statistics(features, features[:, ::20].float(), temperature=0.5, backend=backend)
    return found.sums, found.mass


def iterated(backend: str) -> Outputs:
    features, payload = narrow_tokens()
    found = attended_bases(
        features, 12, num_iters=2, temperature=0.5, payload=payload, proportional=True,
        backend=backend,
    )  # fmt: skip
    assert found.found.payload is not None
    assert found.bias is not None
    return *found.found[:2], found.found.mass, found.bases, found.bias


def kept_empty(backend: str) -> Outputs:
    features, _ = narrow_tokens()
    bases = features[:, ::20].float()
    bases[:, :2] = -9.0
    found = soft_em(1 + features, bases, num_iters=1, temperature=0.1, backend=backend)
    return found.bases, found.mass


def updated(backend: str) -> Outputs:
    sums, bases = drawn(2, 30, 40), drawn(2, 30, 40, seed=1)
    found = em_update(sums, 1 + sums[..., 0].abs(), bases, num_tokens=70, backend=backend)
    return found.bases, found.mass


def correct(backend: str) -> Outputs:
    query, key, value, base_key, base_value = (
        drawn(1, 2, n, 40, seed=n, dtype=torch.float16) for n in (70, 130, 131, 19, 20)
    )
    features = drawn(1, 130, 48, dtype=torch.float16)
    bases = features[:, ::7].float()
    found = moments(
        2 * query, features, key, value[:, :, :130], bases, base_key, base_value[:, :, :19],
        temperature=0.5, backend=backend,
    )  # fmt: skip
    return found.correction, found.query_mean


def attend_nearby(backend: str) -> Outputs:
    query, key, value = (drawn(1, 2, 18, 16, seed=seed, dtype=torch.float16) for seed in range(3))
    return tuple(window_attention(query, key, value, (2, 3, 3), window=1, backend=backend))


def attend_video(backend: str) -> Outputs:
    query, key, value, text, of_text = (
        drawn(1, 2, rows, 16, seed=rows, dtype=torch.float16) for rows in (28, 29, 30, 5, 6)
    )
    found = video_attention(
        2 * query, key[:, :, :28], value[:, :, :28], (2, 2, 7), num_bases=5, num_iters=0,
        text=(text, of_text[:, :, :5]), text_mask=torch.arange(5).unsqueeze(0) != 1,
        backend=backend,
    )  # fmt: skip
    return (found,)


CALLS: tuple[Callable[[str], Outputs], ...] = (
    attend, attend_without_bias, attend_in_tiles, attend_corrected, blend,
    attend_projected, attend_partly, find_nearest, summed, summed_wide, iterated, kept_empty,
    updated, correct, attend_nearby,
)  # fmt: skip


def close(found: Outputs, right: Outputs) -> bool:
    return all(
        max_error(ours.nan_to_num(neginf=-99.0), theirs.nan_to_num(neginf=-99.0)) < 0.05
        for ours, theirs in zip(found, right, strict=True)
    )


def found_wrong(call: Callable[[str], Outputs], caplog: pytest.LogCaptureFixture) -> str:
    """The warning of a call whose kernel is wrong; asserts all that has to happen."""
    right = call("torch")
    with pytest.raises(BackendError, match="the kernel of backend") as caught:
        call(BACKEND)
    with pytest.raises(BackendError) as again:  # and it is not launched again
        call(BACKEND)
    assert str(again.value) == str(caught.value)
    forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "stem_kernels"):
        first, second = call("auto"), call("auto")
    warned = [record.getMessage() for record in caplog.records]
    assert sum(f"the kernel of backend {BACKEND}" in text for text in warned) == 1, warned
    assert close(first, right)
    assert all(map(torch.equal, first, second))
    return warned[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every comparison from now on gave: whether there was something, and it was right."""
    from stem_kernels import verification

    compared: list[bool] = []

    def wrong(fresh: Any, tensors: Any, check: Callable[[], Any]) -> Any:
        def noted() -> Any:
            found = check()
            compared.append(bool(found) and all(one.ratio() <= 1 for one in found))
            return found

        return before(fresh, tensors, noted)

    before = verification._wrong
    monkeypatch.setattr(verification, "_wrong", wrong)
    return compared
