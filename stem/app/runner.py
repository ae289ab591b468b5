"""What runs jobs: for each device one thread, and of each job one process of the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from ..progress import TOLD_FILE
from .jobs import CANCELLED, DONE, FAILED, RUNNING, Job, Jobs

logger = logging.getLogger("stem")

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0  # from the request to end until a process is killed
_RETRY_SECONDS = 10.0  # until a job is taken again that could not be, as where the disk is full
_PLAIN = {"TYPER_USE_RICH": "0"}  # the environment in which an error is one line without a frame


class Runner:
    """Runs the jobs of a folder, at any time one on each device.

    Args:
        jobs: Jobs to run.
        devices: Names of the devices, as --device takes them; "": the command's own default.
        command: Program and its first arguments, before those of a job.
    """

    def __init__(
        self,
        jobs: Jobs,
        devices: Sequence[str] = ("",),
        command: Sequence[str] = (sys.executable, "-m", "stem"),
    ) -> None:
        self._jobs, self._devices, self._command = jobs, tuple(devices), tuple(command)
        self._stopped = threading.Event()
        # Here, not in the threads: of jobs that a killed server left, each is taken once.
        self._left = {job.number for job in jobs.all() if job.state == RUNNING}
        self._threads = [
            threading.Thread(target=self._work, args=(device,), daemon=True, name=f"jobs {device}")
            for device in self._devices
        ]

    def start(self) -> None:
        """Begin; jobs that a killed server left running come first."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the processes; their jobs stay "running" on disk, and the next server's first."""
        self._stopped.set()
        self._jobs.wake()
        for thread in self._threads:
            thread.join(2 * _GRACE_SECONDS)

    def _work(self, device: str) -> None:
        while True:
            try:
                job = self._jobs.take(
                    lambda job: self._may(job, device), device, self._stopped.is_set
                )
            except StopIteration:
                return
            except OSError as error:
                logger.error("no job can begin: %s", error)
                self._stopped.wait(_RETRY_SECONDS)
                continue
            self._left.discard(job.number)
            try:
                self._run(job)
            except OSError as error:  # the disk is full, or gone: the next job may be luckier
                logger.error("job %s: %s", job.number, error)
                with contextlib.suppress(OSError):
                    self._end(job, FAILED)

    def _may(self, job: Job, device: str) -> bool:
        """Whether a job may run on a device: its own, unless that is served no longer."""
        if job.state == RUNNING and job.number not in self._left:
            return False
        return job.device is None or job.device == device or job.device not in self._devices

    def _run(self, job: Job) -> None:
        if job.process is not None:
            self._wait(job.number, _Left(*job.process))
        for command in job.commands:
            if self._jobs.get(job.number).state != RUNNING or self._stopped.is_set():
                break
            status = self._call(job, command)
            if status is None:
                break
            if status != 0:
                self._end(job, FAILED)
                return
        else:
            self._end(job, DONE)

    def _end(self, job: Job, state: str) -> None:
        if self._jobs.get(job.number).state == RUNNING:
            self._jobs.change(job.number, state=state, ended=time.time())

    def _call(self, job: Job, command: tuple[str, ...]) -> int | None:
        """The exit status of one command; None where it was ended from here."""
        given = [*self._command, *command]
        if job.device and command[0] != "report":
            given.append(f"--device={job.device}")
        told = {TOLD_FILE: str(job.progress), "PYTHONUNBUFFERED": "1"}
        with job.log.open("ab") as log:
            # A session of its own: an interruption of the server from a terminal is not its.
            process = subprocess.Popen(
                given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_PLAIN, **told},
                start_new_session=True,
            )
        started = psutil.Process(process.pid).create_time()
        with contextlib.suppress(OSError):  # memory knows it: what runs is waited for in any case
            self._jobs.change(job.number, process=(process.pid, started))
        status = self._wait(job.number, process)
        if status is not None and status < 0:
            with job.log.open("ab") as log:
                log.write(f"\n{_of_signal(-status)}\n".encode())
        return status

    def _wait(self, number: str, process: subprocess.Popen[bytes] | _Left) -> int | None:
        ended_at = None
        while process.poll() is None:
            job = self._jobs.get(number)
            if job.state != CANCELLED and not self._stopped.is_set():
                time.sleep(_POLL_SECONDS)
                continue
            now = time.monotonic()
            if ended_at is None:
                # Not SIGINT, which a server in the background of a shell script ignores, and its
                # children with it. Every file of a command is whole or absent at any time.
                ended_at = now
                process.send_signal(signal.SIGTERM)
            elif now - ended_at > _GRACE_SECONDS:
                process.send_signal(signal.SIGKILL)
            time.sleep(_POLL_SECONDS / 4)
        self._jobs.change(number, process=None)
        return None if ended_at is not None else process.returncode


def _of_signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # of those without a name of their own
        name = f"signal {number}"
    return f"ended by {name}{', as where memory runs out' if name == 'SIGKILL' else ''}"


class _Left:
    """A process that a killed server left behind.

    Args:
        process: Its id.
        started: Time of its start, for ids are used again.
    """

    def __init__(self, process: int, started: float) -> None:
        self.returncode = 0  # it is not ours to ask, and its command is run again
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process)
            if abs(found.create_time() - started) < 1:
                self._process = found

    def poll(self) -> int | None:
        """None while it runs."""
        if self._process is None:
            return self.returncode
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
                return None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process is not None:
                self._process.send_signal(number)


def run_now(arguments: Sequence[str]) -> str:
    """Run one short command of the command line now; what it says of a failure, "" without one.

    Args:
        arguments: Arguments of `stem`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "stem", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **_PLAIN},
    )
    if done.returncode == 0:
        return ""
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
