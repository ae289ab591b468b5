"""The command line, `stem`; `stem --help` lists its commands."""

from . import ablate, analyse, commands, edits, evaluate, inversions, page, report
from .app import app, run

__all__ = [
    "ablate",
    "analyse",
    "app",
    "commands",
    "edits",
    "evaluate",
    "inversions",
    "page",
    "report",
    "run",
]
