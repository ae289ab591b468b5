"""R iterations of soft EM over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import Tensors
from ..verification import em, run
from ..verification.comparison import Comparison
from .checks import check_choice, check_count
from .em_statistics import ROUNDING_ATOL, check_em_inputs
from .initialization import initial_bases

OP = "soft_em"

EMPTY_POLICIES = ("zero", "mask", "reseed")
EARLY_STRIDE = 2
"""Of a sample, iterations before the last read every second token: more tokens in the same time."""


class SoftEM(NamedTuple):
    """Bases [..., K, D], payload bases [..., K, E] or None, mass [..., K]; float32 or float64.

    Unless `empty="zero"`, the mass of an empty base is exactly 0.
    """

    bases: torch.Tensor
    payload: torch.Tensor | None
    mass: torch.Tensor


class AttendedBases(NamedTuple):
    """What `soft_em` found, and what attention to it takes.

    Args:
        found: Result of `soft_em`.
        bases: Bases [..., K, D] of the features' dtype.
        payload: Payload bases [..., K, E] of that dtype, or None.
        bias: Bias [..., K] of the logits (see `attention_bias`), or None.
    """

    found: SoftEM
    bases: torch.Tensor
    payload: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, found: SoftEM, dtype: torch.dtype, *, empty: str, proportional: bool
    ) -> AttendedBases:
        """What attention in `dtype` takes of bases that were found under the policy `empty`."""
        return cls(
            found,
            found.bases.to(dtype),
            None if found.payload is None else found.payload.to(dtype),
            attention_bias(found.mass, empty=empty, proportional=proportional),
        )


def soft_em(
    features: torch.Tensor,
    bases: torch.Tensor | int,
    *,
    num_iters: int = 5,
    temperature: float = 0.01,
    normalize: bool = True,
    payload: torch.Tensor | None = None,
    empty: str = "mask",
    backend: str = "auto",
) -> SoftEM:
    r"""Soft EM from given bases: `num_iters` times ST-E then ST-M.

    $$m_k \leftarrow \text{sums}_k / (\text{mass}_k + 10^{-4})$$

    and after the last iteration $v_k = \text{payload\_sums}_k / (\text{mass}_k + 10^{-4})$ with the
    same responsibilities that made the last bases (see `em_statistics`, `em_update`). The host does
    not wait for the device between iterations.

    A base is empty if its mass is below 0.01 * min(1, n / K): a hundredth of one token, or of an
    even share if there are fewer tokens than bases. At least one base always has more.

    Args:
        features: Tokens [B, n, D] or [B, h, n, D], n >= 1, any strides.
        bases: Initial bases [B, K, D] or [B, h, K, D] (see `initial_bases`), or a number K of
            bases: EM then starts from K tokens, as `initial_bases` chooses them by default.
        num_iters: Number R of iterations, at least 1. The paper uses 5; from tokens (see
            `initial_bases`) 2 come equally far.
        temperature: Temperature tau > 0 of the responsibilities.
        normalize: Whether the bases are scaled to unit length before the logits.
        payload: Values [B, n, E] or [B, h, n, E] of the features' dtype, which are averaged by the
            same weights, or None.
        empty: Policy for empty bases. "zero": they become the zero vector, as in the authors' code.
            "mask": they keep their last value and report mass 0. "reseed": as "mask", but before
            each further iteration they are moved to the tokens that the bases explain worst (the
            largest part orthogonal to the nearest base, among 8 K tokens spread over all;
            deterministic).
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        SoftEM in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes or values do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856; `empty="mask"` and `"reseed"` are this package's.
    """
    call = _Call(features, bases, payload, num_iters, temperature, normalize, empty)
    tensors = call.checked()

    def check(found: SoftEM, chosen: str) -> list[Comparison] | None:
        return call.check(found, chosen)

    return run(OP, backend, tensors, _num_bases(bases), call.on, check)


def attended_bases(
    features: torch.Tensor,
    bases: torch.Tensor | int,
    *,
    num_iters: int = 5,
    temperature: float = 0.01,
    payload: torch.Tensor | None = None,
    empty: str = "mask",
    proportional: bool = False,
    early_stride: int = 1,
    backend: str = "auto",
) -> AttendedBases:
    """`soft_em`, and what attention to its bases takes, made by the last iteration's kernel.

    Args:
        features: Tokens, as for `soft_em`, as all arguments are but the two that it lacks.
        bases: Initial bases, or their number.
        num_iters: Number of iterations.
        temperature: Temperature.
        payload: Values that are averaged by the same weights, or None.
        empty: Policy for empty bases.
        proportional: Whether a base weighs as much as its mass, see `attention_bias`.
        early_stride: Number s, at least 1. Iterations before the last read every s-th token only,
            and so do bases that start as tokens. With "reseed" all of them read all tokens, among
            which empty bases are put.
        backend: Name of the backend.

    Returns:
        AttendedBases; those of bases of mass 0 have the bias -inf, except under "zero" if not
        `proportional`.

    Raises:
        ValueError, TypeError, BackendError: as `soft_em`.
    """
    check_count(OP, "early_stride", early_stride)
    if early_stride > 1 and num_iters > 1 and empty != "reseed":
        bases = soft_em(
            features[..., ::early_stride, :],
            bases,
            num_iters=num_iters - 1,
            temperature=temperature,
            empty=empty,
            backend=backend,
        ).bases
        num_iters = 1
    call = _Call(features, bases, payload, num_iters, temperature, True, empty)
    tensors = call.checked()

    def on(chosen: str) -> AttendedBases:
        if chosen == "triton":
            return call.on_triton("log" if proportional else "none" if empty == "zero" else "mask")
        return AttendedBases.of(
            call.on(chosen), features.dtype, empty=empty, proportional=proportional
        )

    def check(found: AttendedBases, chosen: str) -> list[Comparison] | None:
        listed = call.check(found.found, chosen)
        right = AttendedBases.of(
            found.found, features.dtype, empty=empty, proportional=proportional
        )
        return listed and listed + em.attended(found[1:], right[1:])

    return run(OP, backend, tensors, _num_bases(bases), on, check)


class _Call(NamedTuple):
    """The arguments of `soft_em`, in the order in which the backends take them."""

    features: torch.Tensor
    bases: torch.Tensor | int
    payload: torch.Tensor | None
    num_iters: int
    temperature: float
    normalize: bool
    empty: str

    def checked(self) -> Tensors:
        """Its tensors by name; raises the error that a caller should see, if any."""
        features, bases, payload, num_iters, temperature, _, empty = self
        given = None if isinstance(bases, int) else bases
        check_em_inputs(OP, features, given, payload, temperature)
        check_choice(OP, "empty", empty, EMPTY_POLICIES)
        check_count(OP, "num_iters", num_iters)
        if isinstance(bases, int):
            check_count(OP, "bases", bases)
        if 0 in features.shape[-2:]:
            raise ValueError(
                f"{OP}: features are {list(features.shape)}; there must be a token and a channel"
            )
        return {"features": features, "bases": given, "payload": payload}

    def on_triton(self, bias: str) -> AttendedBases:
        """The result, with the bias "none", "log" or "mask" (see `attention_bias`)."""
        from ..triton.em.soft_em import soft_em_triton

        features, bases, payload, *settings = self
        given = None if isinstance(bases, int) else bases
        ridden = payload if payload is not None and payload.shape[-1] else None
        found, mass, rounded, *more = soft_em_triton(
            features, given, ridden, _num_bases(bases), *settings, bias
        )
        of_mass = None if bias == "none" else more.pop()
        values = rounded_values = None
        if ridden is not None:
            values, rounded_values = more
        elif payload is not None:
            values, rounded_values = found[..., :0], rounded[..., :0]
        return AttendedBases(SoftEM(found, values, mass), rounded, rounded_values, of_mass)

    def check(self, found: SoftEM, chosen: str) -> list[Comparison] | None:
        """What `found` of a backend is beside torch's."""

        def rerun(tokens: slice | None, num_iters: int, with_payload: bool) -> SoftEM:
            part = slice(None) if tokens is None else tokens
            ridden = self.payload if with_payload else None
            return self._replace(
                features=self.features[..., part, :],
                payload=None if ridden is None else ridden[..., part, :],
                num_iters=num_iters,
            ).on(chosen)

        return em.soft_em(found, *self, rerun, ROUNDING_ATOL)

    def on(self, chosen: str) -> SoftEM:
        """The result of a backend."""
        if chosen == "triton":
            return self.on_triton("none").found
        features, bases, payload, num_iters, temperature, normalize, empty = self
        if isinstance(bases, int):
            bases = initial_bases(features, bases)
        with_heads = features.ndim == 4
        if not with_heads:
            features, bases = features.unsqueeze(0), bases.unsqueeze(0)
            payload = None if payload is None else payload.unsqueeze(0)
        arguments = (features, bases, payload, num_iters, temperature, normalize, empty)
        if chosen == "cuda":
            from ..cuda.soft_em import soft_em_cuda

            found = soft_em_cuda(*arguments)
        else:
            assert chosen == "torch"
            from ..reference.soft_em import soft_em_torch

            found = soft_em_torch(*arguments)
        bases, values, mass = found if with_heads else (part[0] for part in found)
        return SoftEM(bases, None if payload is None else values, mass)


def _num_bases(bases: torch.Tensor | int) -> int:
    # No property of `_Call`: torch 2.9 compiled none of a tuple.
    return bases if isinstance(bases, int) else bases.shape[-2]


def attention_bias(
    mass: torch.Tensor, *, empty: str = "mask", proportional: bool = False
) -> torch.Tensor | None:
    """The bias of the attention logits of bases with these masses.

    Args:
        mass: Mass [..., K] of a `SoftEM`.
        empty: Policy that the masses were made with. Empty bases get -inf, except with "zero".
        proportional: Whether log(mass) is added, so that a base that stands for 5,000 tokens has
            the weight of 5,000 keys (with this on, dense attention is the limit K = n).

    Returns:
        Floating [..., K], or None if there is nothing to add.

    Raises:
        ValueError: the policy is unknown.
    """
    check_choice("attention_bias", "empty", empty, EMPTY_POLICIES)
    if empty == "zero" and not proportional:
        return None
    is_empty = mass == 0
    if proportional:
        # The logarithm of 0 has no derivative, and 0 times it is NaN.
        return torch.where(is_empty, 1.0, mass).log().masked_fill(is_empty, float("-inf"))
    return torch.zeros_like(mass).masked_fill(is_empty, float("-inf"))
