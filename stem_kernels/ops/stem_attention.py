"""The drop-in: self-attention through EM bases of the keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..backends import BACKENDS, select
from ..shared.spread import spread_tokens
from .basis_attention import basis_attention
from .calibration import CALIBRATIONS, MOMENTS_KEYS, MOMENTS_STEP, calibrate_bases, moments
from .checks import (
    check_choice,
    check_count,
    check_floating,
    check_positive,
    check_same_dtype,
    check_seed,
)
from .initialization import initial_bases, standard_normals
from .partial_attention import partial_attention
from .soft_em import EARLY_STRIDE, EMPTY_POLICIES, attended_bases

OP = "stem_attention"
INITIALIZATIONS = ("tokens", "gaussian")


def stem_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    num_bases: int = 256,
    num_iters: int = 2,
    sample_per_base: int | None = 22,
    temperature: float = 0.01,
    init: str = "tokens",
    seed: int = 0,
    empty: str = "mask",
    proportional: bool = True,
    calibration: str = "moments",
    num_queries: int = 256,
    allow_exact: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention through K bases of the keys, with the arguments of SDPA.

    EM (`soft_em`) runs on the keys of each head, with the values as its payload. Then every query
    attends to the K bases (`basis_attention`): O(n K) in place of O(n^2). This replaces
    `torch.nn.functional.scaled_dot_product_attention(query, key, value)` without mask, dropout or
    causality. To share bases between frames, fold the frames into the tokens.

    Args:
        query: Queries [B, h, n, d], any strides.
        key: Keys [B or 1, h, m, d], m >= 1.
        value: Values [B or 1, h, m, e].
        attn_mask: Argument of SDPA; only None is allowed.
        dropout_p: Argument of SDPA; only 0.0 is allowed.
        is_causal: Argument of SDPA; only False is allowed.
        scale: Factor of the attention logits; 1 / sqrt(d) if None.
        enable_gqa: Argument of SDPA; only False is allowed.
        num_bases: Number K of bases, at least 1.
        num_iters: Number R of EM iterations, at least 1.
        sample_per_base: Number of keys that EM reads for each base, at least 1. In all it reads K
            times this number, spread evenly over all keys, and every second of them in iterations
            before the last. None: EM reads all keys.
        temperature: Temperature tau > 0 of the responsibilities.
        init: Kind of initial bases, "tokens" (no random numbers) or "gaussian" (the authors' code,
            with `seed`).
        seed: Seed of "gaussian", a whole number of 64 bits.
        empty: Policy for empty bases, "zero", "mask" or "reseed", see `soft_em`.
        proportional: Whether the weight of a base is in proportion to its mass, see
            `attention_bias`. If False, bases that stand for few tokens weigh as much as bases that
            stand for many.
        calibration: Form of the correction that brings the output nearer to SDPA's. "none": no
            correction. "moments": the covariance of keys and values that bases leave out. "linear"
            or "joint": a correction that is fitted to the exact attention of some queries. See
            `ops.calibration`.
        num_queries: Largest number of these queries, at least 1.
        allow_exact: Whether SDPA itself is called if it takes no more FLOPs, see below.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        [B, h, n, e] of the query's dtype; under `torch.autocast` of autocast's, as SDPA's is.

    Raises:
        ValueError, TypeError: shapes, dtypes or values do not fit.
        BackendError: the backend asked for cannot run this call.

    The distance to SDPA depends on the keys; `attention_error` measures it for your tensors. It is
    small if the keys form a few clusters, or change smoothly as in a feature map, and if there are
    several bases for each cluster. Measured error of the output, with 256 bases on 4,096 keys: 64
    tight clusters 0.2 %; a smooth map that is new every 32, 16, 8 or 4 places 0.5 %, 1.5 %, 8 %, 27
    %; 256 clusters 24 %; standard normal keys, each unlike all others, 78 %
    (benchmarks/studies/drop_in). Do not use it for keys of the last kind. With calibration="joint"
    the maps have 0.02 %, 0.1 %, 2 % and 20 %.

    SDPA is called, and the result is exact, if that takes no more FLOPs (`exact_is_cheaper`):
    always with K >= m, and in self-attention of 40 channels up to 1,247 tokens by default. Without
    a correction it is up to (R + 1.5) K = 896.

    Source: arXiv 2312.05856; the key-space form is that of the authors' released code, which has
    num_iters=5, init="gaussian", empty="zero" and proportional=False. The defaults here are those
    of `stem.StemConfig`.
    """
    _refuse_what_only_sdpa_takes(attn_mask, dropout_p, is_causal, enable_gqa)
    query, key, value = _cast_as_sdpa_does(query, key, value)
    _check_tensors(query, key, value)
    check_count(OP, "num_bases", num_bases)
    check_count(OP, "num_iters", num_iters)
    check_positive(OP, "temperature", temperature)
    check_choice(OP, "init", init, INITIALIZATIONS)
    check_seed(OP, seed)
    check_choice(OP, "calibration", calibration, ("none", "moments", *CALIBRATIONS))
    if sample_per_base is not None:
        check_count(OP, "sample_per_base", sample_per_base)
    check_count(OP, "num_queries", num_queries)
    check_choice(OP, "empty", empty, EMPTY_POLICIES)
    check_choice(OP, "backend", backend, ("auto", *BACKENDS))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    count = min(num_queries, query.shape[-2]) if calibration in CALIBRATIONS else 0
    sizes = (query.shape[-2], *key.shape[-2:], value.shape[-1])
    read = key.shape[-2] if sample_per_base is None else num_bases * sample_per_base
    read = min(read, key.shape[-2])
    if allow_exact and exact_is_cheaper(
        *sizes,
        num_bases=num_bases,
        num_iters=num_iters,
        read=read,
        corrected=calibration != "none",
        calibrating=count,
    ):
        return exact_attention(query, key, value, scale)
    # All steps are asked before the first one runs.
    tensors = {"query": query, "key": key, "value": value}
    select("soft_em", backend, {"features": key, "payload": value}, num_bases)
    select("basis_attention", backend, tensors, num_bases)
    if calibration == "moments":
        select("moments", backend, {"features": key, **tensors}, num_bases)
    if count > 0:
        select("partial_attention", backend, tensors, 0)
    read_key, read_value = key, value
    if read < key.shape[-2]:
        index = spread_tokens(key.shape[-2], read, key.device)
        read_key, read_value = key.index_select(-2, index), value.index_select(-2, index)
    start: torch.Tensor | int = num_bases
    if init == "gaussian":
        shape = (key.shape[1], num_bases, key.shape[3])
        timestep = torch.zeros((), dtype=torch.int64)
        normals = standard_normals(timestep, [shape[0] * shape[1] * shape[2]], seed=seed)
        normals = normals.view(shape).to(key.device)
        start = initial_bases(read_key, num_bases, init=init, normals=normals)
    bases = attended_bases(
        read_key,
        start,
        num_iters=num_iters,
        temperature=temperature,
        payload=read_value,
        empty=empty,
        proportional=proportional,
        early_stride=EARLY_STRIDE if read < key.shape[-2] else 1,
        backend=backend,
    )
    assert bases.payload is not None
    if calibration == "none" or query.shape[-2] == 0:
        return basis_attention(
            query, bases.bases, bases.payload, scale=scale, bias=bases.bias, backend=backend
        )
    if calibration == "moments":
        some = spread_tokens(read, min(read, MOMENTS_KEYS), key.device, other=True)
        some_key, some_value = (part.index_select(-2, some) for part in (read_key, read_value))
        some = spread_tokens(
            query.shape[-2], min(query.shape[-2], MOMENTS_KEYS // MOMENTS_STEP), query.device
        )
        fitted = moments(
            query.index_select(-2, some),
            some_key,
            some_key,
            some_value,
            bases.found.bases,
            bases.bases,
            bases.payload,
            temperature=temperature,
            scale=scale,
            backend=backend,
        )
    else:
        chosen = query.index_select(-2, spread_tokens(query.shape[-2], count, query.device))
        attended = partial_attention(
            chosen,
            *(part.expand(query.shape[0], *part.shape[1:]) for part in (key, value)),
            scale=scale,
            backend=backend,
        ).output
        fitted = calibrate_bases(
            chosen,
            attended,
            bases.bases,
            bases.payload,
            scale=scale,
            bias=bases.bias,
            form=calibration,
        )
    base_value = bases.payload if fitted.value is None else fitted.value.to(value.dtype)
    return basis_attention(
        query,
        *(part.expand(query.shape[0], *part.shape[1:]) for part in (bases.bases, base_value)),
        scale=scale,
        bias=bases.bias,
        correction=fitted.correction,
        query_mean=fitted.query_mean,
        backend=backend,
    )


def exact_is_cheaper(
    num_queries: int,
    num_keys: int,
    key_width: int,
    value_width: int,
    *,
    num_bases: int,
    num_iters: int,
    read: int | None = None,
    corrected: bool = False,
    calibrating: int = 0,
) -> bool:
    r"""Whether SDPA takes no more FLOPs than attention through bases.

    Counted are the matrix products of one head, with n queries, m keys, widths d and e:

    - exact: $2 n m (d + e)$, the logits and the sum of the values;
    - through bases: $4 s K d$ for the last pass over the s keys that EM reads, half of it for each
      before where these are not all keys, $2 s K e$ for the values' sums in the last, and
      $2 n K (d + e)$ for the queries; with a correction $2 n d e$ for it and, for what it is,
      $2 t (2 K d + K e + d e)$ with t keys ("moments") or $2 q m (d + e)$ for the exact attention
      of q queries.
    """
    both, read = key_width + value_width, num_keys if read is None else read
    exact = 2 * num_queries * num_keys * both
    early = read // (EARLY_STRIDE if read < num_keys else 1) * (num_iters - 1)
    passes = num_bases * (4 * (early + read) * key_width + 2 * read * value_width)
    bases = passes + 2 * num_queries * num_bases * both
    if corrected:
        bases += 2 * num_queries * key_width * value_width
        some = min(read, MOMENTS_KEYS) if calibrating == 0 else 0
        bases += 2 * some * (num_bases * (key_width + both) + key_width * value_width)
        bases += 2 * calibrating * num_keys * both
    return exact <= bases


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """SDPA in the tensors' own dtype, under autocast too."""
    with torch.autocast(query.device.type, enabled=False):
        return scaled_dot_product_attention(query, key, value, scale=scale)


def _cast_as_sdpa_does(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors in the dtype that autocast, where it is on, gives SDPA's: never float64's."""
    check_floating(OP, **dict(zip(("query", "key", "value"), tensors, strict=True)))
    device = tensors[0].device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    for tensor in tensors:
        cast = on and tensor.dtype != torch.float64
        yield tensor.to(torch.get_autocast_dtype(device)) if cast else tensor


def _refuse_what_only_sdpa_takes(
    attn_mask: object, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> None:
    other = "call torch.nn.functional.scaled_dot_product_attention"
    if attn_mask is not None:
        raise ValueError(
            f"{OP}: attn_mask must be None, because a base stands for many keys; leave masked keys "
            f"out of key and value, or {other}"
        )
    if dropout_p != 0:
        raise ValueError(
            f"{OP}: dropout_p is {dropout_p}; it must be 0.0, because a base stands for many keys; "
            f"pass 0.0, or {other}"
        )
    if is_causal:
        raise ValueError(
            f"{OP}: is_causal must be False, because bases are made of all keys; {other}"
        )
    if enable_gqa:
        raise ValueError(
            f"{OP}: enable_gqa must be False; repeat the heads of key and value instead: "
            "key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)"
        )


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    check_same_dtype(OP, query=query, key=key, value=value)
    fits = (
        query.ndim == key.ndim == value.ndim == 4
        and key.shape[:3] == value.shape[:3]
        and key.shape[0] in (1, query.shape[0])
        and key.shape[1] == query.shape[1]
        and key.shape[3] == query.shape[3]
        and min(key.shape[2:]) >= 1
    )
    if not fits:
        raise ValueError(
            f"{OP}: query must be [B, h, n, d], key [B or 1, h, m, d] and value [B or 1, h, m, e] "
            "with m and d at least 1 (unsqueeze adds a leading size); they are "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
