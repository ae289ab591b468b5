"""Kernels of video transformers against float64: Triton's, and the extension's for CPUs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BACKENDS, DEVICE, INTERPRETED, tokens

from stem_kernels import nearest_token, soft_em
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.partial_attention import ROUNDING_ATOL as PARTIAL_ATOL
from stem_kernels.ops.video_attention import video_attention_by_extension
from stem_kernels.reference.video_attention import video_attention_torch
from stem_kernels.reference.window_attention import window_attention_torch
from stem_kernels.testing import (
    cosine_loss,
    eager_em_statistics,
    max_error,
    parity_bound,
)
from stem_kernels.video import video_attention, window_attention

pytest.importorskip("triton")
from stem_kernels.triton.video.patches import patch_for

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
in_triton = pytest.mark.skipif(
    "triton" not in BACKENDS, reason="Triton's kernels need a GPU or its interpreter"
)
in_each = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=in_triton),
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                "cuda" not in BACKENDS or DEVICE != "cpu",
                reason="the extension's kernels of video are for CPUs, and built",
            ),
        ),
    ],
)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A video of two heads."""

    grid: tuple[int, int, int]
    window: int
    width: int
    value_width: int
    dtype: torch.dtype
    num_bases: int
    text: int = 0

    def operands(self) -> list[torch.Tensor]:
        """Queries, keys and values, heads beside one another."""
        sizes = (self.width, self.width, self.value_width)
        drawn = (tokens(1, math.prod(self.grid), 2, size, seed=size) for size in sizes)
        return [part.transpose(1, 2).to(self.dtype) for part in drawn]

    def texts(self) -> tuple[Any, ...]:
        """Keys and values of the text and a mask, or None of each."""
        if not self.text:
            return None, None, None
        key, value = (
            tokens(1, 2, self.text, size, seed=9).to(self.dtype)
            for size in (self.width, self.value_width)
        )
        mask = torch.arange(self.text, device=DEVICE) % 3 != 1
        return key, value, mask.unsqueeze(0)


CASES = [
    Case((3, 5, 4), 1, 8, 6, SINGLE, 7, text=5),
    Case((2, 7, 9), 2, 40, 24, HALF, 20),
    Case((5, 3, 4), 1, 72, 80, BRAIN, 11, text=20),
    Case((7, 4, 1), 9, 16, 16, HALF, 3),  # a window beyond the picture, and a tile of places
    Case((1, 9, 9), 4, 16, 20, SINGLE, 9),  # the keys of a patch in several parts
    Case((67, 2, 1), 0, 24, 8, BRAIN, 20),  # more frames than a tile has queries
]


@in_each
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window(case: Case, backend: str) -> None:
    inputs = case.operands()
    options: dict[str, Any] = {"window": case.window, "scale": 0.4, "backend": backend}
    found, again = (window_attention(*inputs, case.grid, **options) for _ in range(2))
    double = (part.double() for part in inputs)
    exact = window_attention_torch(*double, case.grid, case.window, 0.4)
    plain = (part.double() for part in inputs) if case.dtype != SINGLE else inputs
    same = window_attention_torch(*plain, case.grid, case.window, 0.4)
    for result, other, reference, near in zip(found, again, exact, same, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, other)
        # Weights are rounded to the inputs' dtype for the product with the values.
        rounding = PARTIAL_ATOL if result is found.logsumexp else ROUNDING_ATOL
        bound = rounding[case.dtype] * float(reference.abs().max()) + 2 * max_error(near, reference)
        assert max_error(result, reference) <= bound + 30 * torch.finfo(SINGLE).eps


@in_each
@pytest.mark.parametrize(
    ("case", "corrected"),
    [
        *((case, number % 3 != 1) for number, case in enumerate(CASES)),
        *(
            pytest.param(case, number % 3 == 1, marks=pytest.mark.long)
            for number, case in enumerate(CASES)
        ),
    ],
    ids=str,
)
def test_window_bases_and_text(case: Case, corrected: bool, backend: str) -> None:
    from stem_kernels.triton.video.attention import video_attention_triton

    attention = video_attention_triton if backend == "triton" else video_attention_by_extension
    inputs, texts = case.operands(), case.texts()
    count = math.prod(case.grid)
    numbers = torch.arange(count, device=DEVICE).mul(7).remainder(case.num_bases + 3)
    numbers = numbers.clamp(max=case.num_bases - 1).expand(1, 2, -1)  # bases of unlike sizes
    rest = (list(case.grid), case.window, case.num_bases, corrected, case.width**-0.5)
    found = attention(*inputs, numbers, *texts, *rest)
    assert torch.equal(found, attention(*inputs, numbers, *texts, *rest))

    def doubled(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.double()

    key, value, mask = texts
    double = [part.double() for part in inputs]
    exact = video_attention_torch(*double, numbers, doubled(key), doubled(value), mask, *rest)
    plain = video_attention_torch(*inputs, numbers, *texts, *rest)
    assert found.dtype == case.dtype
    assert max_error(found, exact) <= parity_bound(exact, plain, ROUNDING_ATOL, 30.0)


@in_triton
def test_as_many_bases_as_tokens_are_exact_attention() -> None:
    case = Case((3, 4, 3), 1, 32, 32, HALF, 36)
    inputs = case.operands()
    found = video_attention(*inputs, case.grid, num_bases=99, backend="triton")
    exact = torch.nn.functional.scaled_dot_product_attention(*(part.double() for part in inputs))
    assert max_error(found, exact) <= ROUNDING_ATOL[HALF] * float(exact.abs().max())


@in_triton
def test_logits_far_apart_stay_within_reach_of_the_values() -> None:
    query, key, value = Case((2, 3, 4), 1, 16, 16, SINGLE, 5).operands()
    for factor in (0.0, 1e3, -1e3):
        found = video_attention(factor * query, key, value, (2, 3, 4), num_bases=5)
        assert found.isfinite().all()
        assert float(found.abs().max()) < 3 * float(value.abs().max())


@in_each
@pytest.mark.parametrize("default", [torch.float64, BRAIN], ids=str)
def test_the_default_dtype_changes_nothing(default: torch.dtype, backend: str) -> None:
    case = CASES[0]
    query, key, value = case.operands()
    text_key, text_value, mask = case.texts()

    def attended() -> torch.Tensor:
        return video_attention(
            query, key, value, case.grid, num_bases=7, window=1, text=(text_key, text_value),
            text_mask=mask, backend=backend,
        )  # fmt: skip

    expected = attended()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(attended(), expected)
    finally:
        torch.set_default_dtype(SINGLE)


@in_each
def test_bases_without_tokens_do_not_count_as_the_largest(backend: str) -> None:
    # Every logit is -128, but that of an empty base's mean key, 0, would be 0.
    query, key = (torch.full((1, 1, 16, 64), of, device=DEVICE) for of in (-8.0, 2.0))
    value = tokens(1, 1, 16, 8)
    found = video_attention(query, key, value, (1, 4, 4), num_bases=4, window=0, backend=backend)
    assert max_error(found, value.mean(-2, keepdim=True).expand(value.shape)) < 1e-5


@in_triton
def test_wide_heads_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_kernels.triton.video import attention

    def fail(*arguments: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(attention, "window_attention_triton", fail)
    wide = Case((1, 2, 3), 1, 136, 8, SINGLE, 2).operands()
    window_attention(*wide, (1, 2, 3), backend="triton")
    query, key, value = Case((1, 2, 3), 1, 16, 16, SINGLE, 2).operands()
    query.requires_grad_()
    assert window_attention(query, key, value, (1, 2, 3)).output.requires_grad
    with pytest.raises(RuntimeError, match=r"query require\(s\) grad and it has no backward pass"):
        window_attention(query, key, value, (1, 2, 3), backend="triton")


def test_a_patch_is_the_one_of_fewest_products() -> None:
    # Wan 2.1 at 480p: 126 queries of a tile's 128, and keys of 3 frames, 60 of 64 places.
    found = patch_for((21, 30, 52), (1, 1), 128, 64, 1024, False)
    assert found == (3, 2, 21, 3, 1)
    assert found.tiles((21, 30, 52)) == (1, 10, 26)
    # A prime number of frames has no equal steps but of one; a tail allows others.
    assert patch_for((13, 30, 45), (1, 1), 128, 64, 549, False).key_frames == 1
    assert patch_for((13, 30, 45), (1, 1), 128, 64, 549, True).key_frames == 2
    wide = patch_for((4, 30, 52), (6, 6), 64, 32, 100, True)
    places = (wide.rows + 12) * (wide.columns + 12)
    assert wide.key_frames == 1
    assert wide.parts == math.ceil(places / 32)
    for grid in ((1, 1, 1), (100, 1, 2), (3, 200, 1)):
        one = patch_for(grid, (0, 0), 64, 32, 1, True)
        assert one.rows * one.columns * one.query_frames <= 64


@in_triton
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_many_bases_of_narrow_tokens(dtype: torch.dtype) -> None:
    features = (1 + tokens(1, 300, 2, 40, seed=3)).transpose(1, 2).to(dtype)
    bases = features[:, :, :270].float()
    found = soft_em(features, bases, num_iters=1, temperature=0.5, empty="zero", backend="triton")
    exact = eager_em_statistics(features.double(), bases.double(), temperature=0.5)
    plain = eager_em_statistics(features, bases, temperature=0.5)
    expected, near = (part.sums / (part.mass + 1e-4).unsqueeze(-1) for part in (exact, plain))
    bound = 2 * max_error(near, expected) + ROUNDING_ATOL[dtype] * float(expected.abs().max())
    assert max_error(found.bases, expected) <= bound
    bound = 2 * max_error(plain.mass, exact.mass) + ROUNDING_ATOL[dtype] * float(exact.mass.max())
    assert max_error(found.mass, exact.mass) <= bound


@in_triton
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_nearest_of_narrow_tokens(dtype: torch.dtype) -> None:
    query, keys = tokens(2, 300, 40).to(dtype), tokens(2, 150, 40, seed=1).to(dtype)
    keys[:, 140] = keys[:, 3]  # of equal ones the first counts
    found = nearest_token(query, keys, backend="triton")
    assert cosine_loss(query, keys, found) <= 1e-6
    assert not (found == 140).any()
    nothing = nearest_token(query * float("nan"), keys, backend="triton")
    assert (nothing == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
def test_launches_of_a_video() -> None:
    from benchmarks.counting import launch_counts as counts

    query = torch.empty(1, 2520, 4, 128, dtype=HALF, device="meta").transpose(1, 2)
    # Tensors without data: whatever read a value on the host would raise.
    with counts.recorded(counts.ARCH) as launched, counts.TorchKernels() as of_torch:
        out = video_attention(query, query, query, (21, 10, 12), num_bases=300, backend="triton")
    assert out.shape == query.shape
    assert [launch.name for launch in launched] == [
        "directions", *("many_mass", "many_sums", "update") * 2, "nearest_narrow", "means",
        *("products_of_tokens",) * 3, "window_attention",
    ]  # fmt: skip
    assert of_torch.found.total() <= 40
