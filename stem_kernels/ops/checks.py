"""Checks that several operators share. Each error names the value and the fix."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor is a floating point tensor on one device."""
    devices: dict[str, torch.device] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; "
                "convert it to float16, bfloat16, float32 or float64"
            )
        devices[name] = tensor.device
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {places}")


def check_same_dtype(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor has the same dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: {' and '.join(dtypes)} must have one dtype; {listed}")


def check_width(op: str, name: str, tensor: torch.Tensor) -> None:
    """The rows of `tensor`, its last size, have at least one channel."""
    if tensor.shape[-1] == 0:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}; its last size must be at least 1")


def check_positive(op: str, name: str, value: float) -> None:
    """`value` is a positive finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} is {value}; it must be positive and finite")


def check_count(op: str, name: str, value: int) -> None:
    """`value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}; it must be a whole number of at least 1")


def check_seed(op: str, value: int) -> None:
    """`value` is a whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: seed is {value!r}; it must be a whole number of 64 bits")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{op}: {name} is "{value}"; it must be one of {listed}')
