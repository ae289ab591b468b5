"""Jobs: one at a time on a device, on disk at any moment, run again after a server's death."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stem.app import jobs as jobs_of_page
from stem.app import runner as running
from stem.app.jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, InUseError, Job, Jobs, Step
from stem.app.runner import Runner, run_now

# In place of `python -m stem`: says what it is called with, then what its first argument says.
COMMAND = """
import os, pathlib, sys, time
what, *rest = sys.argv[1:]
folder = pathlib.Path.cwd()
print(*rest, flush=True)
if what == "wait":
    with open(os.environ["STEM_PROGRESS"], "a") as file:
        file.write('{"name": "a", "before": 1, "done": 2, "total": 5, "seconds": 3.0}\\n{"nam')
    time.sleep(600)
if what == "fail":
    sys.exit("error: it cannot be")
if what == "die":
    print("half a line", end="", flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path / "jobs")
    yield found
    found.close()


@pytest.fixture
def start(jobs: Jobs) -> Iterator[Callable[..., Runner]]:
    """A function that starts a runner, which is stopped at the end."""
    runners = []

    def start(*devices: str) -> Runner:
        runner = Runner(jobs, devices or ("",), (sys.executable, "-c", COMMAND))
        runners.append(runner)
        runner.start()
        return runner

    yield start
    for runner in runners:
        runner.stop()


def wait(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def states(jobs: Jobs) -> list[str]:
    return [job.state for job in jobs.all()]


def test_jobs_run_in_order_one_at_a_time_and_say_how_they_ended(
    jobs: Jobs, start: Callable[..., Runner]
) -> None:
    first = jobs.add("first", [("say", "one"), ("say", "two")])
    jobs.add("second", [("fail",), ("say", "never")])
    jobs.add("third", [("wait",)])
    jobs.add("fourth", [("say",)])
    start("cpu")
    wait(lambda: states(jobs) == [DONE, FAILED, RUNNING, WAITING])
    third = jobs.all()[2]
    wait(lambda: third.step() is not None)
    assert jobs.get(first.number).printed() == ["one --device=cpu", "two --device=cpu"]
    assert jobs.all()[1].last_line() == "error: it cannot be"
    assert third.step() == Step("a", 1, 2, 5, 3.0)  # the half line after it is left out
    assert third.step().seconds_left == 9.0  # type: ignore[union-attr]
    jobs.cancel(third.number)
    wait(lambda: states(jobs) == [DONE, FAILED, CANCELLED, DONE])
    assert jobs.get(third.number).process is None
    assert [Job.read(job.folder) for job in jobs.all()] == jobs.all()


def test_devices_take_jobs_of_their_own(jobs: Jobs, start: Callable[..., Runner]) -> None:
    for _ in range(3):
        jobs.add("waits", [("wait",)])
    start("cuda:0", "cuda:1")
    wait(lambda: states(jobs) == [RUNNING, RUNNING, WAITING])
    assert {job.device for job in jobs.all()} == {"cuda:0", "cuda:1", None}


def test_what_a_stopped_server_left_running_is_run_first_and_on_its_device(
    tmp_path: Path, jobs: Jobs, start: Callable[..., Runner]
) -> None:
    running = jobs.add("long", [("wait", "a")])
    runner = start("cpu")
    wait(lambda: jobs.get(running.number).step() is not None)
    jobs.add("behind", [("wait",)])
    runner.stop()
    assert states(jobs) == [RUNNING, WAITING]
    with pytest.raises(InUseError, match="another `stem app` works in"):
        Jobs(tmp_path / "jobs")
    jobs.close()
    again = Jobs(tmp_path / "jobs")
    assert again.all() == jobs.all()
    second = Runner(again, ("other", "cpu"), (sys.executable, "-c", COMMAND))
    second.start()
    wait(lambda: again.get(running.number).printed() == ["a --device=cpu"] * 2)
    wait(lambda: states(again) == [RUNNING, RUNNING])
    assert [job.device for job in again.all()] == ["cpu", "other"]
    second.stop()
    again.close()


def test_a_process_that_outlived_its_server_is_waited_for(
    jobs: Jobs, start: Callable[..., Runner]
) -> None:
    """Two processes at once would write the same files."""
    import psutil

    left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = (left.pid, psutil.Process(left.pid).create_time())
    job = jobs.add("left", [("say", "again")])
    jobs.change(job.number, state=RUNNING, device="cpu", process=process)
    start("cpu")
    time.sleep(0.5)
    assert jobs.get(job.number).printed() == []
    left.communicate(b"\n")
    wait(lambda: states(jobs) == [DONE])
    assert jobs.get(job.number).printed() == ["again --device=cpu"]


def test_a_process_of_another_that_got_its_number_is_left_alone(
    jobs: Jobs, start: Callable[..., Runner]
) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = jobs.add("left", [("wait",)])
    jobs.change(job.number, state=RUNNING, device="cpu", process=(other.pid, 1.0))
    start("cpu")
    wait(lambda: jobs.get(job.number).step() is not None)
    jobs.cancel(job.number)
    wait(lambda: jobs.get(job.number).process is None)
    assert other.poll() is None
    other.communicate(b"\n")


def test_one_that_was_cancelled_goes_on_and_one_that_is_done_does_not(
    jobs: Jobs, start: Callable[..., Runner]
) -> None:
    waits, says = jobs.add("waits", [("wait",)]), jobs.add("says", [("say",)])
    jobs.cancel(waits.number)
    start("cpu")
    wait(lambda: states(jobs) == [CANCELLED, DONE])
    assert jobs.again(says.number).state == DONE
    assert jobs.again(waits.number).state == WAITING
    wait(lambda: states(jobs) == [RUNNING, DONE])


def test_a_damaged_job_is_left_out_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    first = jobs.add("first", [("say",)])
    (first.folder / "job.json").write_text(json.dumps({"title": 3}))
    jobs.close()
    again = Jobs(tmp_path)
    assert again.all() == []
    assert again.add("second", [("say",)]).number == "000002"
    again.close()


def test_a_full_disk_lets_jobs_wait_and_ends_no_device(
    jobs: Jobs, start: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fail(path: Path, data: bytes) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(running, "_RETRY_SECONDS", 0.5)
    job = jobs.add("waits", [("say",)])
    with monkeypatch.context() as patch:
        patch.setattr(jobs_of_page, "write_atomically", fail)
        start("cpu")
        wait(lambda: len(tries) == 1)
        time.sleep(0.2)
        assert len(tries) == 1  # it does not spin
        assert jobs.get(job.number) == job
    wait(lambda: states(jobs) == [DONE])


def test_a_process_is_waited_for_though_the_disk_is_full(
    jobs: Jobs, start: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = jobs_of_page.write_atomically

    def fail(path: Path, data: bytes) -> None:
        if json.loads(data)["process"] is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(jobs_of_page, "write_atomically", fail)
    job = jobs.add("says", [("say", "it")])
    start("cpu")
    wait(lambda: states(jobs) == [DONE])
    assert job.printed() == ["it --device=cpu"]


def test_a_process_that_was_killed_says_so_last(jobs: Jobs, start: Callable[..., Runner]) -> None:
    job = jobs.add("dies", [("die",)])
    start("cpu")
    wait(lambda: states(jobs) == [FAILED])
    said = "ended by SIGKILL, as where memory runs out"
    assert job.last_line() == said
    assert job.printed() == ["--device=cpu", "half a line", said]


def test_what_a_command_refuses_is_its_last_line(jobs: Jobs) -> None:
    job = jobs.add("refused", [("edit", "a.mp4")])
    runner = Runner(jobs, ("cpu",))
    runner.start()
    wait(lambda: states(jobs) == [FAILED])
    runner.stop()
    assert job.last_line().endswith("Missing option '--prompt'.")
    assert run_now(["edit", "a.mp4"]).endswith("Missing option '--prompt'.")


def test_a_frame_around_an_error_is_left_out(jobs: Jobs) -> None:
    job = jobs.add("refused", [])
    job.log.write_text("╭─ Error ──╮\n│ It is no │\n│ preset.  │\n╰──────────╯\n\n")
    assert job.last_line() == "preset."
