"""The drop-in: self-attention through EM bases of the keys."""

from __future__ import annotations

import torch

from .basis_attention import basis_attention
from .checks import check_choice, check_floating, check_same_dtype
from .initialization import initial_bases, standard_normals
from .soft_em import attention_bias, soft_em

OP = "stem_attention"


def stem_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_bases: int = 256,
    num_iters: int = 2,
    temperature: float = 0.01,
    init: str = "tokens",
    seed: int = 0,
    empty: str = "mask",
    proportional: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention through K bases of the keys, in the layout of SDPA.

    EM (`soft_em`) on the keys of each head, the values riding along as its payload, then
    `basis_attention` of every query to the K bases. O(n K) in place of O(n^2); approximate.

    A drop-in for `torch.nn.functional.scaled_dot_product_attention(query, key, value)` without
    mask, dropout or causality. To share bases over frames, fold the frames into n.

    Args:
        query: [B, h, n, d], any strides.
        key: [B, h, m, d], m >= 1.
        value: [B, h, m, e].
        num_bases: K. With K >= m there is nothing to gain over SDPA.
        num_iters: R.
        temperature: tau.
        init: "tokens" (no random numbers) or "gaussian" (the authors' code; `seed` counts).
        seed: of "gaussian".
        empty: "zero", "mask" or "reseed", see `soft_em`.
        proportional: weigh bases by their mass, see `attention_bias`; without it bases that
            stand for few tokens weigh as much as those that stand for many.
        scale: of the attention logits; 1 / sqrt(d) if None.
        backend: "auto", "triton", "cuda" or "torch".

    Returns:
        [B, h, n, e] of the query's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856; the key-space form is the authors' released code's, which has
    num_iters=5, init="gaussian", empty="zero" and proportional=False. The defaults here are those
    of `stem.StemConfig`.
    """
    check_floating(OP, query=query, key=key, value=value)
    check_same_dtype(OP, query=query, key=key, value=value)
    check_choice(OP, "init", init, ("tokens", "gaussian"))
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"{OP}: query must be [B, h, n, d], key [B, h, m, d], value [B, h, m, e]; they are "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    normals = None
    if init == "gaussian":
        shape = (key.shape[1], num_bases, key.shape[3])
        timestep = torch.zeros((), dtype=torch.int64)
        normals = standard_normals(timestep, [shape[0] * shape[1] * shape[2]], seed=seed)
        normals = normals.view(shape).to(key.device)
    start = initial_bases(key, num_bases, init=init, normals=normals)
    found = soft_em(
        key,
        start,
        num_iters=num_iters,
        temperature=temperature,
        payload=value,
        empty=empty,
        backend=backend,
    )
    assert found.payload is not None
    return basis_attention(
        query,
        found.bases.to(query.dtype),
        found.payload.to(query.dtype),
        scale=scale,
        bias=attention_bias(found.mass, empty=empty, proportional=proportional),
        backend=backend,
    )
