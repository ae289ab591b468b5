"""Self-attention of a video transformer: a window, bases for the rest, and one matrix a head."""

from __future__ import annotations

import torch

from ..backends import BACKENDS
from ..reference.chunks import groups
from ..reference.video_attention import video_attention_torch
from ..reference.video_bases import damped_moments, group_means
from ..shared.grid import Grid
from ..shared.outputs import attention_output
from ..shared.tangents import forward_mode
from ..verification import run, video
from ..verification.comparison import Comparison
from .basis_attention import ROUNDING_ATOL
from .checks import check_choice, check_count, check_floating, check_same_dtype
from .video_bases import assigned, check_em
from .window_attention import check_video

OP = "video_attention"
CORRECTIONS = ("none", "moments")


def video_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    *,
    num_bases: int,
    window: int = 2,
    text: tuple[torch.Tensor, torch.Tensor] | None = None,
    text_mask: torch.Tensor | None = None,
    correction: str = "moments",
    num_iters: int = 2,
    sample_per_base: int | None = 8,
    temperature: float = 0.01,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attention of a video's tokens to all of them: a window exactly, and the rest by bases.

    One softmax for each query goes over

    - the tokens within `window` places of it in all frames, exactly (see `window_attention`);
    - K bases of all keys (see `video_bases`), each with the weight of the tokens of it that are not
      in the window: of $M_k$ tokens of a base $N_k$ are, so its logit has the bias
      $\log(M_k - N_k)$ and its value is the mean of those others, $(M_k v_k - \sum_{i \in k,\,
      \text{near}} v_i) / (M_k - N_k)$; its key stays the mean of all;
    - the keys of the text, exactly, if there are any.

    The value of a base differs from place to place, and none of these is held: what a whole base
    has too much is taken from the weights of the window's tokens,

    $$o = \frac1D \Big(\sum_k M_k e^{q c_k} v_k + \sum_{i\ \text{near}}
      (e^{q k_i} - e^{q c_{b(i)}})\, v_i\Big), \quad
      D = \sum_k (M_k - N_k)\, e^{q c_k} + \sum_{i\ \text{near}} e^{q k_i}.$$

    With the correction "moments" it gets $P\, q\, C / \sqrt{1 + s^2}$ on top, P the bases' share of
    D and C the moments of `video_bases`; logits and this have the factor `scale`. The first order
    in the query overshoots where logits spread widely within their bases: $s^2$ is the mean square
    of $q\,(k - c)$ over a head's queries and keys. With a window over all places, or as many bases
    as tokens, the result is that of exact attention.

    Counted are the matrix products of one head, with n tokens, widths d and e, s = min(n, 8 K):
    2 n m (d + e) for a window of m tokens (9 F with window = 1, 21 F with 2), 2 n K (d + e) for the
    bases, 4 R s K d for R iterations of EM, 2 n K d for the assignment and 4 n d (d + e) for the
    moments; exact attention takes 2 n^2 (d + e).

    Args:
        query: Queries [B, h, n, d] of the video's tokens, any strides; n = F H W tokens, frame
            after frame and row after row.
        key: Keys [B, h, n, d] of the same dtype, both after a rotary embedding.
        value: Values [B, h, n, e] of the same dtype.
        grid: Frames F, height H and width W of the video, in tokens.
        num_bases: Number K of bases, at least 1; more than n count as n.
        window: Number of places to each side that are attended to exactly, at least 0.
        text: Keys [B, h, T, d] and values [B, h, T, e] of the text, or None. The text's own queries
            are not served here: they are few, and take exact attention to all tokens.
        text_mask: Mask [B, T] of the text's keys, bool, True for those that count; None: all.
        correction: Correction of the bases' part, "none" or "moments".
        num_iters: Number of EM's iterations, at least 0, as `video_bases` takes it.
        sample_per_base: Number of keys that EM reads for each base; None: EM reads all keys.
        temperature: Temperature tau > 0 of EM.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch". The extension ("cuda")
            has kernels for CPUs; on a GPU those of EM and of the assignment, and plain torch
            computes the rest, as it does for Triton with more than 128 channels and on AMD's GPUs.

    Returns:
        [B, h, n, e] of the query's dtype; a view of memory laid out as [B, n, h, e]. Logits,
        softmax and sums are float32. Heads go one after the other on a CPU, and what is held of
        one is linear in n. Triton rounds the means of bases, the weights and the matrix to the
        inputs' dtype for their products. Nothing waits for the device, and equal calls give equal
        bits.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: this package's, see docs/video-transformers.md.
    """
    check_video(OP, query, key, value, grid, window)
    check_count(OP, "num_bases", num_bases)
    check_em(OP, num_iters, sample_per_base, temperature)
    check_choice(OP, "correction", correction, CORRECTIONS)
    check_choice(OP, "backend", backend, ("auto", *BACKENDS))
    text_key, text_value = _checked_text(query, value, text, text_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    num_bases = min(num_bases, query.shape[2])
    assignment = assigned(
        key,
        num_bases,
        num_iters=num_iters,
        sample_per_base=sample_per_base,
        temperature=temperature,
        backend=backend,
    )
    arguments = (
        query, key, value, assignment, text_key, text_value, text_mask, list(grid), window,
        num_bases, correction == "moments", scale,
    )  # fmt: skip
    tensors = {
        "query": query, "key": key, "value": value, "text_key": text_key, "text_value": text_value,
    }  # fmt: skip
    needing = (tensor is not None and tensor.requires_grad for tensor in tensors.values())
    graded = torch.is_grad_enabled() and any(needing)
    # In a graph it is one node; derivatives pass through what it is made of.
    one_node = torch.compiler.is_compiling() and not graded and not forward_mode()

    def on(chosen: str) -> torch.Tensor:
        if chosen == "triton":
            from ..triton.video.attention import serves, video_attention_triton

            if serves(query, value):
                return video_attention_triton(*arguments)
        if chosen == "cuda" and query.device.type == "cpu":
            return (_in_extension if one_node else video_attention_by_extension)(*arguments)
        return (_in_torch if one_node else video_attention_torch)(*arguments)

    def check(out: torch.Tensor, _: str) -> list[Comparison] | None:
        return video.video_attention(out, *arguments, ROUNDING_ATOL)

    return run(OP, backend, tensors, 0, on, check).transpose(1, 2)


def video_attention_by_extension(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    grid: list[int],
    window: int,
    num_bases: int,
    corrected: bool,
    scale: float,
) -> torch.Tensor:
    """As `video_attention_torch`: bases and matrix by torch, attention by the extension on CPUs."""
    from ..cuda.video_attention import video_attention_cuda

    found = []
    with torch.autocast("cpu", enabled=False):
        for group in groups(query):
            queries, keys, values = (
                part[group].flatten(0, 1).float() for part in (query, key, value)
            )
            numbers = assignment[group].flatten(0, 1)
            key_means, value_means = group_means(numbers, num_bases, (keys, values))
            counts = numbers.new_zeros(key_means.shape[:2])
            counts.scatter_add_(1, numbers, torch.ones_like(numbers))
            parts = [key_means, value_means, counts]
            if corrected:
                parts.append(
                    damped_moments(queries, keys, values, numbers, key_means, value_means, scale)
                )
            found.append(parts)
    base_key, base_value, counts, *matrix = (
        torch.cat(parts).unflatten(0, query.shape[:2]) for parts in zip(*found, strict=True)
    )
    return video_attention_cuda(
        query,
        key,
        value,
        assignment,
        (base_key, base_value, counts),
        None if text_key is None or text_value is None else (text_key, text_value, text_mask),
        matrix[0] if corrected else None,
        grid,
        window,
        scale,
    )


_in_torch, _in_extension = (
    torch.library.custom_op(f"stem_kernels::{made.__name__}", made, mutates_args=())
    for made in (video_attention_torch, video_attention_by_extension)
)
for _made in (_in_torch, _in_extension):
    _made.register_fake(attention_output)


def _checked_text(
    query: torch.Tensor,
    value: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if text is None:
        if mask is not None:
            raise ValueError(f"{OP}: text_mask is given and text is None; give both or neither")
        return None, None
    key, values = text
    check_floating(OP, query=query, text_key=key, text_value=values)
    check_same_dtype(OP, query=query, text_key=key, text_value=values)
    expected = [*query.shape[:2], key.shape[-2] if key.ndim == 4 else 0]
    if (
        list(key.shape) != [*expected, query.shape[-1]]
        or list(values.shape) != [*expected, value.shape[-1]]
        or expected[-1] < 1
    ):
        raise ValueError(
            f"{OP}: text must be keys [{query.shape[0]}, {query.shape[1]}, T, {query.shape[-1]}] "
            f"and values [..., T, {value.shape[-1]}], T at least 1; they are {list(key.shape)} and "
            f"{list(values.shape)}"
        )
    fits = mask is None or (mask.dtype == torch.bool and list(mask.shape) == expected[::2])
    if mask is not None and not fits:
        raise ValueError(
            f"{OP}: text_mask is {list(mask.shape)} of {mask.dtype}; it must be "
            f"{expected[::2]} of torch.bool"
        )
    return key, values
