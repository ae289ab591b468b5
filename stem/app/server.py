"""The server of the page: where it listens, who may come in; nothing leaves the machine."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import check_output
from .jobs import Jobs
from .library import check_gradio, import_gradio
from .runner import Runner
from .state import State
from .uploads import LIMITS, Videos

logger = logging.getLogger("stem")

# A browser then asks no other machine for anything, whatever a page or a library in it says.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'self'"
)
_LOOPBACKS = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_HOST = re.compile(rb"(\[[^\]]*\]|[^:]*)(:\d*)?")  # of a request; a port may follow
_FETCHES = ("file=http:", "file=https:", "/proxy=")  # addresses that Gradio fetches for a browser


@dataclass(frozen=True)
class Address:
    """Where the page is.

    Args:
        host: Name or number of the host that it is bound to.
        port: Port; 0: one that is free.
        auth: Name and password that a browser must give, or None.

    Raises:
        ValueError: others could reach it, and there is no password.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be between 0 and 65535")
        if self.auth is None and not self.is_loopback:
            raise ValueError(
                f"host is {self.host!r}, which others can reach: give a password with --auth "
                "USER:PASSWORD, or take 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def shown(self) -> str:
        """The host as URLs have it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def served(self) -> frozenset[str]:
        """Hosts that requests are answered for; none: all, for a password is asked for."""
        return frozenset() if self.auth else frozenset({*_LOOPBACKS, self.shown})


class _Guard:
    """Middleware: the headers of every answer, and what is not answered."""

    def __init__(self, app: Callable[..., Any], hosts: Collection[str]) -> None:
        self._app, self._hosts = app, {host.encode() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] + "?" + scope.get("query_string", b"").decode("latin-1")
        if any(part in path for part in _FETCHES):
            await _refuse(send, 403, b"no other address is fetched from here")
            return
        host = _HOST.fullmatch(dict(scope["headers"]).get(b"host", b""))
        if self._hosts and (host is None or host[1].lower() not in self._hosts):
            # A name that somebody else lets point to this machine, from a page of theirs.
            await _refuse(send, 400, b"unknown host")
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, answer)


async def _refuse(send: Any, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@contextlib.contextmanager
def serving(
    out: Path, address: Address, *, models: Sequence[str], devices: Sequence[str] = ("",)
) -> Iterator[str]:
    """Serve the page in a `with` block; its jobs run as long.

    Args:
        out: Folder of everything written; only files below it are served.
        address: Where the page is.
        models: Names of the models that are offered.
        devices: Names of the devices, one job at a time on each; "" for the default.

    Yields:
        The page's URL.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        OSError: the folder cannot be written, another server works in it, or the port is taken.
    """
    out = out.absolute()
    check_output(out / "app")
    port = _free_port(address)
    own = out / "app"
    check_gradio()
    jobs = Jobs(own / "jobs")
    gradio = import_gradio(own / "incoming")
    from starlette.middleware import Middleware

    from .page import build

    runner = Runner(jobs, devices)
    videos = Videos(own / "videos")
    state = State(out, jobs, videos, models)
    state.add_shipped()
    blocks = build(state)
    folder = Path(__file__).parent / "assets"
    blocks.launch(
        server_name=address.host,
        server_port=port,
        auth=address.auth,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        allowed_paths=[str(out)],
        blocked_paths=[str(own / "jobs")],
        max_file_size=LIMITS.megabytes * 2**20,
        app_kwargs={"middleware": [Middleware(_Guard, hosts=address.served)]},
        theme=_theme(gradio),
        css=(folder / "page.css").read_text(),
        head=f"<script>{(folder / 'page.js').read_text()}</script>",
    )
    runner.start()
    try:
        yield f"http://{address.shown}:{port}"
    finally:
        runner.stop()
        blocks.close(verbose=False)
        jobs.close()


def _theme(gradio: Any) -> Any:
    """The colours of a report's page, and the machine's own letters: none is fetched."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    light_and_dark = {
        "body_background_fill": ("#fbfaf8", "#131416"),
        "body_text_color": ("#1d1e21", "#e9e8e4"),
        "body_text_color_subdued": ("#5c6068", "#a0a4ab"),
        "block_background_fill": ("#ffffff", "#1b1d20"),
        "block_label_text_color": ("#1d1e21", "#e9e8e4"),
        "block_title_text_color": ("#1d1e21", "#e9e8e4"),
        "block_info_text_color": ("#5c6068", "#a0a4ab"),
        "background_fill_primary": ("#ffffff", "#1b1d20"),
        "background_fill_secondary": ("#f2f0ec", "#24272b"),
        "border_color_primary": ("#dedcd7", "#33363b"),
        "input_background_fill": ("#f6f4f1", "#24272b"),
        "button_primary_background_fill": ("#2456a6", "#2f6fd0"),
        "button_primary_text_color": ("#ffffff", "#ffffff"),
        "checkbox_label_background_fill": ("#f2f0ec", "#24272b"),
    }
    colours: dict[str, str] = {}
    for name, (light, dark) in light_and_dark.items():
        colours |= {name: light, f"{name}_dark": dark}
    return gradio.themes.Base(**fonts).set(**colours)


def _free_port(address: Address) -> int:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{address.host}:{address.port} cannot be listened on ({error.strerror}); take "
                "another --port, or 0 for any",
            ) from error
        port: int = probe.getsockname()[1]
        return port


def wait_for_end() -> None:
    """Wait until the process is told to end, by Ctrl-C or by a signal."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        while not ended.wait(3600):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
