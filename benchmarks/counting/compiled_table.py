"""A table of what every Triton kernel takes of some GPUs, none of which need be here.

What the launchers launch (`launches`) in every form of the suite (`forms`) is compiled and
measured. What the file already holds of the same sources, arguments and compilers is not compiled
again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from .. import records
from .forms import forms
from .launches import Launch, launches

WITHOUT_PRODUCTS = ("directions", "update", "merge", "nearest_merge", "moments_sum", "means")
"""Kernels that multiply no matrices, and are compiled for the first dtype alone."""


class Row(Protocol):
    """One compiled kernel, a dataclass whose fields JSON can hold."""

    def faults(self) -> list[str]:
        """What is wrong with it; none where it is within its means."""


AnyRow = TypeVar("AnyRow", bound=Row)
Wanted = tuple[str, Launch, str, str]


@dataclass(frozen=True)
class CompiledTable(Generic[AnyRow]):
    """One file of `benchmarks/results` and how it comes about.

    Args:
        out: Path of the JSON file; the Markdown lies beside it.
        row: Dataclass of a kernel.
        measure: Function that compiles a launch of a form and dtype.
        version: Function that names the compilers.
        text: Function that makes the Markdown of rows by digest.
        archs: Architectures.
        dtypes: Types of the features, queries and keys.
    """

    out: Path
    row: Callable[..., AnyRow]
    measure: Callable[[Launch, str, str], AnyRow]
    version: Callable[[], str]
    text: Callable[[Mapping[str, AnyRow]], str]
    archs: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...]

    def wanted(self) -> Iterator[Wanted]:
        """Every different launch of all forms: digest, launch, form and dtype."""
        seen = set()
        for arch in self.archs:
            for dtype in self.dtypes:
                for form in forms(dtype):
                    for launch in launches(arch, form.call):
                        if launch.name in WITHOUT_PRODUCTS and dtype != self.dtypes[0]:
                            continue
                        digest = launch.digest()
                        if digest not in seen:
                            seen.add(digest)
                            yield digest, launch, form.name, form.dtype_name

    def committed(self) -> dict[str, AnyRow]:
        """The file's kernels by digest; none where it is of other compilers."""
        results = records.read(self.out) if self.out.is_file() else {}
        if results.get("triton") != self.version():
            return {}
        return {digest: self.row(**row) for digest, row in results["kernels"].items()}

    def write(self, found: Mapping[str, AnyRow]) -> None:
        """Write both files."""
        rows: dict[str, Any] = {digest: asdict(each) for digest, each in found.items()}  # type: ignore[call-overload]
        records.write({"triton": self.version(), "kernels": rows}, self.out)
        self.out.with_suffix(".md").write_text(self.text(found))

    def update(self, wanted: Iterable[Wanted] | None = None) -> None:
        """Compile what is new, and write the files; where this is interrupted, what it has so far.

        Args:
            wanted: Launches; all that `wanted` gives if None.

        Raises:
            SystemExit: A kernel is not within its means.
        """
        known = self.committed()
        found: dict[str, AnyRow] = {}
        try:
            for digest, launch, form, dtype in self.wanted() if wanted is None else wanted:
                new = digest not in known
                found[digest] = self.measure(launch, form, dtype) if new else known[digest]
                if new:
                    print(found[digest], *found[digest].faults(), flush=True)
        except BaseException:
            self.write(known | found)
            raise
        self.write(found)
        faults = [f"{row}: {'; '.join(row.faults())}" for row in found.values() if row.faults()]
        if faults:
            sys.exit("\n".join([f"{len(faults)} kernels are not within their means:", *faults]))
