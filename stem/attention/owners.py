"""Which thread a UNet's attention belongs to while a `with` block is open."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Held while processors are exchanged, and for as long as it takes to look at who owns a UNet.
lock = threading.RLock()
_owners: weakref.WeakKeyDictionary[torch.nn.Module, _Owner] = weakref.WeakKeyDictionary()


@dataclass
class _Owner:
    """The thread whose `with` blocks a UNet's attention belongs to, and how many there are."""

    thread: int
    name: str
    blocks: int = 0


def check_owner(unet: torch.nn.Module) -> None:
    """Raise RuntimeError where the UNet's attention belongs to another thread."""
    owner = _owners.get(unet)
    if owner is not None and owner.thread != threading.get_ident():
        raise RuntimeError(
            f"thread {owner.name!r} has changed this UNet's attention for a `with` block that is "
            "still open; wait until it ends, or give each thread a pipeline of its own"
        )


@contextlib.contextmanager
def owned(unet: torch.nn.Module) -> Iterator[None]:
    """The UNet's attention belongs to this thread for the length of a `with` block."""
    with lock:
        check_owner(unet)
        owner = _owners.setdefault(
            unet, _Owner(threading.get_ident(), threading.current_thread().name)
        )
        owner.blocks += 1
    try:
        yield
    finally:
        with lock:
            owner.blocks -= 1
            if not owner.blocks:
                del _owners[unet]
