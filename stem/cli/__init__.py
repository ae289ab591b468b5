"""The command line, `stem`; `stem --help` lists its commands."""

from . import commands, edits, evaluate, inversions, report
from .app import app, run

__all__ = ["app", "commands", "edits", "evaluate", "inversions", "report", "run"]
