"""The drop-in for SDPA: its arguments, when it is exact, and what tells how far off it is."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, tokens

from stem_kernels import BackendError, attention_error, stem_attention, triton
from stem_kernels.ops.stem_attention import exact_is_cheaper
from stem_kernels.testing import max_error

X = torch.zeros(2, 10, 4)
Q = torch.zeros(2, 3, 10, 4)
WIDE = torch.zeros(2, 3, 10, 5)


@pytest.mark.parametrize("space", [1, 2])
def test_dense_attention_is_the_limit_of_a_base_per_token(space: int) -> None:
    query, key, value = (tokens(1, space, 40, 16, seed=seed) for seed in (0, 1, 2))
    key = key / key.norm(dim=-1, keepdim=True)
    out = stem_attention(
        query, key, value, num_bases=40, num_iters=1, temperature=1e-3, allow_exact=False
    )
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert max_error(out, dense) < 2e-3


def test_it_takes_the_arguments_of_sdpa() -> None:
    query, key, value = (tokens(1, 2, 300, 16, seed=seed) for seed in (0, 1, 2))
    out = stem_attention(query, key, value, None, 0.0, False, scale=0.2, enable_gqa=False)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.2)
    assert torch.equal(out, dense)  # 300 tokens are fewer than 3.5 times the bases


def test_it_is_exact_where_that_is_no_dearer() -> None:
    def exact(n: int, m: int, num_bases: int = 256, num_iters: int = 2) -> bool:
        return exact_is_cheaper(n, m, 40, 40, num_bases=num_bases, num_iters=num_iters)

    assert exact(896, 896)
    assert not exact(897, 897)
    assert exact(10**6, 256)
    assert not exact(10**6, 257)
    assert exact(1, 10**6)  # EM over a million keys does not pay for one query
    assert exact(1664, 1664, num_iters=5)
    query, key, value = (tokens(1, 2, 57, 8, seed=seed) for seed in (0, 1, 2))
    settings = {"num_bases": 16, "scale": 0.5, "calibration": "none"}
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    assert not torch.equal(stem_attention(query, key, value, **settings), dense)
    few = [tensor[:, :, :56] for tensor in (query, key, value)]  # 3.5 times the bases
    dense = torch.nn.functional.scaled_dot_product_attention(*few, scale=0.5)
    assert torch.equal(stem_attention(*few, **settings), dense)
    assert not torch.equal(stem_attention(*few, allow_exact=False, **settings), dense)
    with torch.autocast(DEVICE, torch.bfloat16):
        dense = torch.nn.functional.scaled_dot_product_attention(*few, scale=0.5)
        assert torch.equal(stem_attention(*few, **settings), dense)


@pytest.mark.parametrize("shared", [False, True])
def test_a_calibration_brings_it_nearer(backend: str, shared: bool) -> None:
    coarse = torch.randn((2, 24, 4, 4), generator=torch.Generator().manual_seed(0))
    grid = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").flatten(2).mT
    weights = torch.randn((3, 24, 24), generator=torch.Generator().manual_seed(1)) / 24**0.5
    query, key, value = (
        (2 * grid @ weight).unflatten(-1, (2, 12)).transpose(1, 2).to(DEVICE) for weight in weights
    )
    if shared:  # the keys of one row of the batch serve both
        key, value = key[:1], value[:1]
    errors = {
        form: attention_error(
            query, key, value, num_bases=16, calibration=form, num_queries=128, backend=backend
        ).overall
        for form in ("none", "moments", "linear", "joint")
    }
    assert errors["moments"] < 0.95 * errors["none"]
    assert errors["linear"] < 0.6 * errors["none"]
    assert errors["joint"] < 0.4 * errors["none"]
    nothing = stem_attention(
        query[:, :, :0], key, value, num_bases=16, calibration="joint", allow_exact=False
    )
    assert nothing.shape == query[:, :, :0].shape


@pytest.mark.parametrize("calibration", ["none", "moments", "linear", "joint"])
def test_no_queries_attend_to_nothing(calibration: str) -> None:
    key, value = tokens(1, 2, 300, 8), tokens(1, 2, 300, 5)
    found = stem_attention(
        key[:, :, :0], key, value, num_bases=4, allow_exact=False, calibration=calibration
    )
    assert found.shape == (1, 2, 0, 5)


def test_a_calibration_counts_where_it_is_asked_whether_to_be_exact() -> None:
    def exact(n: int, calibrating: int) -> bool:
        return exact_is_cheaper(
            *(n, n, 40, 40),
            num_bases=256,
            num_iters=2,
            corrected=calibrating > 0,
            calibrating=calibrating,
        )

    assert exact(896, 0)
    assert not exact(897, 0)
    assert exact(1172, 256)
    assert not exact(1173, 256)


def test_attention_error_is_that_of_stem_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tokens(2, 3, 400, 16, seed=seed) for seed in (0, 1, 2))
    value[0, 0] = 0.0
    settings = {"num_bases": 24, "scale": 0.3, "seed": 4, "init": "gaussian"}
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    difference = stem_attention(query, key, value, **settings) - dense
    found = attention_error(query, key, value, **settings)
    assert found.overall == pytest.approx(float(difference.norm() / dense.norm()), rel=1e-4)
    heads = difference.norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
    assert heads[0, 0].isnan()
    assert found.worst_head == pytest.approx(float(heads.nan_to_num().max()), rel=1e-4)
    assert found.worst_head > found.overall > 1e-3
    monkeypatch.setattr("stem_kernels.ops.attention_error.CHUNK_LOGITS", 6 * 400 * 7)
    assert attention_error(query, key, value, **settings) == pytest.approx(found, rel=1e-4)
    assert attention_error(query, key, value).worst_head < 1e-6  # exact
    assert attention_error(query, key, 0 * value, num_bases=24) == (0.0, 0.0)
    half = [tensor.half() for tensor in (query, key, value)]
    assert 1e-6 < attention_error(*half).overall < 1e-3
    with pytest.raises(ValueError, match="is_causal must be False"):
        attention_error(query, key, value, is_causal=True)


@pytest.mark.parametrize(
    "own", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_that_it_gives_sdpa(asked: torch.dtype, own: torch.dtype) -> None:
    query, key, value = (tokens(1, 2, 60, 8, seed=seed).to(own) for seed in range(3))
    inexact = {"num_bases": 8, "allow_exact": False}
    with torch.autocast(DEVICE, dtype=asked):
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        found = stem_attention(query, key, value, **inexact)
        torch.testing.assert_close(stem_attention(query, key, value), exact, rtol=1e-6, atol=1e-6)
        mixed = stem_attention(query, key.float(), value, **inexact) if own == asked else found
    assert found.dtype == exact.dtype
    cast = [tensor.to(exact.dtype) for tensor in (query, key, value)]
    torch.testing.assert_close(found, stem_attention(*cast, **inexact), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, mixed, rtol=1e-6, atol=1e-6)


def forbid_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_reached(*arguments: object, **options: object) -> None:
        raise AssertionError("a step ran")

    for name in ("initial_bases", "attended_bases", "exact_attention"):
        monkeypatch.setattr(f"stem_kernels.ops.stem_attention.{name}", not_reached)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stem_attention(Q, Q, Q, Q[..., :1]), ValueError, "attn_mask must be None"),
        (lambda: stem_attention(Q, Q, Q, dropout_p=0.1), ValueError, "dropout_p is 0.1; it must"),
        (lambda: stem_attention(Q, Q, Q, is_causal=True), ValueError, "is_causal must be False"),
        (
            lambda: stem_attention(Q, Q[:, :1], Q[:, :1], enable_gqa=True),
            ValueError,
            "enable_gqa must be False; repeat the heads",
        ),
        (
            lambda: stem_attention(Q, Q, Q[:, :, :9]),
            ValueError,
            r"\[2, 3, 10, 4\] and \[2, 3, 9, 4",
        ),
        (lambda: stem_attention(Q, WIDE, Q), ValueError, r"key \[B or 1, h, m, d\]"),
        (lambda: stem_attention(Q, Q[:, :1], Q[:, :1]), ValueError, r"key \[B or 1, h, m, d\]"),
        (lambda: stem_attention(Q[:1], Q, Q), ValueError, r"key \[B or 1, h, m, d\]"),
        (lambda: stem_attention(Q, Q[:, :, :0], Q[:, :, :0]), ValueError, "m and d at least 1"),
        (lambda: stem_attention(X, X, X), ValueError, "unsqueeze adds a leading size"),
        (lambda: stem_attention(Q, Q, Q.half()), TypeError, "must have one dtype"),
        (lambda: stem_attention(Q, Q, Q.to("meta")), ValueError, "must be on one device"),
        (lambda: stem_attention(Q, Q, Q, num_bases=0), ValueError, "num_bases is 0; it must"),
        (lambda: stem_attention(Q, Q, Q, num_iters=0), ValueError, "num_iters is 0; it must"),
        (lambda: stem_attention(Q, Q, Q, temperature=0.0), ValueError, "temperature is 0.0; it"),
        (lambda: stem_attention(Q, Q, Q, init="previous"), ValueError, 'init is "previous"'),
        (lambda: stem_attention(Q, Q, Q, seed=2**63), ValueError, "seed is 9223372036854775808"),
        (lambda: stem_attention(Q, Q, Q, calibration="both"), ValueError, 'calibration is "both"'),
        (lambda: stem_attention(Q, Q, Q, num_queries=0), ValueError, "num_queries is 0; it must"),
        (lambda: stem_attention(Q, Q, Q, empty="drop"), ValueError, 'empty is "drop"'),
        (lambda: stem_attention(Q, Q, Q, backend="tirton"), ValueError, 'backend is "tirton"'),
    ],
)
def test_everything_is_checked_before_em(  # type: ignore[no-untyped-def]
    call, error, message, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_all_steps(monkeypatch)
    with pytest.raises(error, match=message):
        call()


def test_both_steps_backends_are_asked_before_em(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "import_error", lambda: None)
    forbid_all_steps(monkeypatch)
    query = Q.clone().requires_grad_()  # EM on key and value could run
    with pytest.raises(BackendError, match=r"(?s)basis_attention cannot run.*query require"):
        stem_attention(query, Q, Q, allow_exact=False, backend="triton")
