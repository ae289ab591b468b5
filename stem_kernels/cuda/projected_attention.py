"""`projected_attention` in the C++ extension, whose kernel is for CPUs."""

from __future__ import annotations

import torch

from ..shared.outputs import projected_output
from . import contiguous_rows, enter
from .basis_attention import expanded_floats


def projected_attention_cuda(
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """tokens [B, n, C], weights [h d, C] and [E, h e], key and value [B or 1, h, K, ...].

    Returns contiguous [B, n, E] of the tokens' dtype.
    """
    widths = (key.size(-1), value.size(-1), output_weight.size(0))
    flags = (bias is None, correction is None, query_bias is None, output_bias is None, *widths)
    enter("projected_attention", tokens, output_weight, key.size(-2), flags)
    lead = (tokens.shape[0], *key.shape[1:3])
    found: torch.Tensor = torch.ops.stem_kernels_ext.projected_attention(
        contiguous_rows(tokens),
        contiguous_rows(query_weight),
        None if query_bias is None else query_bias.float().contiguous(),
        contiguous_rows(key).expand(*lead, key.shape[-1]),
        contiguous_rows(value).expand(*lead, value.shape[-1]),
        contiguous_rows(output_weight),
        None if output_bias is None else output_bias.float().contiguous(),
        None if bias is None else contiguous_rows(bias.float()).expand(lead),
        expanded_floats(correction, lead[0]),
        expanded_floats(query_mean, lead[0]),
        scale,
    )
    return found


torch.library.register_fake("stem_kernels_ext::projected_attention")(projected_output)
