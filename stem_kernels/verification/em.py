"""Passes and iterations of EM against torch in float64, one E+M step at a time.

Of a pass two leads (batch entries, or heads of them) are computed again. Where even they take too
long, the backend is called once more on some of the tokens, and that call is compared; of the
caller's own result the masses are, whose sum is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..reference.em_statistics import em_statistics_eager
from ..shared.bases import candidates_of, directions_of, least_mass, m_step, reseeded
from ..shared.parity import max_error
from ..shared.spread import spread_tokens
from .comparison import Comparison, Rounding, compared, finite, places, products, rounded

TOKENS_AT_ONCE = 4096
TILE = 256
"""Tokens that no kernel's tile exceeds: a part ends in its tile where the call does."""


class Sums(NamedTuple):
    """Sums [L, K, D], mass [L, K] and payload sums [L, K, E or 0] of one pass."""

    sums: torch.Tensor
    mass: torch.Tensor
    payload_sums: torch.Tensor


class Step(Protocol):
    """What an iteration leaves: bases [..., K, D], payload bases [..., K, E], mass [..., K]."""

    @property
    def bases(self) -> torch.Tensor: ...
    @property
    def payload(self) -> torch.Tensor | None: ...
    @property
    def mass(self) -> torch.Tensor: ...


def em_statistics(
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
    rerun: Callable[[slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments [B, (h,) n or K, ...] as for the operator.

    Args:
        found: Sums, mass and payload sums of a backend.
        features: Tokens.
        bases: Bases.
        payload: Values, or None.
        temperature: Temperature.
        normalize: Whether bases are scaled to unit length.
        rerun: Function of some of the tokens: the backend's result on them.
        rounding: Rounding tolerances of the operator.
    """
    if features.numel() == 0 or not finite(bases):
        return None
    tokens = part_of_tokens(features, bases.shape[-2], payload)
    whole = mass_is_tokens(found[1], features, rounding)
    if tokens is not None:
        found = rerun(tokens)
        features = features[..., tokens, :]
        payload = None if payload is None else payload[..., tokens, :]
    leads = Leads(features)
    own, ridden = leads.of(features), leads.of_any(payload)
    if not finite(own, ridden):
        return None
    exact, plain, largest = passes(own, leads.of(bases), ridden, temperature, normalize)
    dtype = features.dtype
    results = Sums(leads.of(found[0]), leads.of(found[1]), exact.payload_sums)
    if found[2] is not None:
        results = results._replace(payload_sums=leads.of(found[2]))
    names = ("sums", "mass", "payload_sums")
    listed = [
        compared(name, ours, right, same, dtype, rounding, largest)
        for name, ours, right, same in zip(names, results, exact, plain, strict=True)
    ]
    return [one for one in (whole, *listed) if one is not None]


def soft_em(
    found: Step,
    features: torch.Tensor,
    bases: torch.Tensor | int,
    payload: torch.Tensor | None,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
    rerun: Callable[[slice | None, int, bool], Step],
    rounding: Rounding,
) -> list[Comparison] | None:
    """The last iteration and the first one, each from the bases that it started from.

    Args:
        found: Result of a backend.
        features: Tokens.
        bases: Bases [B, (h,) K, D], or the number of tokens that EM starts from.
        payload: Values, or None.
        num_iters: Number of iterations.
        temperature: Temperature.
        normalize: Whether bases are scaled to unit length.
        empty: Policy for empty bases.
        rerun: Function of some of the tokens (None: all), a number of iterations and whether the
            payload rides along: the backend's result.
        rounding: Rounding tolerances of `em_statistics`.
    """
    if features.numel() == 0:
        return None
    num_bases = bases if isinstance(bases, int) else bases.shape[-2]
    tokens = part_of_tokens(features, num_bases, payload)
    whole = None if empty != "zero" else mass_is_tokens(found.mass, features, rounding)
    if tokens is not None:
        found = rerun(tokens, num_iters, payload is not None)
        features = features[..., tokens, :]
        payload = None if payload is None else payload[..., tokens, :]
    leads = Leads(features)
    own, ridden = leads.of(features), leads.of_any(payload)
    if isinstance(bases, int):
        chosen = spread_tokens(features.shape[-2], num_bases, features.device)
        before = own.index_select(-2, chosen)
    else:
        before = leads.of(bases)
    if not finite(own, ridden, before):
        return None
    least = least_mass(features.shape[-2], num_bases)
    policy = "zero" if empty == "zero" else "mask"

    def step(
        result: Step, before: torch.Tensor, values: torch.Tensor | None, name: str
    ) -> list[Comparison | None]:
        exact, plain, largest = passes(own, before, values, temperature, normalize)
        right, same = (
            m_step(of.sums, of.mass, of.payload_sums, before.double(), least, policy, None)
            for of in (exact, plain)
        )
        # Bases whose mass is near the least may be empty or not.
        near = (exact.mass - least).abs() <= 0.1 * least if policy == "mask" else exact.mass < 0
        results = leads.of(result.bases), leads.of_any(result.payload), leads.of(result.mass)
        listed: list[Comparison | None] = []
        for output, ours, one, other in zip(
            ("bases", "payload", "mass"), results, right, same, strict=True
        ):
            if ours is not None and one.numel():
                listed.append(
                    compared(
                        f"{output} {name}", ours[~near], one[~near], other[~near],
                        features.dtype, rounding, largest,
                    )
                )  # fmt: skip
        return listed

    listed: list[Comparison | None] = [whole]
    if num_iters > 1:
        first = rerun(tokens, 1, False)
        listed += step(first, before, None, "of the first iteration")
        last = first if num_iters == 2 else rerun(tokens, num_iters - 1, False)
        before = leads.of(last.bases)
        if empty == "reseed":
            candidates = leads.of(candidates_of(features, num_bases))
            before = reseeded(before, leads.of(last.mass) < least, candidates)
    listed += step(found, before, ridden, "of the last iteration")
    return [one for one in listed if one is not None]


def em_update(
    found: Step,
    sums: torch.Tensor,
    mass: torch.Tensor,
    bases: torch.Tensor,
    payload_sums: torch.Tensor | None,
    least: float,
    empty: str,
    rounding: Rounding,
) -> list[Comparison] | None:
    """The M-step's division, in full; arguments as for `shared.bases.m_step`."""
    if not finite(sums, mass, bases, payload_sums):
        return None
    values = sums[..., :0] if payload_sums is None else payload_sums
    plain = m_step(sums, mass, values, bases, least, empty, None)
    # Kernels compare masses with `least` in float32.
    single = float(torch.tensor(least, dtype=torch.float32))
    exact = m_step(
        sums.double(), mass.double(), values.double(), bases.double(), single, empty, None
    )
    results = (found.bases, values if found.payload is None else found.payload, found.mass)
    listed = [
        compared(name, ours, right, same, sums.dtype, rounding)
        for name, ours, right, same in zip(
            ("bases", "payload", "mass"), results, exact, plain, strict=True
        )
    ]
    return [one for one in listed if one is not None]


def attended(
    found: tuple[torch.Tensor | None, ...], right: tuple[torch.Tensor | None, ...]
) -> list[Comparison]:
    """Rounded bases and payload, and the bias, against those of the same result of EM."""
    listed = []
    for name, ours, theirs in zip(
        ("rounded bases", "rounded payload", "bias"), found, right, strict=True
    ):
        if ours is None or theirs is None:
            listed.append(Comparison(name, float(ours is not theirs), 0.5))
            continue
        excluded = theirs.isneginf()
        error = max_error(ours.masked_fill(excluded, 0.0), theirs.masked_fill(excluded, 0.0))
        if not torch.equal(ours.isneginf(), excluded):
            error = float("inf")
        largest = theirs.masked_fill(excluded, 0.0).abs().amax() if theirs.numel() else 0.0
        # A unit of the last place; a logarithm in float32.
        bound = 2 * float(largest) * torch.finfo(theirs.dtype).eps + 1e-5
        listed.append(Comparison(name, error, bound))
    return listed


class Leads:
    """Two leads of tokens [B, (h,) n, D], or the only one: the first and the last."""

    def __init__(self, features: torch.Tensor) -> None:
        sizes = features.shape[:-2]
        chosen = places(sizes.numel(), 2, features.device)
        heads = sizes[-1]
        self._place = (chosen,) if len(sizes) == 1 else (chosen // heads, chosen % heads)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[L, ...] of [B, (h,) ...]."""
        return tensor[self._place]

    def of_any(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The same, or None."""
        return None if tensor is None else self.of(tensor)


def part_of_tokens(
    features: torch.Tensor, num_bases: int, payload: torch.Tensor | None
) -> slice | None:
    """The last tokens, as many as may be compared; None where all may."""
    n, dim = features.shape[-2:]
    width = 0 if payload is None else payload.shape[-1]
    each = min(2, features.shape[:-2].numel()) * num_bases * (2 * dim + width)
    count = max(TILE, products(features.device) // each // TILE * TILE) + n % TILE
    return None if n <= count else slice(n - count, n)


def mass_is_tokens(
    mass: torch.Tensor, features: torch.Tensor, rounding: Rounding
) -> Comparison | None:
    """Every token gives the bases 1 in all."""
    if not finite(features):
        return None
    n = features.shape[-2]
    total = mass.double().sum(-1)
    error = (total - n).abs().nan_to_num(nan=float("inf")).max()
    # Float32 sums of many tokens.
    return Comparison("mass of all bases", float(error), n * (rounding[features.dtype] * 2 + 1e-4))


def passes(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[Sums, Sums, float]:
    """One pass over [L, n, D]: exact, rounded where kernels round, and the largest logit."""
    dtype = features.dtype
    unit = 2.0**15 if dtype == torch.float16 else 1.0
    wide = directions_of(bases.double(), normalize)
    narrow = rounded(directions_of(bases.float(), normalize), dtype)
    exact, plain, largest = None, None, 0.0
    for start in range(0, features.shape[-2], TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        tokens = features[:, part]
        values = tokens[..., :0] if payload is None else payload[:, part]
        ours = em_statistics_eager(
            tokens.double()[None], wide[None], values.double()[None], temperature, False
        )
        operands, ridden = rounded(tokens, dtype), rounded(values, dtype)
        logits = operands @ narrow.mT / temperature
        largest = max(largest, float(logits.abs().max()))
        weights = torch.softmax(logits, dim=-1)
        shares = rounded(weights * unit, dtype).mT / unit
        theirs = (shares @ operands, weights.sum(-2), shares @ ridden)
        exact = _added(exact, [part[0] for part in ours])
        plain = _added(plain, [part.double() for part in theirs])
    assert exact is not None
    assert plain is not None
    return Sums(*exact), Sums(*plain), largest


def _added(total: list[torch.Tensor] | None, more: list[torch.Tensor]) -> list[torch.Tensor]:
    return more if total is None else [one + other for one, other in zip(total, more, strict=True)]
