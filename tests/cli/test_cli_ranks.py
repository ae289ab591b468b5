"""Processes that torchrun starts: what is said where one of them is lost."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import FORKSERVER

from stem.cli import ranks as module
from stem.cli.app import KEPT, run

WORLD = 3


def meeting(device: Any) -> None:
    with module.ranks("cpu"):
        Path(f"ready-{os.environ['RANK']}").touch()
        while True:
            dist.all_reduce(torch.ones(1))


def be_a_rank(rank: int, port: int, root: str) -> None:
    os.chdir(root)
    os.dup2(os.open(f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    module_of_info = "stem_kernels.info.describe"  # what `stem info` calls first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_info, lambda: meeting(None))
        os._exit(run(["info"]) or 0)


@pytest.mark.parametrize("how", ["killed", "ended by torchrun"])
def test_a_rank_that_is_lost_is_named_once(tmp_path: Path, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        FORKSERVER.Process(target=be_a_rank, args=(rank, port, str(tmp_path)))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 120
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(WORLD)):
        assert time.monotonic() < end
        time.sleep(0.05)
    lost = processes[1].pid
    assert lost is not None
    os.kill(lost, signal.SIGKILL)
    if how == "ended by torchrun":
        processes[1].join()
        for process in (processes[0], processes[2]):
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    for process in processes:
        process.join(30)
    assert time.monotonic() - began < 30
    assert [process.exitcode for process in processes] == [2, -signal.SIGKILL, 2]
    said = [(tmp_path / f"errors-{rank}").read_text() for rank in (0, 2)]
    expected = f"error: rank 1 (process {lost}) of 3 is gone, so the others end, too{KEPT}\n"
    assert said == [expected, ""]
