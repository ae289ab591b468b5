"""Processes that torchrun starts: what is said where one of them is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import typer
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


TOLD = """
import torch
import torch.distributed as dist
from stem.cli.ranks import ranks
with ranks("cpu") as group:
    found = [torch.zeros(1), torch.zeros(1)]
    dist.all_gather(found, torch.full((1,), dist.get_rank() + 5.0), group=group)
    print([float(each) for each in found])
"""


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces that reach each other as 10.77.0.1 and 10.77.0.2."""
    names = [f"stem-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no `ip` (Debian's iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [f"v{os.getpid()}{letter}" for letter in "ab"]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            for link in ("lo", end):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_ranks_of_two_machines_reach_each_other(machines: list[str]) -> None:
    """Though each machine's own name is a loopback address to itself, as on many systems."""
    environment = {key: value for key, value in os.environ.items() if "SOCKET_IFNAME" not in key}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", TOLD],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    for process in processes:
        told, errors = process.communicate(timeout=120)
        assert told.splitlines()[-1:] == ["[5.0, 6.0]"], errors[-2000:]


def test_the_interface_is_that_of_the_way_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    addresses = {"lo": "127.0.0.1", "eth7": "10.77.0.1"}
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {name: [SimpleNamespace(address=each)] for name, each in addresses.items()},
    )
    for here in ("4", None):
        if here is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE")
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        module._choose_interface()
        assert "GLOO_SOCKET_IFNAME" not in os.environ  # of one machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(typer.Exit):
        module._choose_interface()
    said = " ".join(capsys.readouterr().err.split())
    assert "rank 0's machine is known as 127.0.0.1, which is 127.0.0.1 here" in said
    assert "Set GLOO_SOCKET_IFNAME" in said
    assert "(here: eth7)" in said


def test_processes_that_do_not_meet_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise dist.DistError("Gloo connectFullMesh failed")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(typer.Exit), module.ranks("cpu"):
        pass
    said = " ".join(capsys.readouterr().err.split())
    assert "the processes do not reach each other: Gloo connectFullMesh failed. Set GLOO" in said
