"""The GPU suite's results.json: on disk after every contender, and gone on with by later calls."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import records
from ..cases.bench import FAILED, SKIPPED, Row

ROOT = records.RESULTS.parent.parent
CODE = (
    "stem_kernels/**/*.py",
    "stem_kernels/configs/*.json",
    "stem/**/*.py",
    "benchmarks/**/*.py",
    "csrc/**/*.*",
)
ABSENT = "not installed"


class SuiteFile:
    """Rows of several calls, perhaps on several machines of one kind.

    Args:
        path: Path of results.json; what it holds is gone on with.
        device: Device that is measured.
        dtype: Type that the machine's ceilings are measured in, where the file is new.
        small: Whether the sizes are toys.

    Raises:
        SystemExit: the file is of another device, size, code or version; the message says which.

    Attributes:
        results: All that is written: the origin, the ceilings, the rows, `seconds` by part,
            `calls` with the machines that they ran on, and `running`: the row whose contender is
            being examined and the time when that began, or None.
    """

    def __init__(
        self, path: Path, device: torch.device, dtype: torch.dtype, *, small: bool
    ) -> None:
        self._path = path
        now = origin(device, small=small)
        if path.is_file():
            self.results = records.read(path)
            require_alike(self.results, now, path)
            versions = self.results["provenance"]["versions"]
            found = now["provenance"]["versions"]
            versions.update({name: each for name, each in found.items() if each != ABSENT})
        else:
            fresh = records.fresh(device, dtype, small=small)
            rows = fresh.pop("rows")
            self.results = {
                **now,
                "ceilings": fresh["ceilings"],
                "seconds": {},
                "calls": [],
                "running": None,
                "rows": rows,
            }
        self._provenance = now["provenance"]

    def begin_call(self, parts: Sequence[str], died: str) -> None:
        """Note what is about to be measured.

        Args:
            parts: Names of the parts of this call; their time starts anew, and what failed in them
                in an earlier call is measured again.
            died: Reason why this call's process before this one ended; the contender that it was
                at has failed. "" in a call's first process.
        """
        running = self.results["running"]
        if died and running is not None:
            row = Row(**{**running["row"], "outcome": FAILED, "note": died})
            self.add(row, self._seconds(row.part) + time.time() - running["since"])
        self.results["running"] = None
        if not died:
            for part in parts:
                self.results["seconds"].pop(part, None)
            # Rows that failed are tried again, but by no process that goes on for this call's.
            self.results["rows"] = [
                row
                for row in self.results["rows"]
                if row["part"] not in parts or row["outcome"] != FAILED
            ]
            machine = {name: self._provenance[name] for name in ("cpu", "threads", "commit")}
            self.results["calls"].append({"parts": list(parts), **machine})
        self.write()

    def begin_part(self, part: str) -> float:
        """Drop the rows of a part that stand for what was not tried; seconds spent on it so far."""
        self.results["rows"] = [
            row
            for row in self.results["rows"]
            if row["part"] != part or (row["outcome"] != SKIPPED and row["case"])
        ]
        return self._seconds(part)

    def holds(self, row: Row) -> bool:
        """Whether there is a row of the same contender."""
        return any(_identity(each) == _identity(vars(row)) for each in self.results["rows"])

    def begin(self, row: Row) -> None:
        """Note that a contender is being examined, should the process end there."""
        self.results["running"] = {"row": dataclasses.asdict(row), "since": time.time()}
        self.write()

    def add(self, row: Row, seconds: float) -> None:
        """Put a row beside the others, and the seconds spent on its part so far."""
        self.results["rows"].append(dataclasses.asdict(row))
        self.results["running"] = None
        self.results["seconds"][row.part] = round(seconds, 1)
        self.write()

    def _seconds(self, part: str) -> float:
        return self.results["seconds"].get(part, 0.0)

    def write(self) -> None:
        """Write all of it."""
        records.write(self.results, self._path)


def origin(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Device, size, versions, and a hash of the code: some machines get a tree without git."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {**records.origin(device, small=small), "code": digest.hexdigest()[:12]}


def require_alike(earlier: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Check that earlier rows may stand beside new ones.

    A package that one of the two lacks makes no difference: rows that need it could not be there.
    Nor does a GPU's host, whose name is kept for each call.

    Raises:
        SystemExit: something differs; the message says what.
    """
    one, other = _told(earlier), _told(now)
    differing = [
        f"{name} {one[name]}, now {found}"
        for name, found in other.items()
        if name in one and one[name] != found and ABSENT not in (one[name], found)
    ]
    if differing:
        raise SystemExit(f"{path} differs in {'; '.join(differing)}; move it away to start afresh")


def _told(results: Mapping[str, Any]) -> dict[str, Any]:
    where = results["provenance"]
    told = {"device": results["device"], "small": results["small"], "code": results["code"]}
    if results["device"] == "cpu":
        told |= {"cpu": where["cpu"], "threads": where["threads"]}
    return {**told, "python": where["python"], **where["versions"]}


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("part", "case", "shape", "dtype", "contender"))
