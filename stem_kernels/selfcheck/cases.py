"""The shapes on which operators are checked, one of each kind of kernel that they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..ops import (
    basis_attention,
    blended_attention,
    calibration,
    em_statistics,
    em_update,
    nearest_token,
    partial_attention,
    projected_attention,
    soft_em,
    video_attention,
    window_attention,
)
from ..shared.bases import least_mass, m_step
from ..testing import (
    clustered_tokens,
    cosine_loss,
    eager_basis_attention,
    eager_blended_attention,
    eager_em_statistics,
    eager_moments,
    eager_nearest_token,
    eager_projected_attention,
    eager_video_attention,
    eager_window_attention,
    max_error,
    parity_bound,
    tokens_in_window,
)

HEAD_WIDTHS = (40, 64, 80, 160)
PASSES = ((40, 256), (160, 256), (320, 256), (40, 300))
"""Widths of tokens and numbers of bases, one for each pass of EM."""
TOKENS = 777
HEADS = 3
GRID, WINDOW, BASES, VIDEO_WIDTHS = (3, 9, 10), 1, 7, (40, 128)
"""A video of three frames, and the widths of its heads: Triton serves up to 128."""

Outputs = tuple[torch.Tensor, ...]


class Case(NamedTuple):
    """A call by a backend's name, and the errors and bounds of what it gave."""

    call: Callable[[str], Outputs]
    judge: Callable[[Outputs], list[tuple[float, float]]]


def _judge(
    exact: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    rounding: dict[torch.dtype, float],
    dtype: torch.dtype,
    largest_logit: float = 0.0,
) -> Callable[[Outputs], list[tuple[float, float]]]:
    # The operators' tables end at float32; float64 has its own rounding only.
    tolerance = {torch.float64: 1e-12, **rounding}[dtype]
    if dtype == torch.float64:
        largest_logit = 0.0

    def judge(found: Outputs) -> list[tuple[float, float]]:
        return [
            (
                max_error(ours, right),
                parity_bound(right, same, {same.dtype: tolerance}, largest_logit),
            )
            for ours, right, same in zip(found, exact, plain, strict=True)
        ]

    return judge


def _tokens(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(device, dtype)


def _of_em(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Outputs, Outputs, float]]:
    """Tokens, bases, payload, exact sums, those of plain torch, and the largest logit."""
    for width, num_bases in PASSES:
        features = _tokens(device, dtype, 2, TOKENS, width)
        payload = _tokens(device, dtype, 2, TOKENS, 24, seed=1)
        chosen = torch.arange(num_bases, device=device) * TOKENS // num_bases
        bases = features[:, chosen] + 0.1 * _tokens(device, dtype, 2, num_bases, width, seed=2)
        exact, plain = (
            eager_em_statistics(
                features.to(of), bases.to(of), temperature=1.0, payload=payload.to(of)
            )
            for of in (torch.float64, dtype)
        )
        largest = float(features.double().norm(dim=-1).max())
        assert exact.payload_sums is not None
        assert plain.payload_sums is not None
        yield (
            features, bases, payload, (exact.sums, exact.mass, exact.payload_sums),
            (plain.sums, plain.mass, plain.payload_sums), largest,
        )  # fmt: skip


def _statistics(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for features, bases, payload, exact, plain, largest in _of_em(device, dtype):

        def call(
            backend: str,
            features: torch.Tensor = features,
            bases: torch.Tensor = bases,
            payload: torch.Tensor = payload,
        ) -> Outputs:
            found = em_statistics.em_statistics(
                features, bases, temperature=1.0, payload=payload, backend=backend
            )
            assert found.payload_sums is not None
            return found.sums, found.mass, found.payload_sums

        yield Case(call, _judge(exact, plain, em_statistics.ROUNDING_ATOL, dtype, largest))


def _soft_em(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    # One iteration: over several, rounding decides where tokens go.
    for features, bases, payload, exact, plain, largest in _of_em(device, dtype):

        def call(
            backend: str,
            features: torch.Tensor = features,
            bases: torch.Tensor = bases,
            payload: torch.Tensor = payload,
        ) -> Outputs:
            found = soft_em.soft_em(
                features, bases, num_iters=1, temperature=1.0, payload=payload, empty="zero",
                backend=backend,
            )  # fmt: skip
            assert found.payload is not None
            return found.bases, found.payload, found.mass

        right, same = (
            m_step(sums, mass, payload_sums, sums, 0.0, "zero", None)
            for sums, mass, payload_sums in (exact, plain)
        )
        yield Case(call, _judge(right, same, em_statistics.ROUNDING_ATOL, dtype, largest))


def _update(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    if dtype not in (torch.float32, torch.float64):
        return
    sums, bases = (_tokens(device, dtype, 2, 256, 320, seed=seed) for seed in (0, 1))
    ridden = _tokens(device, dtype, 2, 256, 40, seed=2)
    mass = _tokens(device, dtype, 2, 256, 1, seed=3)[..., 0].abs()
    mass[:, ::7] = 0.0

    def call(backend: str) -> Outputs:
        found = em_update.em_update(
            sums, mass, bases, num_tokens=TOKENS, payload_sums=ridden, backend=backend
        )
        assert found.payload is not None
        return found.bases, found.payload, found.mass

    least = least_mass(TOKENS, 256)
    plain = m_step(sums, mass, ridden, bases, least, "mask", None)
    double = [tensor.double() for tensor in (sums, mass, ridden, bases)]
    exact = m_step(double[0], double[1], double[2], double[3], least, "mask", None)
    yield Case(call, _judge(exact, plain, em_statistics.ROUNDING_ATOL, dtype))


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in HEAD_WIDTHS:
        for corrected in (False, True):
            query = _tokens(device, dtype, 2, TOKENS, HEADS, width).transpose(1, 2)
            key, value = (
                _tokens(device, dtype, 1, HEADS, 256, width, seed=seed) for seed in (1, 2)
            )
            bias = _tokens(device, torch.float32, HEADS, 256, 1, seed=3)[..., 0]
            correction = _tokens(device, torch.float32, 1, HEADS, width + 1, width, seed=4) * 0.05
            mean = query.float().mean((0, 2))[None]
            more: dict[str, Any] = {"bias": bias}
            if corrected:
                more |= {"correction": correction, "query_mean": mean}
            exact, plain = (
                eager_basis_attention(query.to(of), key.to(of), value.to(of), **more)
                for of in (torch.float64, dtype)
            )

            def call(
                backend: str,
                tensors: tuple[torch.Tensor, ...] = (query, key, value),
                more: dict[str, Any] = more,
            ) -> Outputs:
                query, key, value = tensors
                out = basis_attention.basis_attention(query, key, value, **more, backend=backend)
                return (out,)

            yield Case(call, _judge((exact,), (plain,), basis_attention.ROUNDING_ATOL, dtype))


def _blended(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in HEAD_WIDTHS[::2]:
        queries = [_tokens(device, dtype, 2, HEADS, TOKENS, width, seed=seed) for seed in (0, 1)]
        keys = [_tokens(device, dtype, 1, HEADS, 256, width, seed=seed) for seed in (2, 3)]
        value = _tokens(device, dtype, 1, HEADS, 256, width, seed=4)
        mask = torch.linspace(-0.2, 1.2, 2 * TOKENS, dtype=torch.float32, device=device)
        mask = mask.clamp(0, 1).view(2, TOKENS)
        tensors = (queries[0], keys[0], queries[1], keys[1], value, mask)
        exact, plain = (
            eager_blended_attention(*[tensor.to(of) for tensor in tensors])
            for of in (torch.float64, dtype)
        )

        def call(backend: str, tensors: tuple[torch.Tensor, ...] = tensors) -> Outputs:
            target, key_target, source, key_source, value, mask = tensors
            out = blended_attention.blended_attention(
                target, key_target, source, key_source, value, mask, backend=backend
            )
            return (out,)

        yield Case(call, _judge((exact,), (plain,), basis_attention.ROUNDING_ATOL, dtype))


def _projected(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in HEAD_WIDTHS[::2]:
        inner, root = HEADS * width, (HEADS * width) ** -0.5
        features = _tokens(device, dtype, 2, TOKENS, inner)
        weights = [_tokens(device, dtype, inner, inner, seed=seed) * root for seed in (1, 2)]
        bases = [_tokens(device, dtype, 1, HEADS, 256, width, seed=seed) for seed in (3, 4)]
        tensors = (features, weights[0], *bases, weights[1])
        exact, plain = (
            eager_projected_attention(*[tensor.to(of) for tensor in tensors])
            for of in (torch.float64, dtype)
        )

        def call(backend: str, tensors: tuple[torch.Tensor, ...] = tensors) -> Outputs:
            return (projected_attention.projected_attention(*tensors, backend=backend),)

        yield Case(call, _judge((exact,), (plain,), basis_attention.ROUNDING_ATOL, dtype))


def _partial(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in HEAD_WIDTHS[::2]:
        query = _tokens(device, dtype, 2, HEADS, 100, width)
        key, value = (_tokens(device, dtype, 2, HEADS, TOKENS, width, seed=seed) for seed in (1, 2))
        logits = query.double() @ key.double().mT * width**-0.5
        same = query @ key.mT * width**-0.5
        exact = (torch.softmax(logits, -1) @ value.double(), logits.logsumexp(-1))
        plain = (torch.softmax(same, -1) @ value, same.logsumexp(-1))

        def call(backend: str, tensors: tuple[torch.Tensor, ...] = (query, key, value)) -> Outputs:
            return tuple(partial_attention.partial_attention(*tensors, backend=backend))

        largest = float(logits.abs().max())
        yield Case(call, _judge(exact, plain, partial_attention.ROUNDING_ATOL, dtype, largest))


def _moments(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in HEAD_WIDTHS:
        for with_heads in (False, True):
            query, base_key, base_value = (
                _tokens(device, dtype, 2, rows, HEADS, width, seed=seed).transpose(1, 2)
                for seed, rows in enumerate((100, 256, 256))
            )
            key, value = (
                _tokens(device, dtype, 2, TOKENS, HEADS, width, seed=seed).transpose(1, 2)
                for seed in (3, 4)
            )
            features = key if with_heads else key.transpose(1, 2).flatten(2)
            bases = features[..., torch.arange(256, device=device) * TOKENS // 256, :].float()
            tensors = (query, features, key, value, bases, base_key, base_value)
            exact, plain = (
                eager_moments(*(tensor.to(of) for tensor in tensors), temperature=1.0)
                for of in (torch.float64, dtype)
            )

            def call(backend: str, tensors: tuple[torch.Tensor, ...] = tensors) -> Outputs:
                found = calibration.moments(*tensors, temperature=1.0, backend=backend)
                return (found.correction,)

            largest = float(features.double().norm(dim=-1).max())
            yield Case(call, _judge((exact,), (plain,), calibration.MOMENTS_ATOL, dtype, largest))


def _nearest(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for width in (40, 320):
        query, keys = (_tokens(device, dtype, 2, n, width, seed=n) for n in (TOKENS, 300))

        def call(backend: str, query: torch.Tensor = query, keys: torch.Tensor = keys) -> Outputs:
            return (nearest_token.nearest_token(query, keys, backend=backend),)

        def judge(
            found: Outputs, query: torch.Tensor = query, keys: torch.Tensor = keys
        ) -> list[tuple[float, float]]:
            plain = cosine_loss(query, keys, eager_nearest_token(query, keys))
            tolerance = nearest_token.ROUNDING_ATOL.get(query.dtype, 1e-12)
            return [(cosine_loss(query, keys, found[0]), 2 * plain + tolerance)]

        yield Case(call, judge)


def _of_video(
    device: torch.device, dtype: torch.dtype, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (
        _tokens(device, dtype, 1, math.prod(GRID), HEADS, width, seed=seed).transpose(1, 2)
        for seed in (0, 1, 2)
    )
    return query, key, value


def _window(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    near = tokens_in_window(GRID, WINDOW, device)
    for width in VIDEO_WIDTHS:
        query, key, value = tensors = _of_video(device, dtype, width)
        exact, plain = (
            eager_window_attention(query.to(of), key.to(of), value.to(of), near)
            for of in (torch.float64, dtype)
        )

        def call(
            backend: str, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = tensors
        ) -> Outputs:
            return tuple(
                window_attention.window_attention(*tensors, GRID, window=WINDOW, backend=backend)
            )

        largest = float((query.double() @ key.double().mT).abs().max()) * width**-0.5
        yield Case(call, _judge(exact, plain, partial_attention.ROUNDING_ATOL, dtype, largest))


def _video(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    near, num_tokens = tokens_in_window(GRID, WINDOW, device), math.prod(GRID)
    # Keys of which each base's point its own way: no rounding changes what they belong to.
    of_base = ((torch.arange(num_tokens, device=device) + 1) * BASES - 1) // num_tokens
    member = torch.nn.functional.one_hot(of_base, BASES).bool()
    text_mask = (torch.arange(20, device=device) % 3 != 1).unsqueeze(0)
    for width in VIDEO_WIDTHS:
        query, key, value = _of_video(device, dtype, width)
        key = 0.3 * key
        key[..., :BASES] += 3 * member.to(dtype)
        text_key, text_value = (
            _tokens(device, dtype, 1, HEADS, 20, width, seed=seed) for seed in (3, 4)
        )
        tensors = (query, key, value, text_key, text_value)
        exact, plain = (
            eager_video_attention(
                query.to(of), key.to(of), value.to(of), near, member,
                (text_key.to(of), text_value.to(of)), text_mask,
            )
            for of in (torch.float64, dtype)
        )  # fmt: skip

        def call(backend: str, tensors: tuple[torch.Tensor, ...] = tensors) -> Outputs:
            query, key, value, *text = tensors
            out = video_attention.video_attention(
                query, key, value, GRID, num_bases=BASES, window=WINDOW, text=(text[0], text[1]),
                text_mask=text_mask, num_iters=0, backend=backend,
            )  # fmt: skip
            return (out,)

        yield Case(call, _judge((exact,), (plain,), basis_attention.ROUNDING_ATOL, dtype))


CASES: dict[str, Callable[[torch.device, torch.dtype], Iterator[Case]]] = {
    "em_statistics": _statistics,
    "soft_em": _soft_em,
    "em_update": _update,
    "basis_attention": _attention,
    "blended_attention": _blended,
    "projected_attention": _projected,
    "partial_attention": _partial,
    "moments": _moments,
    "nearest_token": _nearest,
    "window_attention": _window,
    "video_attention": _video,
}
