"""The command line under torchrun: a process group, and one rank that speaks."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer

from .app import KEPT, console, fail

if TYPE_CHECKING:
    import torch.distributed as dist

_LOST = 2  # exit status, that of other errors
_POLL_SECONDS = 0.05
_SECONDS_TO_GO = 2.0  # for a process that has lost its connections to be gone
_PATIENCE = timedelta(hours=6)  # of ranks that wait while the first one reads and encodes
_TO_MEET = timedelta(minutes=2)
_INTERFACE = "GLOO_SOCKET_IFNAME"
_REACH = (
    f"Set {_INTERFACE} (or NCCL_SOCKET_IFNAME) on each machine to the network interface on which "
    "it reaches the others, and let its firewall pass their connections"
)


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
    else:
        _choose_interface()
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TO_MEET)
        group = dist.new_group(timeout=_PATIENCE)
    except RuntimeError as error:
        raise typer.Exit(
            fail(f"the processes do not reach each other: {error}. {_REACH}")
        ) from error
    if dist.get_rank() > 0:
        console.quiet = True
        logging.getLogger("stem").setLevel(logging.ERROR)
    processes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(processes, (socket.gethostname(), os.getpid()))
    try:
        yield group
    except KeyboardInterrupt as error:
        if error.args == ("SIGTERM",):  # as torchrun ends the others when one is gone
            _say_who_is_gone(processes, dist.get_rank(), 0)
        raise
    except RuntimeError as error:
        # Gloo's own are of no class of their own.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            _say_who_is_gone(processes, dist.get_rank(), _SECONDS_TO_GO)
        raise
    finally:
        dist.destroy_process_group()


def _choose_interface() -> None:
    """On one of several machines, let gloo take the interface on which rank 0's is reached.

    Gloo takes the one of the machine's own name, which many systems resolve to themselves. (NCCL
    looks for one that is no loopback.)

    Raises:
        typer.Exit: rank 0's machine is known by an address that only it can reach.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if here == os.environ["WORLD_SIZE"] or _INTERFACE in os.environ:
        return
    import psutil

    name = os.environ["MASTER_ADDR"]
    family, kind, _, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    found = {
        each.address.partition("%")[0]: interface
        for interface, addresses in psutil.net_if_addrs().items()
        for each in addresses
    }
    if ipaddress.ip_address(own).is_loopback:
        others = sorted({each for each in found.values() if each != found.get(own)})
        raise typer.Exit(
            fail(
                f"rank 0's machine is known as {name}, which is {address[0]} here, where other "
                f"machines do not reach it. {_REACH} (here: {', '.join(others) or 'none'})"
            )
        )
    if own in found:
        os.environ[_INTERFACE] = found[own]


def _say_who_is_gone(processes: list[tuple[str, int]], rank: int, patience: float) -> None:
    """End where another process on this machine is gone; one of those left says which.

    Args:
        processes: Names of the machines and ids of the processes, by rank.
        rank: Number of this one.
        patience: Seconds to wait for one that may be on its way out.

    Raises:
        typer.Exit: another one is gone.
    """
    # This process ends now; the signal by which torchrun ends it may come at any moment.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import psutil

    def is_gone(number: int) -> bool:
        try:
            return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    host = processes[rank][0]
    here = {each: number for each, (name, number) in enumerate(processes) if name == host}
    end = time.monotonic() + patience
    while True:
        gone = [each for each, number in here.items() if each != rank and is_gone(number)]
        if gone or time.monotonic() >= end:
            break
        time.sleep(_POLL_SECONDS)
    if not gone:
        return
    if rank != min(set(here) - set(gone)):
        raise typer.Exit(_LOST)
    named = ", ".join(f"{each} (process {here[each]})" for each in gone)
    message = f"rank {named} of {len(processes)} is gone, so the others end, too{KEPT}"
    raise typer.Exit(fail(message))


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
            "torchrun. Through UNets, analyse, compare, invert, reconstruct and edit take several, "
            "and evaluate does of two videos"
        )


def rank_device(device: str | None) -> str | None:
    """The device of this rank: the GPU of its number on this machine, where any GPU will do."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda"):
        return device
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else device
