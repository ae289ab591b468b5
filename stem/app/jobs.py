"""Jobs on disk: command lines that wait, run or have ended, a folder each.

    jobs/000001/
        job.json    what runs, and how far it is; replaced as a whole
        log         what its commands printed
        progress    a line of JSON for each of their steps, see `stem.progress`

A server that is killed leaves a job in the state "running". The next one runs its commands again:
they go on after their last finished step, and their files are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..storage import write_atomically

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
_LAST_BYTES = 4096  # of a log or of its progress
_BORDER = "╭─╮│╰╯ \t"  # of the frame around an error, of a Typer that draws it anyway


class InUseError(OSError):
    """A folder that another server works in."""


@dataclass(frozen=True)
class Step:
    """How far the part of a job that runs now has come.

    Args:
        name: Name of the part, such as "invert stem".
        before: Number of its steps that an earlier run had done.
        done: Number of its steps that are done.
        total: Number of its steps.
        seconds: Seconds that `done - before` steps took.
    """

    name: str
    before: int
    done: int
    total: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """Seconds that its other steps will take; None before the first one is timed."""
        if self.done == self.before:
            return None
        return self.seconds / (self.done - self.before) * (self.total - self.done)


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        folder: Folder of its files; its name is the job's number.
        title: Title for people.
        commands: Arguments of `stem`, command after command.
        asked: What was asked for, as JSON types.
        state: WAITING, RUNNING or one of ENDED.
        device: Device that it was first run on, "" for the default; None before.
        process: Id of the process of the command that runs, and the time of its start.
        created: Seconds since the epoch when it was asked for.
        started: Likewise, when it last began to run; None before.
        ended: Likewise, when it ended; None before.
    """

    folder: Path
    title: str
    commands: tuple[tuple[str, ...], ...]
    asked: Mapping[str, Any] = field(default_factory=dict)
    state: str = WAITING
    device: str | None = None
    process: tuple[int, float] | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None

    @property
    def number(self) -> str:
        """Number of the job, which names it."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Path of what its commands printed."""
        return self.folder / "log"

    @property
    def progress(self) -> Path:
        """Path of the steps told."""
        return self.folder / "progress"

    def step(self) -> Step | None:
        """The last step told; None where there is none."""
        for line in reversed(_last(self.progress).split("\n")[:-1]):  # the last may be half written
            with contextlib.suppress(ValueError, TypeError):
                return Step(**json.loads(line))
        return None

    def timed(self) -> list[Step]:
        """The last step told of each part that ran."""
        found: dict[tuple[str, int], Step] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.progress.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    step = Step(**json.loads(line))
                    found[step.name, step.before] = step
        return list(found.values())

    def last_line(self) -> str:
        """The last line of the log that has a text, without a frame's border; "" without one."""
        lines = (line.strip(_BORDER) for line in reversed(_last(self.log).splitlines()))
        return next(filter(None, lines), "")

    def printed(self) -> list[str]:
        """The lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return []

    def write(self) -> None:
        """Keep it on disk, whole or not at all."""
        document = dataclasses.asdict(self)
        del document["folder"]
        write_atomically(self.folder / "job.json", json.dumps(document, indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job of a folder.

        Raises:
            OSError, ValueError, KeyError, TypeError: it holds none, or a damaged one.
        """
        document = json.loads((folder / "job.json").read_bytes())
        document["commands"] = tuple(tuple(command) for command in document["commands"])
        process = document["process"]
        document["process"] = None if process is None else (int(process[0]), float(process[1]))
        return cls(folder, **document)


def _last(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


class Jobs:
    """All jobs of a folder, which one process at a time works in; any of its threads may call.

    Args:
        root: Folder of the jobs; it is made.

    Raises:
        InUseError: another process works in it.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._held = _hold(root / "lock")
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        for file in sorted(root.glob("*/job.json")):
            # A damaged file is of no use to anybody, and must not keep the page from starting.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._jobs[file.parent.name] = Job.read(file.parent)

    def all(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def get(self, number: str) -> Job:
        """The job of a number.

        Raises:
            KeyError: there is none.
        """
        with self._changed:
            return self._jobs[number]

    def add(
        self, title: str, commands: Sequence[Sequence[str]], asked: Mapping[str, Any] | None = None
    ) -> Job:
        """Put a job behind those that wait.

        Args:
            title: Title for people.
            commands: Arguments of `stem`, command after command.
            asked: What was asked for, as JSON types.
        """
        with self._changed:
            taken = [int(path.name) for path in self._root.glob("[0-9]*") if path.name.isdecimal()]
            folder = self._root / f"{max(taken, default=0) + 1:06}"
            folder.mkdir()
            given = tuple(tuple(command) for command in commands)
            job = Job(folder, title, given, asked or {}, created=time.time())
            return self._put(job)

    def change(self, number: str, **fields: Any) -> Job:
        """Give a job's fields other values; the job after that."""
        with self._changed:
            return self._put(dataclasses.replace(self._jobs[number], **fields))

    def cancel(self, number: str) -> Job:
        """Cancel a job that waits or runs; one that has ended stays as it is."""
        with self._changed:
            job = self._jobs[number]
            if job.state in ENDED:
                return job
            return self._put(dataclasses.replace(job, state=CANCELLED, ended=time.time()))

    def again(self, number: str) -> Job:
        """Let a job that failed or was cancelled wait once more; it goes on where it stopped."""
        with self._changed:
            job = self._jobs[number]
            if job.state not in (FAILED, CANCELLED) or job.process is not None:
                return job
            return self._put(dataclasses.replace(job, state=WAITING, ended=None))

    def take(self, may: Callable[[Job], bool], device: str, stopped: Callable[[], bool]) -> Job:
        """The next job for a device, marked as running; waits for one.

        A job that was running when its server was killed comes before those that wait.

        Args:
            may: Whether a job may run there.
            device: Name of the device.
            stopped: Whether to give up.

        Raises:
            StopIteration: `stopped()` became true.
            OSError: it cannot be written that the job runs; the job is as before.
        """
        with self._changed:
            while not stopped():
                for state in (RUNNING, WAITING):
                    for job in self._jobs.values():
                        if job.state == state and may(job):
                            return self._taken(job, device)
                self._changed.wait()
        raise StopIteration

    def _taken(self, job: Job, device: str) -> Job:
        now = time.time()
        taken = dataclasses.replace(job, state=RUNNING, device=device, started=now, ended=None)
        try:
            return self._put(taken)
        except OSError:
            self._jobs[job.number] = job  # nobody runs it
            raise

    def wake(self) -> None:
        """Let all who wait in `take` look again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let another process work in the folder."""
        self._held.close()

    def _put(self, job: Job) -> Job:
        self._jobs[job.number] = job  # first: where the disk is full, the page still says so
        self._changed.notify_all()
        job.write()
        return job


def _hold(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InUseError(
            error.errno,
            f"another `stem app` works in {path.parent.parent}; stop it, or name another folder "
            "with --out",
        ) from error
    return file
