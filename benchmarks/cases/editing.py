"""What edits are made of: the nearest token, against products and distances; two maps blended."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels import blended_attention, nearest_token
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.nearest_token import ROUNDING_ATOL as COSINE_ATOL
from stem_kernels.shared.cosine import SMALLEST_NORM
from stem_kernels.testing import (
    clustered_tokens,
    cosine_loss,
    eager_blended_attention,
    eager_nearest_token,
    max_error,
)

from .case import Case, Check, Contender, Outputs, ours, parity, ready
from .em import NUM_BASES
from .floors import Work

PRODUCTS, ARGMAX, CDIST = "products alone", "products, argmax", "cdist, argmin"
TWO_SDPA = "two sdpa, blended"
"""The names of contenders."""
CHECKED = 1024


class Tokens(NamedTuple):
    """Queries [1, n, d] and keys [1, m, d]."""

    query: torch.Tensor
    keys: torch.Tensor


class Maps(NamedTuple):
    """The arguments of `blended_attention`."""

    query_target: torch.Tensor
    key_target: torch.Tensor
    query_source: torch.Tensor
    key_source: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor


def nearest_case(
    tokens: int, keys: int, width: int, device: torch.device, dtype: torch.dtype
) -> Case[Tokens]:
    """The nearest of `keys` tokens for each of `tokens`, as TokenFlow looks for them."""

    def inputs() -> Tokens:
        query, others = (
            clustered_tokens((1, count, width), seed=seed).to(device, dtype)
            for seed, count in enumerate((tokens, keys))
        )
        return Tokens(query, others)

    return Case(
        f"nearest token n={tokens}",
        f"n={tokens} m={keys} d={width}",
        dtype,
        inputs,
        {
            **ours(lambda inputs, backend: (nearest_token(*inputs, backend=backend),)),
            PRODUCTS: Contender(lambda inputs: lambda: products(inputs), products_error),
            ARGMAX: ready(lambda inputs: (eager_nearest_token(*inputs),)),
            CDIST: ready(nearest_by_distance),
        },
        nearest_check,
        Work(2.0 * tokens * keys * width, 0, (tokens + keys) * width * dtype.itemsize),
    )


def products(inputs: Tokens) -> Outputs:
    """Products of all tokens, of which the largest would still have to be found."""
    return (inputs.query @ inputs.keys.mT,)


def products_error(inputs: Tokens, answer: Outputs) -> float:
    """Error of the first products over a hundred roundings of the largest."""
    exact = inputs.query[:, :CHECKED].double() @ inputs.keys.double().mT
    allowed = 100 * torch.finfo(inputs.query.dtype).eps * float(exact.abs().max())
    return max_error(answer[0][:, :CHECKED], exact) / allowed


def nearest_by_distance(inputs: Tokens) -> Outputs:
    """By distances to keys of length 1; cdist takes no half precision."""
    query, keys = inputs.query.float(), inputs.keys.float()
    norms = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    return (torch.cdist(query, keys / norms.clamp(min=SMALLEST_NORM)).argmin(-1),)


def nearest_check(inputs: Tokens) -> Check:
    """The loss of cosine, in float64, of the first queries."""
    query, keys = inputs.query[:, :CHECKED], inputs.keys
    plain = cosine_loss(query, keys, eager_nearest_token(query, keys))
    allowed = 2 * plain + COSINE_ATOL[query.dtype]
    return lambda answer: cosine_loss(query, keys, answer[0][:, :CHECKED]) / allowed


def blended_case(
    heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Case[Maps]:
    """Queries as a projection leaves them, to bases of two kinds; half of the mask is soft."""

    def inputs() -> Maps:
        queries = [
            clustered_tokens((1, tokens, heads, width), seed=seed).to(device, dtype).transpose(1, 2)
            for seed in (0, 1)
        ]
        keys = [
            clustered_tokens((1, heads, NUM_BASES, width), seed=seed).to(device, dtype)
            for seed in (2, 3, 4)
        ]
        mask = torch.linspace(-0.5, 1.5, tokens, device=device).clamp(0, 1).unsqueeze(0)
        return Maps(queries[0], keys[0], queries[1], keys[1], keys[2], mask)

    pairs = heads * tokens * NUM_BASES
    traffic = 3 * heads * tokens * width * dtype.itemsize
    return Case(
        f"blended attention d={width}",
        f"q {tokens} h={heads} d={width} K={NUM_BASES}",
        dtype,
        inputs,
        {
            **ours(lambda inputs, backend: (blended_attention(*inputs, backend=backend),)),
            TWO_SDPA: ready(two_sdpa),
        },
        blended_check,
        # The values are the same for both maps, so that their weights need one product.
        Work(6.0 * pairs * width, 2 * pairs, traffic),
    )


def two_sdpa(inputs: Maps) -> Outputs:
    """torch's attention, twice, and the weighted sum."""
    target = scaled_dot_product_attention(inputs.query_target, inputs.key_target, inputs.value)
    source = scaled_dot_product_attention(inputs.query_source, inputs.key_source, inputs.value)
    return (torch.lerp(source, target, inputs.mask[:, None, :, None].to(source.dtype)),)


def blended_check(inputs: Maps) -> Check:
    """Against float64, for every so many queries, of all kinds of shares."""
    step = max(1, inputs.mask.shape[1] // CHECKED)

    def some(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :, ::step]

    few = inputs._replace(
        query_target=some(inputs.query_target),
        query_source=some(inputs.query_source),
        mask=inputs.mask[:, ::step],
    )
    right = parity(
        (eager_blended_attention(*(tensor.double() for tensor in few)),),
        (eager_blended_attention(*few),),
        ROUNDING_ATOL,
    )
    return lambda answer: right((some(answer[0]),))
