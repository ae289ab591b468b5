"""Attention of video transformers: window, bases by place, their means and moments, the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels.measure import PeakMemory
from stem_kernels.ops.partial_attention import ROUNDING_ATOL, PartialAttention
from stem_kernels.shared.grid import window_counts
from stem_kernels.testing import max_error, parity_bound, tokens_in_window
from stem_kernels.video import (
    merged_attention,
    placed_attention,
    video_attention,
    video_bases,
    window_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GRID = (3, 5, 4)
TOKENS = 60
SMOOTH_GRID = (8, 16, 16)


def near(grid: tuple[int, int, int], window: int) -> torch.Tensor:
    """[n, n]: whether a token is in the window of another."""
    return tokens_in_window(grid, window, DEVICE)


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None = None,
) -> PartialAttention:
    """Attention with a bias [..., n, m], all weights held."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + bias
    return PartialAttention(torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1))


def operands(
    grid: tuple[int, int, int] = GRID, width: int = 8, value_width: int = 6, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head-interleaved queries, keys and values of two videos and three heads."""
    n = grid[0] * grid[1] * grid[2]
    query, key, value = (
        tokens(batch, n, 3, size, seed=seed).transpose(1, 2)
        for seed, size in enumerate((width, width, value_width))
    )
    return query, key, value


def smooth() -> list[torch.Tensor]:
    """Queries, keys and values of features that change smoothly over SMOOTH_GRID, and some noise.

    Queries and keys are rotated by their frame, row and column, as in video transformers.
    """
    generator = torch.Generator().manual_seed(4)
    place = torch.stack(torch.meshgrid(*map(torch.arange, SMOOTH_GRID), indexing="ij"), -1)
    place = place.flatten(0, 2).float()
    waves = torch.tensor([[0.25], [1.0], [1.0]]) * torch.randn(3, 64, generator=generator) * 0.2
    features = torch.cos(place @ waves + 6.3 * torch.rand(1, 64, generator=generator))
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    of_key, of_query, of_value = (torch.randn(64, 32, generator=generator) / 8 for _ in range(3))
    rates = 0.01 ** (torch.arange(16) / 16)
    angles = torch.cat([place[:, axis, None] * rates[axis::3] for axis in range(3)], -1)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(tensor: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(tensor.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    query = rotated(features @ (of_key + of_query / 2))
    key, value = rotated(features @ of_key), features @ of_value
    return [part[None, None].to(DEVICE) for part in (query, key, value)]


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error."""
    return float((found - exact).norm() / exact.norm())


in_torch_too = pytest.mark.parametrize("backend", ["auto", "torch"])


@in_torch_too
@pytest.mark.parametrize("window", [0, 1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_window_is_exact(dtype: torch.dtype, window: int, backend: str) -> None:
    inputs = [tensor.to(dtype) for tensor in operands()]
    outside = torch.zeros(TOKENS, TOKENS, device=DEVICE).masked_fill(
        ~near(GRID, window), float("-inf")
    )
    found = window_attention(*inputs, GRID, window=window, scale=0.7, backend=backend)
    exact = naive(*(tensor.double() for tensor in inputs), outside.double(), 0.7)
    plain = naive(*(tensor.float() for tensor in inputs), outside, 0.7)
    for result, reference, same in zip(found, exact, plain, strict=True):
        assert result.dtype == torch.float32
        bound = parity_bound(reference, same, ROUNDING_ATOL, 30.0)
        assert max_error(result, reference) <= bound


def test_a_window_of_one_frame_and_of_one_row() -> None:
    for grid in ((1, 3, 3), (4, 1, 5), (4, 5, 1), (2, 1, 1)):
        inputs = [tensor.double() for tensor in operands(grid)]
        outside = torch.zeros_like(near(grid, 1), dtype=torch.float64)
        outside = outside.masked_fill(~near(grid, 1), float("-inf"))
        found, exact = window_attention(*inputs, grid, window=1), naive(*inputs, outside)
        assert max(map(max_error, found, exact)) < 1e-12


def test_bases_by_place_are_as_the_formula_says() -> None:
    query, *_ = operands()
    key, value = (tokens(1, 3, 9, size, seed=size) for size in (8, 6))
    bias = tokens(2, 3, 20, 9, seed=7)
    bias[..., ::4] = float("-inf")
    matrix = tokens(2, 1, 8, 6, seed=8)
    double = [tensor.double() for tensor in (query, key, value)]
    exact = naive(*double, bias.double().repeat(1, 1, 3, 1))
    exact = exact._replace(output=exact.output + double[0] @ matrix.double() * 8**-0.5)
    found = placed_attention(query, key, value, bias=bias, matrix=matrix)
    assert max(map(off, found, exact)) < 1e-6
    whole = placed_attention(query, key, value, scale=0.3)
    assert max(map(off, whole, naive(*double, query.new_zeros(()).double(), 0.3))) < 1e-6


def test_a_place_without_bases_is_made_good_by_others() -> None:
    query, key, value = operands()
    bias = torch.zeros(1, 1, 20, TOKENS, device=DEVICE)
    bias[:, :, 3] = float("-inf")
    nothing = placed_attention(query, key, value, bias=bias)
    assert nothing.output[:, :, 3].isnan().all()
    assert (nothing.logsumexp[:, :, 3::20] == float("-inf")).all()
    other = window_attention(query, key, value, GRID)
    merged = merged_attention([nothing, other])
    assert torch.equal(merged.output[:, :, 3::20], other.output[:, :, 3::20])


def test_a_base_is_the_mean_of_its_tokens() -> None:
    _, key, value = operands()
    found = video_bases(key, value, 7)
    assert found.assignment.shape == (2, 3, TOKENS)
    member = torch.nn.functional.one_hot(found.assignment, 7).double()
    counts = member.sum(2)
    share = (member / counts.clamp(min=1).unsqueeze(2)).mT
    means = share @ key.double(), share @ value.double()
    assert off(found.key, means[0]) < 1e-6
    assert off(found.value, means[1]) < 1e-6
    left = [part.double() - member @ mean for part, mean in zip((key, value), means, strict=True)]
    assert off(found.moments, left[0].mT @ left[1] / TOKENS) < 1e-5
    # A window's tokens are counted for each place, in all frames.
    inside = near(GRID, 1).double() @ member
    near_counts, total = window_counts(found.assignment.flatten(0, 1), GRID, 1, 7)
    assert torch.equal(near_counts.double().repeat(1, 3, 1), inside.flatten(0, 1))
    assert torch.equal(total.double(), counts.flatten(0, 1))
    expected = (counts.unsqueeze(2) - inside).log()[:, :, :20]
    assert torch.allclose(found.bias(GRID, 1).double(), expected, atol=1e-6)


def test_means_made_by_products_are_those_made_by_adding() -> None:
    from stem_kernels.reference import video_bases as reference

    _, key, value = (tensor.flatten(0, 1).double() for tensor in operands())
    numbers = torch.arange(TOKENS, device=DEVICE).remainder(7).expand(6, -1)
    added = reference.group_means(numbers, 8, (key, value))

    class Elsewhere:
        """Numbers that say that they are on another device."""

        device = torch.device("meta")
        shape = numbers.shape

        def __getitem__(self, where: Any) -> torch.Tensor:
            return numbers[where]

    arange = torch.arange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "arange", lambda *given, device=None: arange(*given, device=DEVICE))
        multiplied = reference.group_means(Elsewhere(), 8, (key, value))  # type: ignore[arg-type]
    assert max(map(max_error, multiplied, added)) < 1e-12


@in_torch_too
@pytest.mark.parametrize(
    ("num_bases", "window"), [(TOKENS, 1), (1000, 0), (5, 6), (TOKENS, 0)], ids=str
)
def test_all_tokens_or_all_places_are_exact_attention(
    num_bases: int, window: int, backend: str
) -> None:
    inputs = operands()
    text = operands((7, 1, 1))[1:]
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    mask[1, 3:] = False
    options: dict[str, Any] = {"num_bases": num_bases, "window": window, "backend": backend}
    found = video_attention(*inputs, GRID, text=text, text_mask=mask, **options)
    whole = [torch.cat(pair, 2).double() for pair in zip(inputs[1:], text, strict=True)]
    seen = torch.cat([torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE), mask], 1)
    exact = scaled_dot_product_attention(inputs[0].double(), *whole, attn_mask=seen[:, None, None])
    assert found.transpose(1, 2).is_contiguous()
    assert off(found, exact) < 1e-5
    unmasked = video_attention(*inputs, GRID, text=text, **options)
    assert off(unmasked, scaled_dot_product_attention(inputs[0].double(), *whole)) < 1e-5


@in_torch_too
@pytest.mark.parametrize("correction", ["none", "moments"])
def test_bases_stand_for_the_tokens_outside_the_window(correction: str, backend: str) -> None:
    query, key, value = operands()
    bases = video_bases(key, value, 6)
    inside = near(GRID, 1).double()
    member = torch.nn.functional.one_hot(bases.assignment, 6).double()
    # [B, h, n, K] and [B, h, n, K, e]: of each query, the others' number and their mean value.
    others = member.sum(2, keepdim=True) - inside @ member
    sums = (1 - inside) @ torch.einsum("bhmk,bhme->bhmke", member, value.double()).flatten(-2)
    means = sums.unflatten(-1, (6, -1)) / others.clamp(min=1).unsqueeze(-1)
    logits = query.double() @ torch.cat([key.double(), bases.key.double()], 2).mT * 8**-0.5
    exact, of_bases = logits.split([TOKENS, 6], -1)
    seen = torch.cat([exact.masked_fill(inside == 0, float("-inf")), of_bases + others.log()], -1)
    weights, shares = torch.softmax(seen, -1).split([TOKENS, 6], -1)
    expected = weights @ value.double() + torch.einsum("bhnk,bhnke->bhne", shares, means)
    if correction == "moments":
        left = key.double() - member @ bases.key.double()
        spread = (query.double() @ left.mT * 8**-0.5).square().mean((-1, -2), keepdim=True)
        added = query.double() @ bases.moments.double() * 8**-0.5 / (1 + spread).sqrt()
        expected = expected + shares.sum(-1, keepdim=True) * added
    found = video_attention(
        query, key, value, GRID, num_bases=6, window=1, correction=correction, backend=backend
    )
    assert off(found, expected) < 1e-6


def test_a_window_and_the_others_by_place_merge_to_all() -> None:
    query, key, value = operands()
    bias = torch.zeros(20, TOKENS, device=DEVICE)
    bias = bias.masked_fill(near(GRID, 1)[:20], float("-inf")).expand(1, 1, -1, -1)
    parts = [
        window_attention(query, key, value, GRID, window=1),
        placed_attention(query, key, value, bias=bias),
    ]
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert off(merged_attention(parts).output, exact) < 1e-6


def test_each_part_brings_it_nearer() -> None:
    query, key, value = smooth()
    exact = scaled_dot_product_attention(query, key, value)

    def error(**options: Any) -> float:
        settings = {"num_bases": 64, "window": 1, **options}
        return off(video_attention(query, key, value, SMOOTH_GRID, **settings), exact)

    whole = error()
    assert whole < 0.02
    assert error(num_bases=256) < 0.7 * whole
    assert error(correction="none") > 1.7 * whole
    assert error(window=0) > 1.15 * whole
    assert error(num_iters=0) > 1.15 * whole
    assert error(sample_per_base=None) == pytest.approx(whole, rel=0.2)


def test_extremes_stay_within_reach_of_the_values() -> None:
    query, key, value = operands()
    for factor in (0.0, 1e3):  # queries that see no difference, and such that see one key alone
        found = video_attention(factor * query, key, value, GRID, num_bases=6)
        assert found.isfinite().all()
        assert float(found.abs().max()) < 3 * float(value.abs().max())
    for same in (torch.ones_like(key), torch.zeros_like(key)):
        mean = value.mean(2, keepdim=True).expand_as(value)
        assert off(video_attention(query, same, value, GRID, num_bases=6), mean) < 1e-5
    one = [tensor[:, :, :1] for tensor in (query, key, value)]
    assert torch.equal(video_attention(*one, (1, 1, 1), num_bases=1), one[2])


def test_equal_calls_give_equal_bits_and_half_precision_is_near() -> None:
    inputs = operands()
    once, again = (video_attention(*inputs, GRID, num_bases=6) for _ in range(2))
    assert torch.equal(once, again)
    half = video_attention(*(tensor.bfloat16() for tensor in inputs), GRID, num_bases=TOKENS)
    assert half.dtype == torch.bfloat16
    exact = scaled_dot_product_attention(*(tensor.bfloat16().double() for tensor in inputs))
    assert off(half, exact) < 8e-3


@pytest.mark.usefixtures("mapped_blocks")
def test_peak_memory_does_not_hold_the_weights() -> None:
    grid = (8, 16, 16)  # weights of the window alone have 2^25 bytes a head
    inputs = operands(grid, 16, 16, batch=1)
    video_attention(*inputs, grid, num_bases=64)
    with PeakMemory(DEVICE) as memory:
        video_attention(*inputs, grid, num_bases=64)
    assert memory.extra_bytes is not None
    assert memory.extra_bytes <= 2**23


def test_derivatives_pass_through_it() -> None:
    grid = (2, 2, 3)
    inputs = [tensor[:1, :1].double().cpu() for tensor in operands(grid, 3, 2)]
    text = [tensor[:1, :1].double().cpu() for tensor in operands((2, 1, 1), 3, 2)[1:]]

    def attended(*given: torch.Tensor) -> torch.Tensor:
        return video_attention(*given[:3], grid, num_bases=4, window=0, text=(given[3], given[4]))

    leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, *text)]
    assert torch.autograd.gradcheck(attended, leaves)


def test_it_compiles_to_one_graph() -> None:
    inputs = operands()
    torch._dynamo.reset()
    compiled = torch.compile(video_attention, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs, GRID, num_bases=6)
    assert torch.equal(found, video_attention(*inputs, GRID, num_bases=6))
    torch._dynamo.reset()  # sizes that change would be symbols
    compiled = torch.compile(video_attention, fullgraph=True, backend="eager")
    grid = (2, 1, 2)
    inputs = [part.requires_grad_() for part in operands(grid, batch=1)]
    found = compiled(*inputs, grid, num_bases=2, window=0)
    assert found.requires_grad
    torch.testing.assert_close(found, video_attention(*inputs, grid, num_bases=2, window=0))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(part) for part in inputs]
        assert video_attention(*fake, grid, num_bases=2).shape == found.shape


Q = torch.zeros(2, 3, 12, 4)
GRID_OF_Q = (2, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: window_attention(Q, Q, Q, (2, 2, 2)), ValueError, "whose product is the 12"),
        (lambda: window_attention(Q, Q[:1], Q, GRID_OF_Q), ValueError, r"query and key must be"),
        (lambda: window_attention(Q, Q.half(), Q, GRID_OF_Q), TypeError, "must have one dtype"),
        (lambda: window_attention(Q, Q, Q, GRID_OF_Q, window=-1), ValueError, "window is -1"),
        (
            lambda: placed_attention(Q, Q, Q, bias=Q[..., :5, :]),
            ValueError,
            r"bias is \[2, 3, 5, 4\]; its last sizes must be P and K = 12",
        ),
        (
            lambda: placed_attention(Q, Q, Q, matrix=Q[0]),
            ValueError,
            r"matrix is \[3, 12, 4\]; it must have four sizes",
        ),
        (lambda: placed_attention(Q, Q, Q, matrix=Q), ValueError, "those of query and value, 4"),
        (lambda: video_bases(Q, Q, 0), ValueError, "num_bases is 0"),
        (lambda: video_bases(Q, Q[:1], 2), ValueError, r"key must be \[B, h, n, d\]"),
        (lambda: video_bases(Q, Q, 2, num_iters=-1), ValueError, "num_iters is -1"),
        (
            lambda: video_attention(Q, Q, Q, GRID_OF_Q, num_bases=2, correction="joint"),
            ValueError,
            'correction is "joint"',
        ),
        (
            lambda: video_attention(Q, Q, Q, GRID_OF_Q, num_bases=2, text=(Q[:1], Q)),
            ValueError,
            r"text must be keys \[2, 3, T, 4\]",
        ),
        (
            lambda: video_attention(
                Q, Q, Q, GRID_OF_Q, num_bases=2, text=(Q, Q), text_mask=Q[:, 0, :, 0]
            ),
            ValueError,
            r"text_mask is \[2, 12\] of torch.float32",
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
