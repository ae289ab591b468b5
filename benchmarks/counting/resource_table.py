"""What a compiled kernel takes of a GPU, and the table of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """One compiled kernel; `arch` is such as "sm_90"."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int


def text(heading: str, found: Sequence[Resources]) -> str:
    """The table in Markdown, below a line that says where it comes from."""
    lines = [
        heading,
        "",
        "| kernel | architecture | registers | spilled bytes | shared KiB | matrix instructions |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, found)]) + "\n"


def line(row: Resources) -> str:
    """The line of one kernel."""
    return (
        f"| {row.kernel} | {row.arch} | {row.registers} | {row.spilled_bytes} "
        f"| {row.shared_bytes / 1024:.0f} | {row.matrix_instructions} |"
    )
