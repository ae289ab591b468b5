"""Self-attention of a video by several forms, each with the FLOPs that it takes.

Those of other papers are written from their formulas, on the same groups of tokens as this
package's bases, so that they differ in what they do with the groups alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.functional import one_hot, scaled_dot_product_attention

from stem_kernels import basis_attention
from stem_kernels.shared.grid import window_counts
from stem_kernels.video import video_attention, video_bases, window_attention

Grid = tuple[int, int, int]
SAMPLE_PER_BASE = 8
NUM_ITERS = 2


@dataclass
class Layer:
    """Query, key and value [B, h, n, d] after the rotary embedding, and the video's grid.

    Attributes:
        flops: FLOPs of the form's matrix products over those of exact attention, 4 n^2 d a head;
            each part of a form adds its own.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: Grid
    flops: float = field(default=0.0)

    @property
    def tokens(self) -> int:
        """The number n of the video's tokens."""
        return self.query.shape[2]

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def bases(self, per_base: int) -> int:
        """The number of bases with so many tokens each."""
        return math.ceil(self.tokens / per_base)


Form = Callable[[Layer], torch.Tensor]


def exact(layer: Layer) -> torch.Tensor:
    """Attention to all tokens."""
    layer.flops += 1.0
    return scaled_dot_product_attention(*layer.operands)


def windowed(layer: Layer, per_base: int = 64, **options: Any) -> torch.Tensor:
    """`video_attention` with so many tokens a base, else its defaults."""
    num_bases, tokens = layer.bases(per_base), layer.tokens
    layer.flops += window_flops(layer.grid, options.get("window", 2)) + num_bases / tokens
    layer.flops += _grouping_flops(layer, num_bases, options.get("num_iters", NUM_ITERS))
    if options.get("correction", "moments") == "moments":
        layer.flops += 2 * layer.query.shape[-1] / tokens
    return video_attention(*layer.operands, layer.grid, num_bases=num_bases, **options)


def window_alone(layer: Layer, window: int = 2) -> torch.Tensor:
    """Attention to the window, without bases."""
    layer.flops += window_flops(layer.grid, window)
    return window_attention(*layer.operands, layer.grid, window=window).output


def bases_alone(layer: Layer, per_base: int = 32) -> torch.Tensor:
    """Attention to the bases of all tokens, without a window."""
    num_bases = layer.bases(per_base)
    layer.flops += _grouping_flops(layer, num_bases) + num_bases / layer.tokens
    bases = video_bases(layer.key, layer.value, num_bases)
    sizes = one_hot(bases.assignment, num_bases).sum(2)
    return basis_attention(layer.query, bases.key, bases.value, bias=sizes.float().log())


def radial(layer: Layer, width: float = 1.0, *, sink: bool = True) -> torch.Tensor:
    r"""The static mask of radial attention (arXiv 2506.19852).

    Tokens k and l of frames i and j, of s tokens each, see each other where
    $|k - l| + 1 \le s / 2^{\lfloor \log_2 \max(|i - j|, 1) \rfloor}$; and all see frame 0.

    Args:
        layer: Layer.
        width: Factor of the right side, to bring it to another number of FLOPs.
        sink: Whether all tokens see frame 0.
    """
    seen = _radial_mask(layer.grid, width, sink)
    layer.flops += float(seen.float().mean())
    return scaled_dot_product_attention(*layer.operands, attn_mask=seen)


@functools.cache
def _radial_mask(grid: Grid, width: float, sink: bool) -> torch.Tensor:
    tokens, size = math.prod(grid), math.prod(grid[1:])
    frame = torch.arange(tokens) // size
    place = torch.arange(tokens) % size
    apart = (frame[:, None] - frame).abs().clamp(min=1)
    reach = width * size / 2.0 ** torch.floor(torch.log2(apart.float()))
    seen = (place[:, None] - place).abs() + 1 <= reach
    return seen | (frame == 0) if sink else seen


def best_clusters(
    layer: Layer, share: float, *, rest: bool, by_error: bool = False, per_base: int = 32
) -> torch.Tensor:
    """Exact attention to the best groups of keys for each group of queries.

    Queries and keys are grouped apart. Groups of keys are taken until they hold `share` of all
    tokens; the others are dropped, as in Sparse VideoGen2 (arXiv 2505.18875), or take part by their
    means, as in SVG-EAR (arXiv 2603.08982).

    Args:
        layer: Layer, of one video.
        share: Share of all tokens that a query attends to exactly.
        rest: Whether the other groups take part by their means.
        by_error: What ranks groups of keys: the weight that mean key and size give them in the
            softmax of a group's mean query; or that weight, times the deviations of logits and
            values within the group, over its size: an estimate of what the mean does wrong for
            what exact attention takes.
        per_base: Number of tokens for each group of keys; groups of queries have four times it.
    """
    tokens, scale = layer.tokens, layer.query.shape[-1] ** -0.5
    num_keys, num_queries = layer.bases(per_base), layer.bases(4 * per_base)
    keys = video_bases(layer.key, layer.value, num_keys)
    queries = video_bases(layer.query, layer.query, num_queries)
    belongs = one_hot(keys.assignment, num_keys).float()
    sizes = belongs.sum(2)
    rank = scale * queries.key @ keys.key.mT + sizes.log()[:, :, None]
    if by_error:
        of_keys, of_values = (
            belongs.mT @ (part - belongs @ means).square() / sizes[..., None].clamp(min=1)
            for part, means in ((layer.key, keys.key), (layer.value, keys.value))
        )
        of_logits = (scale * queries.key).square() @ of_keys.mT
        rank = rank - sizes.log()[:, :, None] + of_logits.log() / 2
        rank = rank + of_values.sum(-1).log()[:, :, None] / 2
    order = rank.argsort(-1, descending=True)
    held = sizes[:, :, None].expand_as(order).gather(-1, order).cumsum(-1)
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    chosen.scatter_(-1, order, held <= share * tokens)
    chosen.scatter_(-1, order[..., :1], True)
    out, pairs = torch.empty_like(layer.value), 0
    for head, group in itertools.product(range(layer.query.shape[1]), range(num_queries)):
        rows = (queries.assignment[0, head] == group).nonzero()[:, 0]
        taken = chosen[0, head, group]
        exactly = taken[keys.assignment[0, head]].nonzero()[:, 0]
        pairs += len(rows) * len(exactly)
        query, key, value = (part[0, head] for part in layer.operands)
        key, value, bias = key[exactly], value[exactly], torch.zeros(len(exactly))
        if rest:
            others = ~taken & (sizes[0, head] > 0)
            key = torch.cat([key, keys.key[0, head, others]])
            value = torch.cat([value, keys.value[0, head, others]])
            bias = torch.cat([bias, sizes[0, head, others].log()])
        weights = (scale * query[rows] @ key.mT + bias).softmax(-1)
        out[0, head, rows] = weights @ value
    layer.flops += pairs / (layer.query.shape[1] * tokens**2) + (num_keys / tokens if rest else 0.0)
    layer.flops += _grouping_flops(layer, num_keys) + _grouping_flops(layer, num_queries)
    layer.flops += (1 + by_error) * num_queries * num_keys / (2 * tokens**2)
    return out


def window_flops(grid: Grid, window: int) -> float:
    """Share of all pairs of tokens that are in each other's window; it is smaller at the edges."""
    one_base = torch.zeros(1, math.prod(grid), dtype=torch.int64)
    near, total = window_counts(one_base, grid, window, 1)
    return float(near.double().mean() / total)


def _grouping_flops(layer: Layer, groups: int, num_iters: int = NUM_ITERS) -> float:
    """EM on a sample and the assignment of all tokens."""
    read = min(layer.tokens, SAMPLE_PER_BASE * groups)
    return num_iters * read * groups / layer.tokens**2 + groups / (2 * layer.tokens)


DEFAULTS, NARROW = "defaults", "window 1, 32 a base"
FORMS: dict[str, Form] = {
    DEFAULTS: windowed,
    "no moments": partial(windowed, correction="none"),
    "no EM": partial(windowed, num_iters=0),
    "48 a base": partial(windowed, per_base=48),
    "96 a base": partial(windowed, per_base=96),
    "128 a base": partial(windowed, per_base=128),
    NARROW: partial(windowed, per_base=32, window=1),
    "window 1, 16 a base": partial(windowed, per_base=16, window=1),
    "window 1, 64 a base": partial(windowed, per_base=64, window=1),
    "window 1, 24 a base, no EM": partial(windowed, per_base=24, window=1, num_iters=0),
    "window alone": window_alone,
    "bases alone": bases_alone,
    "radial": radial,
    "radial, narrow": partial(radial, width=0.25),
    "best clusters": partial(best_clusters, share=0.08, rest=False),
    "best clusters, rest by means": partial(best_clusters, share=0.048, rest=True),
    "the same by error": partial(best_clusters, share=0.048, rest=True, by_error=True),
}
"""What is compared, by what the tables call it."""
EXACT = "exact"
