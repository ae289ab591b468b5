"""Processes of tests that share a run over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

GLOO = "[Gloo]"  # torch 2.10 prints its connections
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["inversions", "stem.editing"]
)  # all ranks share one import of torch


def be_a_rank(
    module: str, body: str, root: Path, world: int, rank: int, told: str, errors: str
) -> None:
    """What a process of its own does: `body` in a module, in a group of `world`."""
    for name, number in ((told, 1), (errors, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(root / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    try:
        exec(body, {**vars(import_module(module)), "dist": dist, "root": root, "rank": rank})
    finally:
        dist.destroy_process_group()


class Rank:
    """A process that runs `be_a_rank`."""

    def __init__(self, module: str, body: str, root: Path, world: int, rank: int) -> None:
        self.told, self.errors = root / f"told-{rank}", root / f"errors-{rank}"
        self.process = FORKSERVER.Process(
            target=be_a_rank,
            args=(module, body, root, world, rank, str(self.told), str(self.errors)),
        )
        self.process.start()

    def lines(self) -> list[str]:
        """What it has printed so far."""
        told = self.told.read_text() if self.told.exists() else ""
        return [line for line in told.splitlines() if not line.startswith(GLOO)]

    def wait_for(self, lines: list[str]) -> None:
        """Until it has printed these lines."""
        end = time.monotonic() + 240
        while len(self.lines()) < len(lines):
            assert self.process.is_alive(), self.errors.read_text()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.01)
        assert self.lines()[: len(lines)] == lines

    def ended(self) -> int:
        """Its exit status."""
        self.process.join(240)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """This process computes with one thread, as ranks do, so that its sums have their bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start(module: str, root: Path, world: int, body: str) -> list[Rank]:
    """Processes that run `body` in a module of tests, with `root` and their `rank`."""
    # The server that processes are forked from takes its path from here alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        return [Rank(module, body, root, world, rank) for rank in range(world)]
