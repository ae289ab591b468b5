"""The command line, `stem`; `stem --help` lists its commands."""

from . import commands, edits, inversions
from .app import app, run

__all__ = ["app", "commands", "edits", "inversions", "run"]
