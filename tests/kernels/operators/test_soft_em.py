"""Soft EM and its halves: sums over chunks, iterations, updates, and bases left empty."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETED, tokens

from stem_kernels import (
    attention_bias,
    basis_attention,
    em_statistics,
    em_update,
    initial_bases,
    soft_em,
)
from stem_kernels.ops.em_update import candidate_tokens
from stem_kernels.ops.soft_em import SoftEM, attended_bases
from stem_kernels.testing import eager_soft_em, max_error


@pytest.mark.interpreter
def test_sums_add_over_chunks_of_tokens(backend: str) -> None:
    features, payload = tokens(2, 300, 12), tokens(2, 300, 5, seed=1)
    bases = tokens(2, 17, 12, seed=2)
    whole = em_statistics(features, bases, payload=payload, backend=backend)
    parts = [
        em_statistics(
            features[:, start : start + 77],
            bases,
            payload=payload[:, start : start + 77],
            backend=backend,
        )
        for start in range(0, 300, 77)
    ]
    for index, result in enumerate(whole):
        total = sum(part[index].double() for part in parts)
        assert max_error(result, total) <= 1e-5 * float(result.abs().max())


def test_iterations_follow_the_formula() -> None:
    features, bases = tokens(2, 500, 16), tokens(2, 9, 16, seed=1)
    found = soft_em(features, bases, num_iters=4, temperature=1.0, empty="zero")
    expected = eager_soft_em(features.double(), bases.double(), num_iters=4, temperature=1.0)
    assert max_error(found.bases, expected) < 1e-5


def step_by_step(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor,
    empty: str,
    size: int,
    backend: str,
) -> SoftEM:
    """`soft_em` of three iterations at temperature 0.5, over chunks of `size` tokens."""
    n = features.shape[-2]
    index = candidate_tokens(n, bases.shape[-2], features.device)
    pieces = list(zip(features.split(size, -2), payload.split(size, -2), strict=True))
    for policy in (empty, empty, "mask" if empty == "reseed" else empty):
        parts = [
            em_statistics(chunk, bases, temperature=0.5, payload=values, backend=backend)
            for chunk, values in pieces
        ]
        sums, mass, payload_sums = (sum(part) for part in zip(*parts, strict=True))
        found = em_update(
            sums,
            mass,
            bases,
            num_tokens=n,
            empty=policy,
            payload_sums=payload_sums,
            candidates=features[..., index, :],
            backend=backend,
        )
        bases = found.bases
    return found


@pytest.mark.parametrize("empty", ["zero", "mask", "reseed"])
@pytest.mark.interpreter
def test_statistics_and_updates_make_soft_em(backend: str, empty: str) -> None:
    features, payload = 1 + tokens(1, 2, 120, 12), tokens(1, 2, 120, 5, seed=1)
    bases = features[..., ::10, :].clone()
    bases[..., :4, :] = -1.0  # away from all tokens
    options = {"num_iters": 3, "temperature": 0.5, "empty": empty, "backend": backend}
    fused = soft_em(features, bases, payload=payload, **options)  # type: ignore[arg-type]
    assert bool((fused.mass == 0).any()) == (empty == "mask")
    whole = step_by_step(features, bases, payload, empty, 120, backend)
    parts = step_by_step(features, bases, payload, empty, 77, backend)
    for one, other, chunked in zip(fused, whole, parts, strict=True):
        if backend == "torch":
            assert torch.equal(one, other)
        tolerance = 1e-4 * float(one.abs().max())
        assert max_error(other, one) <= tolerance
        assert max_error(chunked, one) <= tolerance


@pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="Triton alone has a kernel of its own for it"
)
@pytest.mark.interpreter
def test_an_update_has_the_same_bits_in_triton() -> None:
    sums, bases, payload = (tokens(2, 37, width, seed=width) for width in (40, 40, 5))
    mass = 40 * tokens(2, 37, seed=1).abs()
    mass[:, ::5] = 1e-3  # of an empty base
    for empty in ("zero", "mask"):
        found, expected = (
            em_update(
                sums.mT.contiguous().mT, mass, bases.half(),
                num_tokens=99, empty=empty, payload_sums=payload, backend=backend,
            )
            for backend in ("triton", "torch")
        )  # fmt: skip
        assert all(map(torch.equal, found, expected))
    operator = torch.ops.stem_kernels.em_update_triton
    for values in (payload, None):
        sample = (sums, mass, bases, values, 99, True)
        torch.library.opcheck(operator, sample, test_utils=["test_schema", "test_faketensor"])


def test_the_objective_does_not_fall_on_average() -> None:
    features = tokens(1, 2000, 16)
    features = features / features.norm(dim=-1, keepdim=True)
    bases = initial_bases(features, 32)

    def objective(num_iters: int) -> float:
        found = soft_em(features, bases, num_iters=num_iters, temperature=0.05).bases
        directions = found / (found.norm(dim=-1, keepdim=True) + 1e-4)
        return float(torch.logsumexp(features @ directions.mT / 0.05, -1).mean())

    assert objective(8) > objective(1) + 0.1


def with_an_empty_base() -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.eye(2, 8, device=DEVICE).repeat(50, 1).unsqueeze(0)
    bases = torch.eye(3, 8, device=DEVICE).unsqueeze(0)
    bases[0, 2] = -1.0
    return features, bases


def test_the_bias_has_the_dtype_of_the_masses() -> None:
    for proportional in (False, True):
        bias = attention_bias(torch.ones(2, 3).double(), proportional=proportional)
        assert bias is not None
        assert bias.dtype == torch.float64


@pytest.mark.parametrize("empty", ["zero", "mask", "reseed"])
def test_empty_bases(empty: str) -> None:
    features, bases = with_an_empty_base()
    features[0, 0, 5] = 3.0  # a token that neither of the two bases explains
    found = soft_em(features, bases, num_iters=3, payload=features, empty=empty)
    if empty == "zero":
        assert found.bases[0, 2].abs().max() < 1e-6
        assert attention_bias(found.mass, empty=empty) is None
    elif empty == "mask":
        assert torch.equal(found.bases[0, 2], bases[0, 2])
        assert found.mass[0, 2] == 0
        bias = attention_bias(found.mass, empty=empty)
        assert bias is not None
        assert bias.tolist() == [[0.0, 0.0, float("-inf")]]
    else:
        assert found.mass[0, 2] == pytest.approx(1.0, abs=1e-3)
        assert max_error(found.bases[0, 2], features[0, 0]) < 1e-3
        assert (found.mass > 0).all()
    assert float(found.mass.sum()) == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("empty", ["mask", "reseed"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_fewer_tokens_than_bases_leave_one_to_attend_to(
    n: int, empty: str, temperature: float
) -> None:
    features = tokens(1, 2, n, 8)
    start = initial_bases(features, 256, init="tokens")
    found = soft_em(features, start, payload=features, empty=empty, temperature=temperature)
    assert (found.mass > 0).any(-1).all()
    out = basis_attention(
        features,
        found.bases,
        found.payload,
        bias=attention_bias(found.mass, empty=empty, proportional=True),
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("given", [False, True])
def test_early_iterations_read_every_second_token(backend: str, given: bool) -> None:
    x, payload = tokens(2, 90, 16), tokens(2, 90, 5, seed=1)
    start: torch.Tensor | int = initial_bases(x, 6) if given else 6
    found = attended_bases(
        x, start, num_iters=3, temperature=0.1, payload=payload, early_stride=2, backend=backend
    )
    early = soft_em(x[:, ::2], start, num_iters=2, temperature=0.1, backend=backend).bases
    last = soft_em(
        x, early, num_iters=1, temperature=0.1, payload=payload, empty="mask", backend=backend
    )
    assert all(torch.equal(*pair) for pair in zip(found.found, last, strict=True))


def test_with_reseed_all_iterations_read_all_tokens(backend: str) -> None:
    x = tokens(1, 90, 16)
    found, whole = (
        attended_bases(x, 6, num_iters=3, empty="reseed", early_stride=stride, backend=backend)
        for stride in (2, 1)
    )
    assert torch.equal(found.bases, whole.bases)
