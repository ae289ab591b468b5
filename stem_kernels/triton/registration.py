"""Operators of torch's dispatcher, as `torch.library.custom_op` makes them at four times the price.

A call of a `custom_op` costs the CPU some 20 us, and a layer makes two. What it adds is not used
here: these operators have no gradients, and change none of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

functions: dict[Any, Callable[..., Any]] = {}
"""The Python function behind each operator."""


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that becomes the operator `stem_kernels::` and its name.

    Its annotations are the operator's schema. `torch.library.register_fake` gives it outputs
    without data.
    """
    name = f"stem_kernels::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"))(function)
    found = getattr(torch.ops.stem_kernels, function.__name__).default
    functions[found] = function
    return found
