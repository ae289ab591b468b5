"""torch's settings of a thread, which belong to a chunk while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Settings:
    """Grad mode, inference mode, autocast and default dtype.

    Args:
        grad: Whether gradients are recorded.
        inference: Whether inference mode is on.
        dtype: Default dtype.
        autocast: Whether autocast is on and its dtype, a type of device each.
        autocast_cache: Whether autocast keeps the weights that it has cast.
    """

    grad: bool
    inference: bool
    dtype: torch.dtype
    autocast: tuple[tuple[bool, torch.dtype], ...]
    autocast_cache: bool

    @classmethod
    def now(cls) -> Settings:
        """The settings that are on in this thread."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            tuple(
                (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in _AUTOCAST_DEVICES
            ),
            torch.is_autocast_cache_enabled(),
        )

    def set(self) -> None:
        """Put these settings on, but for inference mode."""
        torch.set_grad_enabled(self.grad)
        torch.set_default_dtype(self.dtype)
        for device, (on, dtype) in zip(_AUTOCAST_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, on)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """These settings for the length of a `with` block; afterwards what was on before."""
        before = Settings.now()
        # Inference mode has no setter. Its guard puts back all that was there when it was made, so
        # that the guards of several chunks need not end in the reverse of their order.
        differs = before.inference != self.inference
        with torch.inference_mode(self.inference) if differs else contextlib.nullcontext():
            self.set()
            try:
                yield
            finally:
                before.set()
