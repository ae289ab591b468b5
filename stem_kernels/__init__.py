"""Attention over EM bases: fused operators and a drop-in for scaled dot-product attention."""

from .backends import BackendError
from .ops.attention_error import attention_error
from .ops.basis_attention import basis_attention
from .ops.blended_attention import blended_attention
from .ops.em_statistics import em_statistics
from .ops.em_update import em_update
from .ops.initialization import initial_bases, standard_normals
from .ops.nearest_token import nearest_token
from .ops.soft_em import attention_bias, soft_em
from .ops.stem_attention import stem_attention

__all__ = [
    "BackendError",
    "attention_bias",
    "attention_error",
    "basis_attention",
    "blended_attention",
    "em_statistics",
    "em_update",
    "initial_bases",
    "nearest_token",
    "soft_em",
    "standard_normals",
    "stem_attention",
]
