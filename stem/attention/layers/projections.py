"""The projections of a self-attention: to queries, keys and values, and of what is attended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from stem_kernels.ops.projected_attention import is_fused, projected_attention

from .hooks import Seen

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def join_heads(attended: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[videos, groups, h, n, d] -> [videos, frames, S, h * d], for tokens of `shape`."""
    videos, frames, num_tokens, _ = shape
    return attended.transpose(2, 3).reshape(videos, frames, num_tokens, -1)


def split_heads(attn: Attention, projected: torch.Tensor, videos: int) -> torch.Tensor:
    """[rows, S, h * d] -> [videos, h, rows * S / videos, d], a view of the same memory."""
    return projected.reshape(videos, -1, attn.heads, projected.shape[-1] // attn.heads).transpose(
        1, 2
    )


def _plain_projections(attn: Attention) -> tuple[torch.nn.Linear, torch.nn.Linear] | None:
    """The projections to queries and to outputs, where their weights and biases alone make their
    results; None where there is more to them: LoRA, hooks, quantised weights, a norm, dropout."""
    project, dropout = attn.to_out
    both = attn.to_q, project
    plain = (
        attn.norm_q is None
        and type(dropout) is torch.nn.Dropout
        and not (dropout.training and dropout.p > 0)
        and all(type(module) is torch.nn.Linear for module in both)
        and all(type(part) is torch.nn.Parameter for module in both for part in module.parameters())
        and all(map(_runs_as_written, (*both, dropout)))
        and not torch.nn.modules.module._has_any_global_hook()
    )
    return both if plain else None


def _runs_as_written(module: torch.nn.Module) -> bool:
    """Whether calling a module is its class's `forward`, and nothing else."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module)  # as accelerate's hooks replace it


def project_queries(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """Queries [videos, h, frames * S, d] of tokens [videos, frames, S, C].

    They are wanted after chunks have met: computed before, those of all frames would wait.
    """
    query = split_heads(attn, attn.to_q(tokens), tokens.shape[0])
    return query if attn.norm_q is None else attn.norm_q(query)


def project_keys_and_values(
    attn: Attention, tokens: torch.Tensor, videos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [videos, h, n, d] of tokens [..., C] (see `split_heads`)."""
    key = split_heads(attn, attn.to_k(tokens), videos)
    value = split_heads(attn, attn.to_v(tokens), videos)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return key, value


def attend_in_one(
    attn: Attention, tokens: torch.Tensor, seen: Seen, backend: str
) -> torch.Tensor | None:
    """Attention of tokens to bases from projection to projection, by one kernel.

    Args:
        attn: Attention module, for its projections.
        tokens: Normalised input of the module, [videos, frames, S, C].
        seen: Bases.
        backend: Name of the backend.

    Returns:
        [videos, frames, S, C]; None where no kernel serves these, torch.compile makes a graph, or a
        dispatch mode looks on, which would see one operator in place of the steps.
    """
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if _get_current_dispatch_mode() is not None:
        return None
    plain = _plain_projections(attn)
    if plain is None or torch.is_autocast_enabled("cpu"):
        return None
    to_query, to_output = plain
    if any(module.weight.dtype != tokens.dtype for module in plain):
        return None
    key, value = seen.key.squeeze(1), seen.value.squeeze(1)
    bias, correction, mean = (
        None if part is None else part.squeeze(1)
        for part in (seen.bias, seen.correction, seen.query_mean)
    )
    given = (tokens.flatten(1, 2), to_query.weight, key, value, to_output.weight)
    more: dict[str, Any] = {
        "query_bias": to_query.bias, "output_bias": to_output.bias, "bias": bias,
        "correction": correction, "query_mean": mean,
    }  # fmt: skip
    if not is_fused(*given, **more, backend=backend):
        return None
    output = projected_attention(*given, **more, backend=backend)
    return output.unflatten(1, tokens.shape[1:3])
