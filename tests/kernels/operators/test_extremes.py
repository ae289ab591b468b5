"""Numbers and sizes at the edge: infinities, the lowest bias, many tokens, nothing at all."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, INTERPRETED, tokens

from stem_kernels import (
    attention_error,
    basis_attention,
    blended_attention,
    em_statistics,
    em_update,
    nearest_token,
    soft_em,
    stem_attention,
)
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.calibration import calibrate_bases
from stem_kernels.ops.partial_attention import merged_attention, partial_attention
from stem_kernels.ops.soft_em import attended_bases
from stem_kernels.reference import chunks
from stem_kernels.shared import forms
from stem_kernels.testing import eager_basis_attention, max_error

pytestmark = pytest.mark.thinned

interpreter = pytest.mark.interpreter
INF = float("inf")


@interpreter
@pytest.mark.parametrize("number", [float("nan"), INF, -INF])
@pytest.mark.parametrize("place", [0, 3, 69])
def test_a_key_that_is_not_finite_is_not_found(backend: str, place: int, number: float) -> None:
    query, keys = tokens(2, 40, 16), tokens(2, 70, 16, seed=1)
    others = [key for key in range(70) if key != place]
    expected = nearest_token(query, keys[:, others], backend=backend)
    keys[:, place, 2] = number
    found = nearest_token(query, keys, backend=backend)
    assert torch.equal(found, expected + (expected >= place).int())


@interpreter
@pytest.mark.parametrize(("first", "last"), [(0, 128), (128, 256), (100, 400), (0, 599)])
def test_keys_in_a_row_of_which_none_has_a_finite_logit(
    backend: str, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CPU_LOGITS_PER_HEAD", 7 * 64)
    query = torch.rand(1, 1, 7, 16, device=DEVICE) + 0.1
    key, value = tokens(1, 1, 600, 16), tokens(1, 1, 600, 16, seed=1)
    key[:, :, first:last, 0] = -INF
    exact = eager_basis_attention(query.double(), key.double(), value.double())
    logsumexp = torch.logsumexp(query.double() @ key.double().mT / 4, -1)
    whole = partial_attention(query, key, value, backend=backend)
    parts = [
        partial_attention(query, *part, backend=backend)
        for part in zip(key.split(50, -2), value.split(50, -2), strict=True)
    ]
    for output, log in (whole, merged_attention(parts)):
        assert max_error(output, exact) <= 1e-6 * float(exact.abs().max())
        assert max_error(log, logsumexp) <= 1e-6 * float(logsumexp.abs().max())


@interpreter
def test_keys_of_which_none_has_a_finite_logit(backend: str) -> None:
    query = torch.ones(1, 1, 3, 8, device=DEVICE)
    key, value = torch.full((1, 1, 300, 8), -INF, device=DEVICE), tokens(1, 1, 300, 8)
    found = partial_attention(query, key, value, backend=backend)
    assert found.output.isnan().all()
    assert (found.logsumexp == -INF).all()
    assert merged_attention([found, found]).output.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
def test_the_lowest_bias_is_a_bias(
    backend: str, bias: float, scale: float | None, dtype: torch.dtype
) -> None:
    if backend == "triton":
        pytest.skip("Triton's kernels may take a bias beyond 1e37 for infinite")
    query, key, value = (tokens(1, 2, n, 40, seed=n).to(dtype) for n in (7, 300, 300))
    biases = torch.full((2, 300), bias, device=DEVICE)
    mask = biases[None, :, None].expand(1, 2, 7, 300)
    plain = [tensor.float() for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*plain, mask, scale=scale)
    assert expected.isfinite().all()
    out = basis_attention(query, key, value, bias=biases, scale=scale, backend=backend)
    half = torch.full((1, 7), 0.5, device=DEVICE)
    both = blended_attention(
        query, key, query, key, value, half, bias=biases, scale=scale, backend=backend
    )
    for found in (out, both):
        assert max_error(found, expected) <= ROUNDING_ATOL[dtype] * float(expected.abs().max())
    biases[:, 3:] = -INF
    expected = basis_attention(query, key[:, :, :3], value[:, :, :3], bias=biases[:, :3])
    found = basis_attention(query, key, value, bias=biases, backend=backend)
    assert max_error(found, expected) <= ROUNDING_ATOL[dtype] * float(expected.abs().max())


def test_sums_over_many_tokens_stay_exact(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal tokens, each sum of which is rounded the same way, in as many steps as 10^8 take."""
    # torch's chunks are made small; the extension's parts are few because there are many heads.
    monkeypatch.setattr(chunks, "CPU_LOGITS_PER_HEAD", 1)
    heads, n = (64, 300_000) if backend == "cuda" else (1, 100_000)
    token = torch.full((1, 1, 1, 1), 0.7, device=DEVICE)
    features = token.expand(1, heads, n, 1)
    bases = torch.ones(1, heads, 3, 1, device=DEVICE)
    found = em_statistics(features, bases, temperature=1.0, payload=features, backend=backend)
    attended = partial_attention(
        token.expand(1, heads, 1, 1), features, features, scale=1.0, backend=backend
    )
    value = float(token)
    shares = {
        "mass": found.mass / (n / 3),
        "sums": found.sums / (n / 3 * value),
        "payload sums": found.payload_sums / (n / 3 * value),
        "logsumexp": (attended.logsumexp.double() - value**2 - math.log(n)).exp(),
        "output": attended.output / value,
    }
    for name, share in shares.items():
        assert float((share - 1).abs().max()) <= 1e-5, name


@pytest.mark.skipif(not INTERPRETED, reason="a pass of Triton alone goes range by range")
@interpreter
@pytest.mark.parametrize(
    ("width", "dtype"), [(40, torch.float16), (320, torch.float16), (24, torch.float32)]
)
def test_no_sum_of_triton_is_of_more_tokens_than_is_allowed(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stem_kernels.triton import tuning
    from stem_kernels.triton.em import wide
    from stem_kernels.triton.program import forget_programs

    features, payload = (tokens(1, 1, 1500, size).to(dtype) for size in (width, 24))
    bases = tokens(1, 1, 16, width, seed=1)

    def run():  # type: ignore[no-untyped-def]
        forget_programs()
        found = em_statistics(features, bases, temperature=1.0, payload=payload, backend="triton")
        forget_programs()
        return found

    whole = run()
    assert tuning.sum_ranges(10**8, 32, 264) == (6104, 2**14)
    assert tuning.sum_ranges(1500, 256, 3) == (3, 512)
    assert tuning.token_ranges(10**8, 32, 1) == (1, 10**8)  # of what is not summed up
    for module in (wide, tuning):
        monkeypatch.setattr(module, "LARGEST_RANGE", 256)
    monkeypatch.setattr(wide, "LARGEST_CHUNK_BYTES", 128 * 16 * 2)
    assert tuning.sum_ranges(1500, 256, 3) == (6, 256)
    for one, other in zip(whole, run(), strict=True):
        assert max_error(one, other) <= 1e-5 * float(one.abs().max())


def sizes_of(call) -> object:  # type: ignore[no-untyped-def]
    """The shapes of what a call returns, or its error."""
    try:
        found = call()
    except (ValueError, ZeroDivisionError) as error:
        return type(error)
    if isinstance(found, tuple):
        return [sizes_of(lambda part=part: part) for part in found]
    return list(found.shape) if isinstance(found, torch.Tensor) else found


EMPTY = {
    "batch": (0, 2, 5, 8, 6, 3),
    "heads": (2, 0, 5, 8, 6, 3),
    "tokens": (1, 2, 0, 8, 6, 3),
    "channels": (1, 2, 5, 0, 6, 3),
    "values": (1, 2, 5, 8, 0, 3),
    "bases": (1, 2, 5, 8, 6, 0),
}


@interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("empty", EMPTY)
def test_sizes_of_zero_are_served_alike_or_refused(
    backend: str, empty: str, dtype: torch.dtype
) -> None:
    batch, heads, n, dim, width, num_bases = EMPTY[empty]
    lead = (batch, heads)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, device=DEVICE, dtype=dtype)

    x, m, p = ones(*lead, n, dim), ones(*lead, num_bases, dim), ones(*lead, n, width)
    v, sums = ones(*lead, num_bases, width), ones(*lead, num_bases, dim).float()
    calls = {
        "basis_attention": lambda on: basis_attention(x, m, v, backend=on),
        "blended": lambda on: blended_attention(x, m, x, m, v, ones(batch, n), backend=on),
        "partial_attention": lambda on: partial_attention(x, m, v, scale=1.0, backend=on),
        "em_statistics": lambda on: em_statistics(x, m, payload=p, backend=on),
        "soft_em": lambda on: soft_em(x, m, payload=p, num_iters=2, backend=on),
        "reseed": lambda on: soft_em(x, 3, num_iters=2, empty="reseed", backend=on),
        "attended": lambda on: attended_bases(x, m, proportional=True, backend=on),
        "em_update": lambda on: em_update(
            sums, ones(*lead, num_bases).float(), sums, num_tokens=5, backend=on
        ),
        "nearest_token": lambda on: nearest_token(x.flatten(0, 1), m.flatten(0, 1), backend=on),
        "stem_attention": lambda on: stem_attention(
            x, x, p, num_bases=2, allow_exact=False, backend=on
        ),
        "moments": lambda on: stem_attention(
            x, x, p, num_bases=2, calibration="moments", allow_exact=False, backend=on
        ),
        "error": lambda on: attention_error(x, x, p, num_bases=2, backend=on),
        "calibrate": lambda on: calibrate_bases(x, p, m, v),
    }
    for name, call in calls.items():
        forms.forget()
        found = sizes_of(lambda call=call: call(backend))
        assert found == sizes_of(lambda call=call: call("torch")), name
        assert found is not ZeroDivisionError, name
    if empty == "channels":
        with pytest.raises(ValueError, match=r"query is \[1, 2, 5, 0\]; its last size must be at"):
            basis_attention(x, m, v, scale=1.0, backend=backend)
    if empty == "bases":
        with pytest.raises(ValueError, match="K must be at least 1"):
            calls["em_update"](backend)


@interpreter
@pytest.mark.skipif(not INTERPRETED, reason="GPUs round by themselves")
def test_the_interpreter_rounds_bfloat16_as_torch_does() -> None:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from stem_kernels.triton import on_device_of

    @triton.jit
    def kernel(p_from, p_to, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.arange(0, COUNT)
        tl.store(p_to + o, tl.load(p_from + o).to(tl.bfloat16))

    special = [INF, -INF, float("nan"), 0.0, -0.0, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
    numbers = torch.cat([torch.tensor(special), torch.randn(1024 - len(special))])
    found = torch.empty(1024, dtype=torch.bfloat16)
    before = InterpreterBuilder.cast_impl
    with on_device_of(numbers):
        kernel[(1,)](numbers, found, 1024)
    assert InterpreterBuilder.cast_impl is before
    torch.testing.assert_close(found, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)
