"""Where EM starts: tokens from everywhere, or normals of a seed, a layer and a timestep."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, tokens

from stem_kernels import initial_bases, standard_normals
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import max_error


def test_initial_bases() -> None:
    features = tokens(2, 30, 4)
    spread = initial_bases(features, 10, init="tokens")
    index = spread_tokens(30, 10, torch.device(DEVICE))
    assert torch.equal(spread, features[:, index])
    repeated = initial_bases(features[:, :2], 4, init="tokens")
    assert torch.equal(repeated, features[:, [0, 0, 1, 1]])
    normals = torch.randn(10, 4, device=DEVICE)
    gaussian = initial_bases(features, 10, init="gaussian", normals=normals)
    expected = features.mean(1, keepdim=True) + features.std(1, keepdim=True) * normals
    assert max_error(gaussian, expected) < 1e-6
    assert initial_bases(features[:, :1], 10, init="gaussian", normals=normals).isfinite().all()
    with pytest.raises(ValueError, match='init="gaussian" needs the argument normals'):
        initial_bases(features, 10, init="gaussian")
    with pytest.raises(ValueError, match=r"normals is \[9, 4\]; it must broadcast to \[2, 10, 4\]"):
        initial_bases(features, 10, init="gaussian", normals=normals[:9])


@pytest.mark.parametrize(("n", "count"), [(7, 7), (100, 99), (4096 * 32, 256), (2**23 + 5, 8192)])
@pytest.mark.parametrize("other", [False, True])
def test_spread_tokens_come_from_everywhere(n: int, count: int, other: bool) -> None:
    index = spread_tokens(n, count, torch.device("cpu"), other=other)
    edges = [k * n // count for k in range(count + 1)]
    stretches = zip(edges[:-1], index.tolist(), edges[1:], strict=True)
    assert all(start <= chosen < end for start, chosen, end in stretches)


def test_spread_tokens_are_not_of_one_column() -> None:
    columns = spread_tokens(32 * 64 * 64, 256, torch.device("cpu")) % 64
    assert torch.bincount(columns, minlength=64).min() >= 1


def test_normals_depend_on_seed_layer_and_timestep_alone() -> None:
    at = torch.tensor
    before = torch.random.get_rng_state()
    both = standard_normals(at(21), [6, 8], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(both[:6], standard_normals(at(21), [6, 3], seed=3)[:6])
    assert not torch.equal(both[:6], both[6:12])
    assert torch.equal(both, standard_normals(at([21.0, 21.0]), [6, 8], seed=3))
    for other in (
        standard_normals(at(1), [6, 8], seed=3),
        standard_normals(at(21), [6, 8], seed=4),
    ):
        assert not torch.equal(both, other)
    many = standard_normals(at(1), [100_000], seed=0)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
