"""Every backend against float64, one E+M step and one attention, within twice torch's own error."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICE, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_kernels import attention_bias, basis_attention, em_statistics, soft_em
from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.em_statistics import ROUNDING_ATOL as EM_ATOL
from stem_kernels.testing import (
    clustered_tokens,
    eager_basis_attention,
    eager_em_statistics,
    max_error,
    parity_bound,
    rounded_soft_em,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.thinned,
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [40, 64, 80, 160, 320]
TOKENS = [1, 7, 255, 1000]
NUM_BASES = [1, 16, 256]
TEMPERATURES = [0.01, 1.0]
STEPS = list(itertools.product(TOKENS, NUM_BASES, TEMPERATURES))
SIZES = list(itertools.product(TOKENS, NUM_BASES))
if INTERPRETED:  # where each takes a second: every value of each, and the largest together
    STEPS = [
        (1, 1, 1.0), (7, 16, 0.01), (255, 256, 0.01), (255, 16, 1.0), (1000, 1, 1.0),
        (1000, 256, 0.01),
    ]  # fmt: skip
    SIZES = [(n, num_bases) for n, num_bases, _ in STEPS]


def em_case(n: int, num_bases: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    features = clustered_tokens((2 if n < 100 else 1, n, width), seed=n + width).to(dtype)
    spread = torch.arange(num_bases) * n // num_bases
    noise = clustered_tokens((features.shape[0], num_bases, width), seed=1)
    bases = features[:, spread].float() + 0.1 * noise
    payload = clustered_tokens((features.shape[0], n, 24), seed=2).to(dtype)
    return features.to(DEVICE), bases.to(DEVICE), payload.to(DEVICE)


@pytest.mark.parametrize(("n", "num_bases", "temperature"), STEPS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_em_step(
    backend: str, dtype: torch.dtype, width: int, n: int, num_bases: int, temperature: float
) -> None:
    features, bases, payload = em_case(n, num_bases, width, dtype)
    reference = eager_em_statistics(
        features.double(), bases.double(), temperature=temperature, payload=payload.double()
    )
    same_dtype = eager_em_statistics(features, bases, temperature=temperature, payload=payload)
    largest_logit = float(features.double().norm(dim=-1).max()) / temperature

    found = soft_em(
        features,
        bases,
        num_iters=1,
        temperature=temperature,
        payload=payload,
        empty="zero",
        backend=backend,
    )
    statistics = em_statistics(
        features, bases, temperature=temperature, payload=payload, backend=backend
    )
    for result, exact, plain in zip(statistics, reference, same_dtype, strict=True):
        assert result.dtype == torch.float32
        assert max_error(result, exact) <= parity_bound(exact, plain, EM_ATOL, largest_logit)
        if dtype == torch.float32 and temperature == 1.0:
            assert max_error(result, exact) <= 1e-5 * float(exact.abs().max())

    def divided(s):  # type: ignore[no-untyped-def]
        share = (s.mass + 1e-4).unsqueeze(-1)
        return s.sums / share, s.payload_sums / share

    for result, exact, plain in zip(
        (found.bases, found.payload), divided(reference), divided(same_dtype), strict=True
    ):
        bound = parity_bound(exact, plain, EM_ATOL, largest_logit)
        assert max_error(result, exact) <= bound


@pytest.mark.parametrize(("n", "num_bases"), SIZES)
@pytest.mark.parametrize("width", WIDTHS[:4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(backend: str, dtype: torch.dtype, width: int, n: int, num_bases: int) -> None:
    heads = 2
    query = clustered_tokens((2, n, heads, width), seed=n).to(dtype).transpose(1, 2).to(DEVICE)
    key = clustered_tokens((1, heads, num_bases, width), seed=1).to(DEVICE, dtype)
    value = clustered_tokens((1, heads, num_bases, 24), seed=2).to(DEVICE, dtype)
    mass = torch.arange(heads * num_bases, device=DEVICE).view(heads, num_bases) % 5
    mass[:, 0] = 3
    bias = attention_bias(mass.float(), proportional=True)
    exact = eager_basis_attention(query.double(), key.double(), value.double(), bias=bias)
    plain = eager_basis_attention(query, key, value, bias=bias)
    result = basis_attention(query, key, value, bias=bias, backend=backend)
    assert result.dtype == dtype
    assert max_error(result, exact) <= parity_bound(exact, plain, ATTENTION_ATOL)
    if dtype == torch.float32:
        assert max_error(result, exact) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.3])
@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize("width", [40, 64])
def test_attention_without_bias(backend: str, width: int, apart: int, scale: float) -> None:
    """Rows at multiples of 8 elements and at others; a scale that turns the maximum round."""
    query, key, value = (
        clustered_tokens((1, rows, 2, width + apart), seed=rows).to(DEVICE, torch.float16)
        for rows in (70, 200, 200)
    )
    query, key, value = (rows.transpose(1, 2)[..., :width] for rows in (query, key, value))
    arguments = (query, key, value)
    exact = eager_basis_attention(*(rows.double() for rows in arguments), scale=scale)
    plain = eager_basis_attention(*arguments, scale=scale)
    result = basis_attention(*arguments, scale=scale, backend=backend)
    assert max_error(result, exact) <= parity_bound(exact, plain, ATTENTION_ATOL)


@settings(max_examples=8 if INTERPRETED else 20, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 300),
    num_bases=st.integers(1, 300),
    width=st.integers(1, 100),
    payload_width=st.integers(1, 70),
    heads=st.integers(1, 3),
)
def test_any_shape(n: int, num_bases: int, width: int, payload_width: int, heads: int) -> None:
    from conftest import BACKENDS

    for backend in BACKENDS:
        # [B, h, n, D] views of head-interleaved memory, as to_k's output gives
        features = clustered_tokens((2, n, heads, width)).to(DEVICE).transpose(1, 2)
        payload = clustered_tokens((2, n, heads, payload_width)).to(DEVICE).transpose(1, 2)
        bases = clustered_tokens((2, heads, num_bases, width), seed=3).to(DEVICE)
        exact = eager_em_statistics(
            features.double(), bases.double(), temperature=1.0, payload=payload.double()
        )
        found = em_statistics(features, bases, temperature=1.0, payload=payload, backend=backend)
        for result, expected in zip(found, exact, strict=True):
            assert result.shape == expected.shape
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            assert max_error(result, expected) <= 2e-5 * scale
        value = clustered_tokens((2, heads, num_bases, payload_width), seed=4).to(DEVICE)
        expected = eager_basis_attention(features.double(), bases.double(), value.double())
        result = basis_attention(features, bases, value, backend=backend)
        assert result.shape == expected.shape
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        assert max_error(result, expected) <= 2e-5 * scale


@pytest.mark.parametrize("empty", ["zero", "mask"])
@pytest.mark.parametrize(
    ("width", "payload_width", "dtype"),
    [
        (40, 40, torch.float16),  # summed together with the payload
        (160, 96, torch.bfloat16),  # responsibilities made again for the payload
        (320, 24, torch.float16),  # two products
        (24, 24, torch.float32),  # the pass for everything else
    ],
)
def test_iterations(
    backend: str, width: int, payload_width: int, dtype: torch.dtype, empty: str
) -> None:
    # A temperature at which the assignment is soft: at 0.01 rounding decides it, and EM is chaotic.
    temperature = width**0.5 / 16
    features = (1 + clustered_tokens((2, 500, 3, width), seed=5)).to(dtype).transpose(1, 2)
    payload = clustered_tokens((2, 500, 3, payload_width), seed=6).to(dtype).transpose(1, 2)
    bases = features[..., ::20, :].float().clone()
    if empty == "mask":
        bases[..., :3, :] = -1.0  # away from all tokens
    features, payload, bases = features.to(DEVICE), payload.to(DEVICE), bases.to(DEVICE)
    settings = {"num_iters": 3, "temperature": temperature, "empty": empty}
    found = soft_em(features, bases, payload=payload, backend=backend, **settings)
    double = [tensor.double().cpu() for tensor in (features, bases, payload)]
    exact = soft_em(double[0], double[1], payload=double[2], **settings)
    assert torch.equal(found.mass.cpu() == 0, exact.mass == 0)
    assert bool((exact.mass == 0).any()) == (empty == "mask")
    rounded = rounded_soft_em(features.cpu(), bases.cpu(), payload.cpu(), **settings)
    for result, expected, near in zip(found, exact, rounded, strict=True):
        assert result.dtype == torch.float32
        bound = 2 * max_error(near, expected) + 1e-4 * float(expected.abs().max())
        assert max_error(result.cpu(), expected) <= bound


def test_no_base_stays_empty_when_they_are_reseeded(backend: str) -> None:
    features = (1 + clustered_tokens((1, 1000, 40))).to(DEVICE, torch.float16)
    bases = torch.full((1, 64, 40), -1.0, device=DEVICE)
    bases[:, :3] = features[:, :3]
    settings = {"num_iters": 4, "temperature": 0.1, "backend": backend}
    assert int((soft_em(features, bases, empty="mask", **settings).mass == 0).sum()) > 50
    assert int((soft_em(features, bases, empty="reseed", **settings).mass == 0).sum()) < 10


def test_tokens_in_several_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton":
        pytest.skip("only Triton's pass over wide tokens goes chunk by chunk")
    from stem_kernels.triton.em import wide
    from stem_kernels.triton.program import forget_programs

    features, bases, payload = em_case(1000, 16, 320, torch.float16)
    whole = soft_em(features, bases, payload=payload, num_iters=1, backend=backend)
    monkeypatch.setattr(wide, "LARGEST_CHUNK_BYTES", 300 * 16 * 2)
    forget_programs()
    parts = soft_em(features, bases, payload=payload, num_iters=1, backend=backend)
    forget_programs()
    for one, other in zip(whole, parts, strict=True):
        assert max_error(one, other) <= 1e-5 * float(one.abs().max())


def test_results_repeat_bit_for_bit(backend: str) -> None:
    features, bases, payload = em_case(1000, 64, 40, torch.float16)
    first, second = (
        soft_em(features, bases, payload=payload, empty="reseed", backend=backend) for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_many_half_precision_tokens_on_one_base(backend: str) -> None:
    # 100,000 responsibilities of 1 overflow a float16 sum, whose largest number is 65,504.
    n, width = 100_000, 8
    features = 3.0 + 0.01 * torch.randn(1, n, width, generator=torch.Generator().manual_seed(0))
    features = features.to(DEVICE, torch.float16)
    bases = torch.full((1, 1, width), 1.0, device=DEVICE)
    found = soft_em(features, bases, num_iters=2, payload=features, backend=backend)
    expected = features.double().mean(1)
    assert float(found.mass) == pytest.approx(n, rel=1e-5)
    assert max_error(found.bases[:, 0], expected) < 1e-4
    assert max_error(found.payload[:, 0], expected) < 1e-4
    attended = basis_attention(
        features[:, None, :100],
        found.bases[None].half(),
        found.payload[None].half(),
        bias=attention_bias(found.mass),
        backend=backend,
    )
    assert max_error(attended, expected.expand_as(attended)) < 4e-3


def test_a_float32_result_does_not_use_tf32(backend: str) -> None:
    # TF32 keeps 10 bits: 1 + 2^-12 rounds to 1, and the difference below would vanish.
    features = torch.tensor([[[1.0 + 2**-12, 1.0]]], device=DEVICE).repeat(1, 32, 16)
    bases = torch.ones(1, 16, 32, device=DEVICE)
    sums = em_statistics(features, bases, temperature=1.0, backend=backend).sums
    expected = eager_em_statistics(features.double(), bases.double(), temperature=1.0).sums
    assert max_error(sums, expected) <= 1e-6 * float(expected.abs().max())
