"""The operators that calibrate bases, against their formulas."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import INTERPRETED, tokens

from stem_kernels import attention_bias, basis_attention, cuda
from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.calibration import CALIBRATIONS, MOMENTS_ATOL, calibrate_bases, moments
from stem_kernels.ops.partial_attention import ROUNDING_ATOL as PARTIAL_ATOL
from stem_kernels.ops.partial_attention import merged_attention, partial_attention
from stem_kernels.reference.partial_attention import _operator
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import (
    eager_basis_attention,
    eager_calibrate_bases,
    eager_moments,
    max_error,
    parity_bound,
)

pytestmark = pytest.mark.thinned

MANY = 2000 if INTERPRETED else 5000


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 1000), (100, MANY)])
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


Operands = tuple[torch.Tensor, ...]


def moments_case(
    batch: int, m: int, queries: int, num_bases: int, channels: int, dim: int, width: int,
    dtype: torch.dtype, *, heads: int = 2, with_heads: bool = False,
) -> Operands:  # fmt: skip
    """Views of head-interleaved memory, as projections leave it, of tokens around their bases."""
    lead = (batch, heads) if with_heads else (batch,)
    features = tokens(*lead, m, channels)
    index = torch.arange(num_bases, device=features.device) * m // num_bases
    bases = features[..., index, :] + 0.1 * tokens(*lead, num_bases, channels, seed=1)
    query = 2 * tokens(batch, queries, heads, dim, seed=2)
    key, value = tokens(batch, m, heads, dim, seed=3), tokens(batch, m, heads, width, seed=4)
    value[..., : min(dim, width)] += key[..., : min(dim, width)]
    of_heads = [
        rows.to(dtype).transpose(1, 2)
        for rows in (query, key, value, key[:, index] * 0.9, value[:, index] * 0.9)
    ]
    return of_heads[0], features.to(dtype), *of_heads[1:3], bases, *of_heads[3:]


def assert_moments(operands: Operands, backend: str, **settings: float) -> None:
    dtype, temperature = operands[2].dtype, settings["temperature"]
    exact, plain = (
        eager_moments(*(part.to(of) for part in operands), **settings)
        for of in (torch.float64, dtype)
    )
    found = moments(*operands, **settings, backend=backend)  # type: ignore[arg-type]
    assert found.value is None
    assert found.correction.dtype == found.query_mean.dtype == torch.float32
    assert found.correction.shape == exact.shape
    assert (found.correction[..., -1, :] == 0).all()
    assert torch.equal(found.query_mean, torch.zeros_like(exact[..., :-1, 0]).float())
    largest_logit = float(operands[1].double().norm(dim=-1).max()) / temperature
    bound = parity_bound(exact, plain, MOMENTS_ATOL, largest_logit)
    assert 0 < max_error(found.correction, exact) <= bound
    assert bound < 0.1 * float(exact.abs().max())


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("with_heads", [False, True], ids=["features", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 300, 70, 20, 48, 40, 40),
        (1, 512, 128, 128, 320, 80, 64),
        (1, 70, 1, 5, 33, 17, 24),  # no multiples of 8, fewer bases than a tile has
        (1, 1, 3, 1, 40, 40, 40),
        (1, 260, 300, 256, 160, 160, 160),
    ],
    ids=str,
)
def test_moments(
    backend: str, sizes: tuple[int, ...], dtype: torch.dtype, with_heads: bool
) -> None:
    operands = moments_case(*sizes, dtype, with_heads=with_heads)
    if sizes[1] == 1:  # a token that is its own base leaves nothing but what is 0.1 of it
        operands = (*operands[:5], *(part * 0.5 for part in operands[5:]))
    assert_moments(operands, backend, temperature=0.5)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_moments_of_batches_that_share(backend: str, dtype: torch.dtype) -> None:
    both = moments_case(2, 90, 30, 12, 40, 24, 16, dtype)
    query, features, key, value, bases, base_key, base_value = both
    one = (features[:1], key[:1], value[:1], bases[:1], base_key[:1], base_value[:1])
    assert_moments((query, *one), backend, temperature=1.0, scale=0.3)
    joint = (query, features[:1], key, value, bases[:1], base_key, base_value)
    assert_moments(joint, backend, temperature=1.0, scale=0.3)
    assert_moments((query[:1], *both[1:]), backend, temperature=1.0)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [(1, 600, 9, 300, 24, 16, 16), (1, 60, 9, 20, 24, 16, 176)])
def test_moments_beyond_the_kernel_are_those_of_torch(backend: str, sizes: tuple[int, ...]) -> None:
    operands = moments_case(*sizes, torch.float16)
    found, right = (moments(*operands, temperature=1.0, backend=on) for on in (backend, "torch"))
    assert torch.equal(found.correction, right.correction)
    assert torch.equal(found.query_mean, right.query_mean)


@pytest.mark.interpreter
def test_moments_of_two_dtypes_are_those_of_the_keys(backend: str) -> None:
    """As under autocast, where features are float32 and projections are not."""
    query, features, *others = moments_case(1, 90, 30, 12, 40, 24, 16, torch.float16)
    found, right = (
        moments(query, part, *others, temperature=1.0, backend=backend).correction  # type: ignore[arg-type]
        for part in (features.float(), features)
    )
    assert torch.equal(found, right)


@pytest.mark.interpreter
def test_moments_as_a_part_of_a_graph(backend: str) -> None:
    operands = moments_case(1, 90, 30, 12, 40, 24, 16, torch.float16)

    def run(*operands: torch.Tensor) -> torch.Tensor:
        found = moments(*operands, temperature=1.0, backend=backend)  # type: ignore[arg-type]
        return found.correction + found.query_mean.unsqueeze(-1).sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*operands), run(*operands))
    if backend == "triton":
        operator = torch.ops.stem_kernels.moments_triton
        torch.library.opcheck(operator, (*operands, 1.0, 0.3, 0.85))


def test_moments_refuse() -> None:
    operands = moments_case(1, 9, 5, 3, 6, 4, 7, torch.float32)
    for place, message in (
        (0, r"query \[1, 2, 5, 3\]"),
        (1, r"features \[1, 9, 5\]"),
        (3, "value"),
        (5, r"base_key \[1, 2, 3, 3\]"),
    ):
        changed = list(operands)
        changed[place] = changed[place][..., :-1]
        if place == 3:
            changed[place] = operands[place][:, :, 1:]
        with pytest.raises(ValueError, match=message):
            moments(*changed, temperature=1.0)
    with pytest.raises(ValueError, match="r, m and K at least 1"):
        moments(operands[0][:, :, :0], *operands[1:], temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature is 0\.0; it must be positive"):
        moments(*operands, temperature=0.0)
    with pytest.raises(TypeError, match=r"bases is torch\.int64"):
        moments(*operands[:4], operands[4].long(), *operands[5:], temperature=1.0)


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
        # What says the results' shapes comes with the launchers, whichever test ran before.
        for name in ("partial_attention", "basis_attention"):
            importlib.import_module(f"stem_kernels.cuda.{name}")
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
