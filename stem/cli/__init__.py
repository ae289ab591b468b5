"""The command line, `stem`; `stem --help` lists its commands."""

from . import commands, inversions
from .app import app, run

__all__ = ["app", "commands", "inversions", "run"]
