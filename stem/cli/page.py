"""The command that serves a page to work in, `stem app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import EMBEDDED_MODEL
from .app import app, say

Auth = Annotated[
    str | None,
    typer.Option(
        metavar="USER:PASSWORD",
        help="What a browser must give; needed where others reach the host.",
    ),
]


@app.command("app")
def app_command(
    out: Annotated[Path, typer.Option(help="Folder of everything written.")] = Path("out/app"),
    host: Annotated[str, typer.Option(help="Name or number of the host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 7860,
    auth: Auth = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that the page offers, repeatable; as for `stem invert`."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="A device that jobs run on, one at a time; repeatable. Default: a GPU where "
            "there is one."
        ),
    ] = None,
) -> None:
    """A page to work in: invert, edit, and look at what came of it, in a browser.

    It runs the other commands, one at a time on a device; an interrupted one goes on at the next
    start.
    """
    from ..app.server import Address, serving, wait_for_end

    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise typer.BadParameter("write USER:PASSWORD", param_hint="--auth")
    address = Address(host, port, (user, password) if auth else None)
    try:
        served = serving(out, address, models=model or [EMBEDDED_MODEL], devices=device or [""])
        with served as url:
            say(f"{url}  (Ctrl-C ends it; jobs that run then go on at the next start)")
            wait_for_end()
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError(
            "stem app needs Gradio, which is not installed: pip install 'stem-inversion[app]'"
        ) from error
