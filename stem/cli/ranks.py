"""The command line under torchrun: a process group, and one rank that speaks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from .app import console

if TYPE_CHECKING:
    import torch.distributed as dist

_PATIENCE = timedelta(hours=6)  # of ranks that wait while the first one reads and encodes


@contextlib.contextmanager
def ranks(device: str | None) -> Iterator[dist.ProcessGroup | None]:
    """The process group of this run, where torchrun or another launcher started several processes.

    NCCL on GPUs, gloo on CPUs. All ranks but the first are silent but for errors.

    Args:
        device: Device asked for, or None.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(rank_device(device))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    if dist.get_rank() > 0:
        console.quiet = True
        logging.getLogger("stem").setLevel(logging.ERROR)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def one_process(command: str) -> None:
    """Raise where torchrun or another launcher started several processes.

    Args:
        command: Name of a command that runs in one.

    Raises:
        ValueError: with what to do.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if int(count) > 1:
        raise ValueError(
            f"stem {command} runs in one process, and WORLD_SIZE is {count}; start it without "
            "torchrun. Through UNets, compare, invert, reconstruct and edit take several"
        )


def rank_device(device: str | None) -> str | None:
    """The device of this rank: the GPU of its number on this machine, where any GPU will do."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda"):
        return device
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else device
