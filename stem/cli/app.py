"""The command line's frame: its group of commands, its two consoles, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__

RESUMABLE = ("ablate", "compare", "demo", "edit", "invert", "reconstruct")
KEPT = "; finished steps are kept: run the same command again and it goes on after the last of them"
INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
_ENDING: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
"""Signals that end a command, and what handles them where nobody has changed that."""

console = Console()
problems = Console(stderr=True)


def say(text: object) -> None:
    """Print a line as it is: unbroken, for paths are copied, and brackets in it are no markup."""
    console.print(str(text), soft_wrap=True, markup=False, highlight=False)


def print_note(note: str) -> None:
    """Print a note of what the figures and pictures are worth, where there is one."""
    if note:
        console.print(note, style="yellow", soft_wrap=True)


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            with _interruptible():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in RESUMABLE
            problems.print(f"interrupted{KEPT if resumable else ''}", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A block from which Ctrl-C and SIGTERM come out as KeyboardInterrupt, whatever became of them.

    Torch loses one within the loading of weights, and an error of the file's comes out instead. A
    signal that somebody handles or ignores stays theirs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = ""

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = signal.Signals(number).name
        raise KeyboardInterrupt(interrupted)

    ours = [number for number, own in _ENDING.items() if signal.getsignal(number) is own]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    except typer.Exit:  # a RuntimeError that says what becomes of the command
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if interrupted:
            raise KeyboardInterrupt(interrupted) from error
        raise
    finally:
        for number in ours:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, _ENDING[number])


app = typer.Typer(
    cls=_Commands,
    help="Invert, reconstruct, edit and compare videos with diffusion models and STEM attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"stem {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Expected errors become one line.

    Args:
        arguments: Arguments of the command line; None: the process's own.
    """
    _accept_any_letter()
    _set_up_log()
    try:
        with warnings.catch_warnings():
            # Of libraries, about their own next release: nothing that a command's user can mend.
            warnings.simplefilter("ignore", FutureWarning)
            app(args=arguments)
    except OSError as error:
        # With a file's name it is the system's; without one, the text is this package's own.
        return fail(str(error) if error.filename else error.strerror or str(error))
    except (MemoryError, ValueError) as error:
        return fail(str(error) or type(error).__name__)
    except (ArithmeticError, RuntimeError) as error:
        message = _expected(error)
        if message is None:
            raise
        return fail(message)
    return 0


def _expected(error: ArithmeticError | RuntimeError) -> str | None:
    """What to say of an error of the computing; None: it is a fault of this package."""
    from stem_kernels import BackendError
    from stem_kernels.shared.memory import lacks_memory

    from ..diffusion.loop import NonFiniteError

    if isinstance(error, (BackendError, NonFiniteError)):
        return str(error)
    if lacks_memory(error):
        return f"{str(error).rstrip('. ')}. Take fewer or smaller frames"
    return None


def fail(message: str) -> int:
    """Print what is wrong; returns the exit status."""
    problems.print(f"error: {message}", style="red", soft_wrap=True, markup=False)
    return 2


def _accept_any_letter() -> None:
    """No letter that the terminal's encoding lacks fails a run: a "?" stands for it."""
    # Not every stdout is a TextIOWrapper: colorama, which a dependency may bring, wraps it.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="replace")


def _set_up_log() -> None:
    handler: logging.Handler
    if problems.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=problems, show_time=False, show_path=False)
    else:  # a record is a line, however long
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    # Of the kernels only warnings: on a CPU there is but one backend, and `stem info` explains.
    for name, level in (("stem", logging.INFO), ("stem_kernels", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers = [handler]


def quieten_libraries() -> None:
    """Load diffusers and transformers: no advice of what else to install, and no bars.

    Bars of downloads stay, on a terminal.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # diffusers prints what transformers misses
    import diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    hidden = are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()  # the hub's, too
    if sys.stderr.isatty() and not hidden:
        enable_progress_bars()
