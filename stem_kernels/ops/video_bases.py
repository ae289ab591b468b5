"""Bases of the keys of a video's tokens, and which of them each token belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..reference.video_bases import video_bases_torch
from ..shared.grid import Grid, window_counts
from ..shared.spread import spread_tokens
from .checks import check_count, check_floating, check_positive, check_same_dtype, check_width
from .initialization import initial_bases
from .nearest_token import nearest_token
from .soft_em import soft_em

OP = "video_bases"


class VideoBases(NamedTuple):
    """Keys [B, h, K, d] and values [B, h, K, e] of the bases, float32 or float64; number of each
    token's base, int64 [B, h, n]; moments [B, h, d, e]."""

    key: torch.Tensor
    value: torch.Tensor
    assignment: torch.Tensor
    moments: torch.Tensor

    def bias(self, grid: Grid, window: int) -> torch.Tensor:
        """Bias [B, h, H W, K] of the bases where the tokens of a window are attended to exactly.

        log(M - N), M the tokens of a base and N those of them in the window of a place, so that
        nothing counts twice; -inf where all of them are.

        Args:
            grid: Frames, height and width of the video in tokens.
            window: Number of places to each side.
        """
        lead = self.assignment.shape[:2]
        found = window_counts(self.assignment.flatten(0, 1), grid, window, self.key.shape[-2])
        near, total = found
        return (total.unsqueeze(1) - near).log().unflatten(0, lead)


def video_bases(
    key: torch.Tensor,
    value: torch.Tensor,
    num_bases: int,
    *,
    num_iters: int = 2,
    sample_per_base: int | None = 8,
    temperature: float = 0.01,
    backend: str = "auto",
) -> VideoBases:
    r"""Bases of a video's keys: EM on a sample, then the means of the tokens nearest to each base.

    `soft_em` runs on `sample_per_base` K keys, spread evenly over all tokens. Then each token
    belongs to the base with the largest cosine, and base k has the mean key $c_k$ and the mean
    value $v_k$ of its tokens. What the means leave out, to first order in the query, is one matrix
    a head,

    $$C = \frac1n \sum_i (k_i - c_{b(i)})\, (v_i - v_{b(i)})^T,$$

    which needs no queries: bases that have the share P of a query's softmax are short of
    P scale q C, as far as logits differ little within a base.

    Args:
        key: Keys [B, h, n, d], n >= 1, as the logits see them (after a rotary embedding), any
            strides. Keys of distant places that were rotated away from each other are no group.
        value: Values [B, h, n, e] of the same dtype.
        num_bases: Number K of bases, at least 1. With n or more every token is a base of its own,
            and no EM runs.
        num_iters: Number of EM's iterations, at least 0. With 0 the tokens nearest to each of K
            keys, spread over the video, are a group.
        sample_per_base: Number of keys that EM reads for each base; None: EM reads all keys.
        temperature: Temperature tau > 0 of the responsibilities.
        backend: Name of the backend of EM and of the assignment, "auto", "triton", "cuda" or
            "torch"; plain torch makes the means.

    Returns:
        `VideoBases`; K is at most n. A base without tokens has the key and the value 0, and the
        bias -inf. EM and the assignment get no gradient, the means and the moments do.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: this package's; the grouping is that of centroid methods such as arXiv 2505.18875
    (Sparse VideoGen2), with EM (arXiv 2312.05856) in place of k-means.
    """
    check_floating(OP, key=key, value=value)
    check_same_dtype(OP, key=key, value=value)
    if key.ndim != 4 or value.ndim != 4 or value.shape[:3] != key.shape[:3] or 0 in key.shape[:3]:
        raise ValueError(
            f"{OP}: key must be [B, h, n, d] and value [B, h, n, e], B, h and n at least 1; they "
            f"are {list(key.shape)} and {list(value.shape)}"
        )
    check_width(OP, "key", key)
    check_count(OP, "num_bases", num_bases)
    check_em(OP, num_iters, sample_per_base, temperature)
    num_bases = min(num_bases, key.shape[2])
    assignment = assigned(
        key,
        num_bases,
        num_iters=num_iters,
        sample_per_base=sample_per_base,
        temperature=temperature,
        backend=backend,
    )
    means = video_bases_torch(key, value, assignment, num_bases)
    return VideoBases(means[0], means[1], assignment, means[2])


def check_em(op: str, num_iters: int, sample_per_base: int | None, temperature: float) -> None:
    """Raise the error that a caller should see where EM cannot run so."""
    if type(num_iters) is not int or num_iters < 0:
        raise ValueError(
            f"{op}: num_iters is {num_iters!r}; it must be a whole number of at least 0"
        )
    if sample_per_base is not None:
        check_count(op, "sample_per_base", sample_per_base)
    check_positive(op, "temperature", temperature)


@torch.no_grad()
def assigned(
    key: torch.Tensor,
    num_bases: int,
    *,
    num_iters: int,
    sample_per_base: int | None,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    """Number of each key's base, int64 [B, h, n]; the arguments are those of `video_bases`."""
    num_tokens = key.shape[2]
    if num_bases == num_tokens:
        return torch.arange(num_tokens, device=key.device).expand(key.shape[:3])
    read = key.detach()
    if sample_per_base is not None and sample_per_base * num_bases < num_tokens:
        index = spread_tokens(num_tokens, sample_per_base * num_bases, key.device)
        read = read.index_select(2, index)
    if num_iters == 0:
        found = initial_bases(key, num_bases)
    else:
        found = soft_em(
            read, num_bases, num_iters=num_iters, temperature=temperature, backend=backend
        ).bases
    flat = (tensor.detach().flatten(0, 1) for tensor in (key, found.to(key.dtype)))
    return nearest_token(*flat, backend=backend).long().unflatten(0, key.shape[:2])
