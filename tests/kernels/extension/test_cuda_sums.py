"""Sums over many tokens in the CUDA kernels, by an emulator that truncates as tensor cores do."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from cuda_emulator import Kernels
from cuda_emulator.cases import check_em

from stem_kernels.testing import clustered_tokens, max_error

if shutil.which("g++") is None:
    pytest.skip("g++ is not found; the kernels are emulated by it", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_over_many_tokens_stay_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    """Equal tokens, each sum of which is rounded, or truncated, the same way, by one block each."""
    kernels.multiprocessors = 1
    n, num_bases, width = 5_000 if dtype == torch.float32 else 40_000, 3, 8
    features = torch.full((1, 2, n, width), 0.7, dtype=dtype)
    value = float(features[0, 0, 0, 0])
    # Responsibilities are rounded to the tokens' dtype, in a unit of 2^-15 in float16.
    share = float(torch.tensor(2**15 / num_bases).to(dtype)) / 2**15
    sums, mass, _ = kernels.em_statistics(
        features, torch.ones(1, 2, num_bases, width), None, temperature=1.0
    )
    assert float((mass / (n / num_bases) - 1).abs().max()) <= 1e-5
    near = 1e-5 if dtype == torch.float32 else 2e-5
    assert float((sums / (n * share * value) - 1).abs().max()) <= near
    out, logsumexp = kernels.partial_attention(features[:, :, :1], features, features, 1.0)
    assert float((out / value - 1).abs().max()) <= 1e-5
    total = (logsumexp.double() - width * value**2 - math.log(n)).exp()
    assert float((total - 1).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("width", "dtype", "fewest", "most"),
    [(40, torch.float16, 2, 24), (176, torch.float16, 1, 3), (24, torch.float32, 1, 3)],
    ids=["one kernel", "two products", "float32"],
)
def test_no_sum_has_more_additions_than_are_allowed(
    kernels: Kernels, width: int, dtype: torch.dtype, fewest: int, most: int
) -> None:
    kernels.multiprocessors = 1
    n, num_bases = 1500, 16
    kernels.chunk_bytes = 128 * num_bases * dtype.itemsize  # twelve chunks
    features = clustered_tokens((1, 1, n, width), seed=3).to(dtype)
    bases = clustered_tokens((1, 1, num_bases, width), seed=1)
    extra = {}
    for longest in (1024, 4):
        kernels.longest_sum = longest
        found = kernels.em_statistics(features, bases, None, 2.0)
        check_em(found, features, bases, None, 2.0)
        extra[longest] = kernels.extra_bytes
    assert extra[4] - extra[1024] == (most - fewest) * num_bases * (width + 1) * 4


def test_partial_attention_splits_many_keys(kernels: Kernels) -> None:
    kernels.multiprocessors = 1
    query, key = clustered_tokens((1, 2, 5, 16)), clustered_tokens((1, 2, 3000, 16), seed=1)
    found, extra = {}, {}
    for longest in (1024, 8):
        kernels.longest_sum = longest
        found[longest] = kernels.partial_attention(query, key, key, 0.25)
        extra[longest] = kernels.extra_bytes
    assert extra[8] - extra[1024] == (12 - 4) * 2 * 5 * (16 + 2) * 4
    for one, other in zip(found[8], found[1024], strict=True):
        assert max_error(one, other) <= 1e-6 * float(other.abs().max())
