"""The operators that calibrate bases, against their formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import tokens

from stem_kernels import attention_bias, basis_attention, cuda
from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.calibration import CALIBRATIONS, calibrate_bases
from stem_kernels.ops.partial_attention import ROUNDING_ATOL as PARTIAL_ATOL
from stem_kernels.ops.partial_attention import merged_attention, partial_attention
from stem_kernels.reference.partial_attention import _operator
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import (
    eager_basis_attention,
    eager_calibrate_bases,
    max_error,
    parity_bound,
)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 1000), (100, 5000)])
def test_partial_attention(backend: str, dtype: torch.dtype, queries: int, keys: int) -> None:
    # [B, h, n, d] views of head-interleaved memory, of another width than the values
    query = tokens(2, queries, 3, 24).transpose(1, 2).to(dtype)
    key = (4 * tokens(2, keys, 3, 24, seed=1)).transpose(1, 2).to(dtype)
    value = tokens(2, keys, 3, 17, seed=2).transpose(1, 2).to(dtype)
    exact = eager_basis_attention(query.double(), key.double(), value.double())
    # Triton rounds weights to the dtype as plain torch does; the others do not.
    wide = dtype if backend == "triton" else torch.float32
    plain = eager_basis_attention(query.to(wide), key.to(wide), value.to(wide))
    logits = query.double() @ key.double().mT / 24**0.5
    found = partial_attention(query, key, value, backend=backend)
    assert found.output.dtype == found.logsumexp.dtype == torch.float32
    largest_logit = float(logits.abs().max())
    assert max_error(found.output, exact) <= parity_bound(exact, plain, PARTIAL_ATOL, largest_logit)
    sums = logits.logsumexp(-1)
    assert max_error(found.logsumexp, sums) <= 1e-6 * float(sums.abs().max())


def test_attentions_to_parts_make_that_to_all() -> None:
    query, key, value = (tokens(1, 2, n, 8, seed=n).double() for n in (5, 90, 90))
    key *= 10
    whole = partial_attention(query, key, value)
    pieces = zip(key.split(40, -2), value.split(40, -2), strict=True)
    parts = [partial_attention(query, *piece) for piece in pieces]
    merged = merged_attention(parts)
    for found, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    alone = merged_attention([whole])
    assert all(found is part for found, part in zip(alone, whole, strict=True))
    with pytest.raises(ValueError, match="one at least"):
        merged_attention([])


def test_partial_attention_is_differentiable() -> None:
    inputs = [tokens(1, 2, n, 4, seed=n).double().requires_grad_() for n in (3, 40, 40)]
    assert torch.autograd.gradcheck(partial_attention, inputs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4)), "n at least 1"),
        (((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4)), r"\[1, 2, 6, 4\]"),
        (((1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), r"\[2, 2, 5, 4\]"),
    ],
)
def test_partial_attention_refuses(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partial_attention(*(torch.zeros(shape) for shape in shapes))


def smooth_case(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of 2 heads [1, 2, 2048, 12], projections of a smooth map; bases
    [1, 2, 32, 12] that are means of 8 x 8 tokens each, and their masses; float64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, 48, 4, 8), generator=generator, dtype=torch.float64)
    grid = torch.nn.functional.interpolate(coarse, size=(32, 64), mode="bicubic")
    weights = torch.randn((3, 48, 24), generator=generator, dtype=torch.float64) / 48**0.5
    query, key, value = (
        (grid.flatten(2).mT @ weight).unflatten(-1, (2, 12)).transpose(1, 2) for weight in weights
    )
    tiles = [part.unflatten(2, (4, 8, 8, 8)).transpose(3, 4) for part in (key, value)]
    means = [part.mean((4, 5)).flatten(2, 3) for part in tiles]
    return query, key, value, *means, torch.full((2, 32), 64.0)


@pytest.mark.parametrize("form", CALIBRATIONS)
@pytest.mark.parametrize("queries", [1, 5, 200])
def test_calibration_is_a_ridge_regression(form: str, queries: int) -> None:
    query, key, value, key_bases, value_bases, mass = smooth_case()
    mass[:, 3] = 0.0  # an excluded base
    bias = attention_bias(mass, proportional=True)
    assert bias is not None
    chosen = query[:, :, :queries]
    attended = partial_attention(chosen, key, value).output
    tensors = (chosen, attended, key_bases, value_bases)
    exact = eager_calibrate_bases(*tensors, bias=bias, form=form)
    found = calibrate_bases(*tensors, bias=bias, form=form)
    for result, expected in zip(found, exact, strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.query_mean, chosen.mean(-2))
    assert torch.equal(found.value[:, :, 3], value_bases[:, :, 3])

    single = tuple(tensor.float() for tensor in tensors)
    plain = eager_calibrate_bases(*single, bias=bias, form=form)
    found = calibrate_bases(*single, bias=bias, form=form)
    for result, expected, same_dtype in zip(found, exact, plain, strict=False):
        assert result.dtype == torch.float32
        bound = parity_bound(expected, same_dtype, {torch.float32: 1e-6})
        assert max_error(result, expected) <= bound


def test_calibration_refuses() -> None:
    query, bases = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match='form is "both"'):
        calibrate_bases(query, query, bases, bases, form="both")
    with pytest.raises(ValueError, match=r"attended is \[1, 2, 4, 4\]"):
        calibrate_bases(query, query[:, :, 1:], bases, bases)
    with pytest.raises(ValueError, match="there must be a query"):
        calibrate_bases(query[:, :, :0], query[:, :, :0], bases, bases)


@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_with_a_correction(backend: str, dtype: torch.dtype, shared: bool) -> None:
    count = 300 if backend == "triton" else 3000
    query = (3 + tokens(2, count, 3, 40)).transpose(1, 2).to(dtype)
    key, value = tokens(1, 3, 20, 40, seed=1).to(dtype), tokens(1, 3, 20, 24, seed=2).to(dtype)
    correction, mean = tokens(2, 3, 41, 24, seed=3) / 6, query.float().mean(-2)
    if shared:  # by the batch; the mean is each row's own
        correction = correction[:1]

    def eager(dtype: torch.dtype) -> torch.Tensor:
        matrix, constant = correction.to(dtype).split([40, 1], dim=-2)
        centred = query.to(dtype) - mean.to(dtype).unsqueeze(-2)
        attended = eager_basis_attention(query.to(dtype), key.to(dtype), value.to(dtype))
        return attended + centred @ matrix + constant

    exact = eager(torch.float64)
    found = basis_attention(
        query, key, value, correction=correction, query_mean=mean, backend=backend
    )
    assert found.dtype == dtype
    assert found.transpose(1, 2).is_contiguous()
    assert max_error(found, exact) <= parity_bound(exact, eager(dtype), ATTENTION_ATOL)


def test_a_correction_is_differentiable() -> None:
    shapes = [(2, 2, 6, 4), (1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 5, 5), (2, 2, 4)]
    inputs = [tokens(*shape, seed=sum(shape)).double().requires_grad_() for shape in shapes]

    def corrected(*tensors: torch.Tensor) -> torch.Tensor:
        query, key, value, correction, mean = tensors
        return basis_attention(query, key, value, correction=correction, query_mean=mean)

    assert torch.autograd.gradcheck(corrected, inputs)


def test_a_correction_that_does_not_fit() -> None:
    query, key = torch.zeros(2, 3, 5, 4), torch.zeros(1, 3, 6, 4)
    right = {"correction": torch.zeros(1, 3, 5, 4), "query_mean": torch.zeros(2, 3, 4)}
    basis_attention(query, key, key, **right)
    for name, shape in {"correction": (1, 3, 4, 4), "query_mean": (3, 3, 4)}.items():
        with pytest.raises(ValueError, match=name):
            basis_attention(query, key, key, **{**right, name: torch.zeros(shape)})
        with pytest.raises(ValueError, match="go together"):
            basis_attention(query, key, key, **{name: right[name]})


@pytest.mark.parametrize("form", CALIBRATIONS)
def test_calibrated_attention_is_nearer_to_exact(form: str) -> None:
    query, key, value, key_bases, value_bases, mass = smooth_case()
    bias = attention_bias(mass, proportional=True)
    exact = partial_attention(query, key, value).output
    chosen = spread_tokens(query.shape[2], 128, query.device)
    calibrated = calibrate_bases(
        query[:, :, chosen], exact[:, :, chosen], key_bases, value_bases, bias=bias, form=form
    )
    before = basis_attention(query, key_bases, value_bases, bias=bias)
    after = basis_attention(
        query,
        key_bases,
        calibrated.value,
        bias=bias,
        correction=calibrated.correction,
        query_mean=calibrated.query_mean,
    )
    errors = [float((found - exact).norm() / exact.norm()) for found in (before, after)]
    assert errors[1] < errors[0] / {"linear": 2, "joint": 4}[form]


def test_it_compiles_whole() -> None:
    query, key, value, key_bases, value_bases, _ = (part.float() for part in smooth_case())
    torch.library.opcheck(_operator, (query[:, :, :9], key, value, 0.3))
    if cuda.load_error("cpu") is None:
        extension = torch.ops.stem_kernels_ext
        torch.library.opcheck(extension.partial_attention, (query[:, :, :9], key, value, 0.3))
        correction = torch.zeros(1, 2, 13, 12)
        given = (query, key_bases, value_bases, None, correction, correction[:, :, 0], 0.3)
        torch.library.opcheck(extension.basis_attention, given)

    def calibrated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        chosen = query[:, :, ::16]
        exact = merged_attention([partial_attention(chosen, key, value)]).output
        fitted, correction, mean = calibrate_bases(chosen, exact, key_bases, value_bases)
        return basis_attention(query, key_bases, fitted, correction=correction, query_mean=mean)

    compiled = torch.compile(calibrated, backend="aot_eager", fullgraph=True)
    expected = calibrated(query, key, value)
    torch.testing.assert_close(compiled(query, key, value), expected)
