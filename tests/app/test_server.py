"""The server: soon there, for those alone who may come in, with files below --out and no others."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import run

from stem.app.server import Address, serving

pytest.importorskip("gradio", reason="the extra `app` is not installed")

MOST_SECONDS = 3.0  # beyond `import torch`
IMPORT = "import sys, torch; print('here', flush=True); sys.stdin.read()"


def processor_seconds(command: list[str]) -> tuple[float, str]:
    """Seconds of the processor until a process prints its first line, and asks for a page it names.

    Not those of a clock: other tests run beside this one.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()[0]
        if said.startswith("http"):
            assert status(said) == 200
        times = psutil.Process(process.pid).cpu_times()
        process.terminate()
    return times.user + times.system, said


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "http" not in policy  # no other machine is named in it
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_is_there_soon(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stem", "app", f"--out={tmp_path}", "--port=0"]
    ours, url = processor_seconds(command)
    torch, _ = processor_seconds([sys.executable, "-c", IMPORT])
    assert url.startswith("http://127.0.0.1:")
    assert ours <= torch + MOST_SECONDS


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(out: Path) -> Iterator[str]:
    with serving(out, Address(port=0), models=["embedded"]) as url:
        yield url


def test_files_below_the_folder_are_served_and_no_others(out: Path, url: str) -> None:
    (out / "fusion-a").mkdir()
    (out / "fusion-a" / "edit.json").write_text("{}")
    (out / "app" / "jobs" / "000001").mkdir()
    (out / "app" / "jobs" / "000001" / "log").write_text("a path")
    beside = out.parent / "secret.txt"
    beside.write_text("secret")
    expected = {
        f"file={out}/fusion-a/edit.json": 200,
        f"file={out}/app/jobs/000001/log": 403,
        f"file={beside}": 403,
        f"file={out}/../secret.txt": 403,
        "file=/etc/passwd": 403,
        "file=https://example.com/": 403,
        "file=https%3A//example.com/": 403,
    }
    assert {path: status(f"{url}/gradio_api/{path}") for path in expected} == expected


def test_another_name_of_this_machine_is_not_answered(url: str) -> None:
    port = url.rpartition(":")[2]
    assert status(url, Host=f"localhost:{port}") == 200
    assert status(url, Host=f"page.example:{port}") == 400
    assert status(url, Host="page.example") == 400
    assert status(url, Host="") == 400
    # A port is left out where it is 80, or where a proxy stands before the page.
    for name in ("127.0.0.1", "LOCALHOST", "[::1]", f"[::1]:{port}"):
        assert status(url, Host=name) == 200
    assert status(url, Host="[::1].page.example") == 400


def test_every_loopback_address_is_served_by_its_own_name(tmp_path: Path) -> None:
    with serving(tmp_path, Address("127.0.0.2", port=0), models=["embedded"]) as url:
        assert url.startswith("http://127.0.0.2:")
        assert status(url) == 200
        assert status(url, Host="page.example") == 400


def test_a_second_server_of_one_folder_is_refused(
    out: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("app", f"--out={out}", "--port=0") == 2
    assert f"another `stem app` works in {out}" in capsys.readouterr().err
    port = url.rpartition(":")[2]
    assert run("app", f"--out={out}/other", f"--port={port}") == 2
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


def test_who_gives_no_password_sees_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    address = Address(port=0, auth=("me", "word"))
    with serving(tmp_path, address, models=["embedded"]) as url:
        assert status(f"{url}/gradio_api/file={tmp_path}/a.txt") == 401
        assert status(f"{url}/config") == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        opener.open(f"{url}/login", b"username=me&password=word").read()
        # A proxy with TLS keeps the name that it is reached by.
        there = urllib.request.Request(
            f"{url}/gradio_api/file={tmp_path}/a.txt", headers={"Host": "page.example"}
        )
        found = opener.open(there).read()
        assert found == b"a"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            opener.open(f"{url}/login", b"username=me&password=other")
