"""The CUDA kernels' code, run by an emulator, against float64: indices, layouts and barriers.

What only a GPU can show (speed, and what hardware does between barriers) is not tested here.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from cuda_emulator import DTYPES, NAN, Kernels
from cuda_emulator.cases import (
    attention_case,
    check_attention,
    check_em,
    em_case,
    interleaved,
)
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.nearest_token import ROUNDING_ATOL as NEAREST_ATOL
from stem_kernels.ops.partial_attention import ROUNDING_ATOL as PARTIAL_ATOL
from stem_kernels.reference.soft_em import soft_em_torch
from stem_kernels.shared.bases import least_mass
from stem_kernels.testing import (
    clustered_tokens,
    cosine_loss,
    eager_basis_attention,
    eager_blended_attention,
    eager_nearest_token,
    max_error,
    parity_bound,
    rounded_soft_em,
)

pytestmark = pytest.mark.thinned

if shutil.which("g++") is None:
    pytest.skip("g++ is not found; the kernels are emulated by it", allow_module_level=True)

# n, K, D, E, padding of the rows: the 16-byte path needs rows at multiples of 8 numbers.
NARROW = [
    (1, 1, 40, 0, 0),
    (70, 16, 40, 40, 0),
    (65, 256, 64, 64, 8),
    (67, 100, 80, 24, 3),
    (40, 256, 160, 160, 0),
    (31, 100, 37, 5, 0),
]
WIDE = [
    (130, 256, 320, 24, 0),
    (70, 300, 40, 40, 8),
    (35, 1024, 64, 0, 3),
    (140, 16, 330, 170, 0),
]


@pytest.mark.parametrize("case", NARROW + WIDE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_em_statistics(kernels: Kernels, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    features, bases, payload = em_case(*case, dtype)
    temperature = features.shape[-1] ** 0.5 / 4
    found = kernels.em_statistics(features, bases, payload, temperature)
    check_em(found, features, bases, payload, temperature)


@pytest.mark.parametrize("width", [40, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sharp_softmax_and_bases_as_they_are(
    kernels: Kernels, dtype: torch.dtype, width: int
) -> None:
    features, bases, payload = em_case(50, 20, width, 8, 0, dtype)
    # Bases of 16 bits, or their rounding would be what is measured.
    bases = bases.to(dtype).float()
    found = kernels.em_statistics(features, bases, payload, 0.5, normalize=False)
    check_em(found, features, bases, payload, 0.5, normalize=False)


@pytest.mark.parametrize(
    ("width", "num_bases"),
    [(16, 2), (176, 2), (16, 300)],
    ids=["one kernel", "two products", "many bases"],
)
def test_a_base_of_faint_tokens_has_their_mean(
    kernels: Kernels, width: int, num_bases: int
) -> None:
    # Every token gives the last base exp(-20) = 2e-9, which float16 has no number for.
    features, bases = torch.zeros(1, 1, 60, width).half(), torch.zeros(1, 1, num_bases, width)
    features[..., 0] = 1.0
    bases[..., :-1, 0] = -20.0
    bases[..., 0, 0] = 20.0
    sums, mass, _ = kernels.em_statistics(features, bases, None, 1.0, normalize=False)
    assert float(mass[..., -1]) == pytest.approx(60 * math.exp(-20), rel=1e-2)
    assert float(sums[..., -1, 0] / mass[..., -1]) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(kernels: Kernels, dtype: torch.dtype) -> None:
    features, bases, payload = em_case(0, 20, 40, 8, 0, dtype)
    for result in kernels.em_statistics(features, bases, payload, 1.0):
        assert bool((result == 0).all())


@pytest.mark.parametrize(("num_bases", "width"), [(16, 320), (300, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_tokens_and_of_heads(
    kernels: Kernels, dtype: torch.dtype, num_bases: int, width: int
) -> None:
    features = clustered_tokens((1, 3, 300, width), seed=3).to(dtype)
    payload = clustered_tokens((1, 3, 300, 24), seed=4).to(dtype)
    bases = clustered_tokens((1, 3, num_bases, width), seed=1)
    kernels.chunk_bytes = 2 * 128 * num_bases * dtype.itemsize  # two heads' tiles of tokens
    temperature = width**0.5 / 4
    found = kernels.em_statistics(features, bases, payload, temperature)
    check_em(found, features, bases, payload, temperature)
    again = kernels.em_statistics(features, bases, payload, temperature)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_too_little_shared_memory_for_the_fused_kernel(kernels: Kernels) -> None:
    features, bases, payload = em_case(40, 256, 160, 0, 0, torch.float16)
    kernels.shared_limit = 99 * 1024
    found = kernels.em_statistics(features, bases, payload, 3.0)
    check_em(found, features, bases, payload, 3.0)


@pytest.mark.parametrize("empty", ["zero", "mask"])
@pytest.mark.parametrize(("width", "payload_width"), [(40, 40), (160, 96), (320, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iterations(
    kernels: Kernels, dtype: torch.dtype, width: int, payload_width: int, empty: str
) -> None:
    temperature = width**0.5 / 16
    features = interleaved((1 + clustered_tokens((1, 2, 150, width), seed=5)).to(dtype), 0)
    payload = interleaved(clustered_tokens((1, 2, 150, payload_width), seed=6).to(dtype), 0)
    bases = features[..., ::10, :].float().contiguous()
    if empty == "mask":
        bases[..., :3, :] = -1.0  # away from all tokens
    least = least_mass(150, bases.shape[2])
    found = kernels.soft_em(features, bases, payload, 3, temperature, True, empty == "mask", least)
    double = (features.double(), bases.double(), payload.double())
    exact = soft_em_torch(*double, 3, temperature, True, empty)
    assert torch.equal(found[2] == 0, exact[2] == 0)
    assert bool((exact[2] == 0).any()) == (empty == "mask")
    rounded = rounded_soft_em(
        features, bases, payload, num_iters=3, temperature=temperature, empty=empty
    )
    for result, expected, near in zip(found, exact, rounded, strict=True):
        bound = 2 * max_error(near, expected) + 1e-4 * float(expected.abs().max())
        assert max_error(result, expected) <= bound


@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 64, 24, 0),
        (70, 16, 40, 40, 0),
        (150, 256, 80, 80, 8),
        (33, 300, 160, 160, 0),
        (129, 1024, 40, 24, 3),
        (20, 100, 37, 5, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(
    kernels: Kernels, dtype: torch.dtype, with_bias: bool, case: tuple[int, ...]
) -> None:
    query, key, value, bias = attention_case(*case, dtype)
    given = bias if with_bias else None
    found = kernels.basis_attention(query, key, value, given, case[2] ** -0.5)
    check_attention(found, query, key, value, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_little_memory(kernels: Kernels, dtype: torch.dtype) -> None:
    query, key, value, bias = attention_case(300, 200, 160, 160, 0, dtype)
    whole = kernels.basis_attention(query, key, value, bias, 160**-0.5)
    kernels.shared_limit = 99 * 1024
    kernels.chunk_bytes = 2 * 128 * 200 * dtype.itemsize
    parts = kernels.basis_attention(query, key, value, bias, 160**-0.5)
    check_attention(parts, query, key, value, bias)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("width", "value_width", "padding"), [(80, 80, 0), (77, 65, 3), (75, 70, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_all_bases_stay_on_the_chip_in_little_memory(
    kernels: Kernels, dtype: torch.dtype, width: int, value_width: int, padding: int
) -> None:
    query, key, value, bias = attention_case(300, 256, width, value_width, padding, dtype)
    kernels.multiprocessors = 2
    found = {}
    for name, kilobytes in (("attention_kernel", 227), ("attention_direct_kernel", 99)):
        kernels.shared_limit = kilobytes * 1024
        found[name] = kernels.basis_attention(query, key, value, bias, width**-0.5)
        check_attention(found[name], query, key, value, bias)
        assert kernels.last_kernel() == name
    assert torch.equal(*found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_whose_bases_are_all_excluded(kernels: Kernels, dtype: torch.dtype) -> None:
    query, key, value, bias = attention_case(20, 100, 40, 40, 0, dtype)
    bias = bias.clone()
    bias[:, 1] = float("-inf")
    found = kernels.basis_attention(query, key, value, bias, 1.0)
    assert bool(found[:, :, 0].isfinite().all())
    assert bool(found[:, :, 1].isnan().all())


@pytest.mark.parametrize("lowest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lowest_bias_is_a_bias(kernels: Kernels, dtype: torch.dtype, lowest: bool) -> None:
    query, key, value, bias = attention_case(20, 300, 40, 40, 0, dtype)
    limits = torch.finfo(torch.float32)
    bias = torch.full_like(bias, limits.min if lowest else limits.max)
    for excluded in (300, 3):
        bias[..., excluded:] = float("-inf")
        found = kernels.basis_attention(query, key, value, bias, 40**-0.5)
        plain = [tensor.float() for tensor in (query, key, value)]
        expected = scaled_dot_product_attention(*plain, bias.unsqueeze(-2))
        limit = ATTENTION_ATOL[dtype] * float(expected.abs().max())
        assert max_error(found.transpose(1, 2), expected) <= limit


@pytest.mark.parametrize("sizes", [(70, 16, 40, 24, 0), (33, 5, 37, 45, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_a_correction(
    kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]
) -> None:
    query, key, value, _ = attention_case(*sizes, dtype)
    correction = clustered_tokens((1, 2, sizes[2] + 1, sizes[3]), seed=4) / 6
    mean = 1 + clustered_tokens((2, 2, sizes[2]), seed=5)
    correction = correction.expand(2, -1, -1, -1)

    def eager(dtype: torch.dtype) -> torch.Tensor:
        matrix, constant = correction.to(dtype).split([sizes[2], 1], dim=-2)
        centred = query.to(dtype) - mean.to(dtype).unsqueeze(-2)
        attended = eager_basis_attention(query.to(dtype), key.to(dtype), value.to(dtype))
        return attended + centred @ matrix + constant

    found = kernels.basis_attention(query, key, value, None, sizes[2] ** -0.5, correction, mean)
    exact = eager(torch.float64)
    error = max_error(found.transpose(1, 2), exact)
    assert error <= parity_bound(exact, eager(dtype), ATTENTION_ATOL)


@pytest.mark.parametrize(
    ("m", "n", "width", "value_width", "padding"),
    [(1, 1, 8, 8, 0), (33, 700, 40, 24, 3), (5, 300, 80, 80, 0), (40, 290, 160, 137, 8)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    m: int,
    n: int,
    width: int,
    value_width: int,
    padding: int,
) -> None:
    query, key, value = (
        interleaved(
            (factor * clustered_tokens((2, 2, rows, channels), seed=rows)).to(dtype), padding
        )
        for rows, channels, factor in ((m, width, 1), (n, width, 4), (n, value_width, 1))
    )
    wide = [tensor.double() for tensor in (query, key, value)]
    logits = wide[0] @ wide[1].mT * width**-0.5
    exact, sums = eager_basis_attention(*wide), logits.logsumexp(-1)
    plain = eager_basis_attention(query.float(), key.float(), value.float())
    out, logsumexp = kernels.partial_attention(query, key, value, width**-0.5)
    bound = parity_bound(exact, plain, PARTIAL_ATOL, float(logits.abs().max()))
    assert max_error(out, exact) <= bound
    assert max_error(logsumexp, sums) <= 1e-6 * float(sums.abs().max())


@pytest.mark.parametrize(
    ("n", "m", "width", "padding"),
    [(1, 1, 8, 0), (140, 150, 40, 3), (20, 300, 136, 8), (130, 128, 64, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_token(
    kernels: Kernels, dtype: torch.dtype, n: int, m: int, width: int, padding: int
) -> None:
    query = interleaved(clustered_tokens((1, 2, n, width), seed=1).to(dtype), padding)
    keys = clustered_tokens((1, 2, m, width), seed=2) * torch.linspace(0.1, 5, m).unsqueeze(-1)
    keys = interleaved(keys.to(dtype), padding)
    kernels.chunk_bytes = 128 * m * 4  # float32: one head's tile of queries at a time
    found = kernels.nearest_token(query, keys)
    plain = cosine_loss(query, keys, eager_nearest_token(query, keys))
    assert cosine_loss(query, keys, found) <= 2 * plain + NEAREST_ATOL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_cosines_the_first_counts(kernels: Kernels, dtype: torch.dtype) -> None:
    keys = clustered_tokens((1, 1, 50, 24)).to(dtype)
    keys = torch.cat([keys, 2 * keys, keys, 4 * keys, 0 * keys], dim=2)
    query = clustered_tokens((1, 1, 40, 24), seed=1).to(dtype)
    query[:, :, 7] = NAN
    query[:, :, 8] = 0
    found = kernels.nearest_token(query, keys)
    assert int(found.min()) >= 0
    assert int(found.max()) < 50
    assert found[0, 0, 8] == 0
    assert found.unique().numel() > 5


@pytest.mark.parametrize(("multiprocessors", "ranges"), [(1, 1), (3, 2), (132, 4)])
def test_few_queries_look_through_ranges_of_keys(
    kernels: Kernels, multiprocessors: int, ranges: int
) -> None:
    keys = clustered_tokens((1, 2, 490, 24)).half()
    keys[:, :, 300:] = keys[:, :, :190]  # the first of equal ones is in another range
    query = clustered_tokens((1, 2, 40, 24), seed=1).half()
    query[:, :, 7] = NAN
    kernels.multiprocessors = multiprocessors
    found = kernels.nearest_token(query, keys)
    assert kernels.extra_bytes == (ranges * 2 * 40 * 8 if ranges > 1 else 0)
    kernels.multiprocessors = 1
    assert torch.equal(found, kernels.nearest_token(query, keys))
    assert int(found.max()) < 300


def test_em_makes_parts_for_the_multiprocessors_of_the_gpu(kernels: Kernels) -> None:
    features, bases = clustered_tokens((1, 1, 2048, 40)).half(), clustered_tokens((1, 1, 16, 40))
    extra = {}
    for multiprocessors in (4, 16):
        kernels.multiprocessors = multiprocessors
        found = kernels.em_statistics(features, bases, None, 2.0)
        check_em(found, features, bases, None, 2.0)
        extra[multiprocessors] = kernels.extra_bytes
    part = 16 * (40 + 1) * 4
    assert extra[16] - extra[4] == (32 - 8) * part


@pytest.mark.parametrize("sizes", [(1, 1, 40, 24, 0), (70, 100, 37, 5, 0), (40, 300, 80, 80, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blended_attention(
    kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]
) -> None:
    n, num_bases, width, value_width, padding = sizes
    queries = tuple(
        interleaved(clustered_tokens((2, 2, n, width), seed=seed).to(dtype), padding)
        for seed in (0, 1)
    )
    keys = tuple(
        clustered_tokens((1, 2, num_bases, width), seed=seed).to(dtype).expand(2, -1, -1, -1)
        for seed in (2, 3)
    )
    value = clustered_tokens((1, 2, num_bases, value_width), seed=4).to(dtype)
    value = value.expand(2, -1, -1, -1)
    bias = clustered_tokens((2, num_bases), seed=5)
    bias[:, 1::3] = float("-inf")
    bias = bias.expand(2, -1, -1)
    mask = torch.linspace(-0.5, 1.5, 2 * n).clamp(0, 1).view(2, n)
    maps = (queries[0], keys[0], queries[1], keys[1], value)
    exact = eager_blended_attention(*(tensor.double() for tensor in (*maps, mask)), bias=bias)
    plain = eager_blended_attention(*maps, mask, bias=bias)
    queries[0].masked_fill_((mask == 0)[:, None, :, None], NAN)
    queries[1].masked_fill_((mask == 1)[:, None, :, None], NAN)
    kernels.chunk_bytes = 128 * num_bases * 4
    found = kernels.blended_attention(queries, keys, value, mask, bias, width**-0.5)
    error = max_error(found.transpose(1, 2), exact)
    assert error <= parity_bound(exact, plain, ATTENTION_ATOL)
    if dtype == torch.float32:
        assert error <= 1e-5 * float(exact.abs().max())
