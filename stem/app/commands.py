"""What the page asks for, as arguments of the command line; each value stands behind its option.

A text from outside is never an argument by itself: --prompt=TEXT cannot be taken for an option.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..names import EDIT_METHODS, INVERSION_METHODS, PRESETS

_SIZE = re.compile(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?")
_CHUNK = re.compile(r"auto|all|[1-9]\d{0,5}")
_MOST_STEPS, _MOST_FRAMES, _LONGEST = 1000, 20_000, 2000


class AskedError(ValueError):
    """Something that was asked for and cannot be, in one line."""


@dataclass(frozen=True)
class Inversion:
    """An inversion that is asked for.

    Args:
        video: Path of the video.
        model: Name of the model.
        method: One of INVERSION_METHODS.
        prompt: Description of the video.
        steps: Number of steps.
        chunk: Frames at once: a number, auto or all.
        first: Number of the first frame, from 0.
        stop: Number of the frame after the last.
        size: Size in pixels, as --size takes it; "" for the video's own.
        out: Folder of everything written.
    """

    video: str
    model: str
    method: str
    prompt: str
    steps: int
    chunk: str
    first: int
    stop: int
    size: str
    out: str

    def __post_init__(self) -> None:
        _one_of("method", self.method, INVERSION_METHODS)
        _check_text("prompt", self.prompt)
        _whole("steps", self.steps, 1, _MOST_STEPS)
        _whole("first frame", self.first, 0, _MOST_FRAMES)
        _whole("last frame", self.stop, self.first + 1, _MOST_FRAMES)
        if self.size and not _SIZE.fullmatch(self.size):
            raise AskedError(f"size is {self.size!r}; write 256 (shorter side) or 512x320")
        if not _CHUNK.fullmatch(self.chunk):
            raise AskedError(f"chunk is {self.chunk!r}; write auto, all or a number of frames")

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.stop - self.first

    def arguments(self) -> list[str]:
        """Arguments of `stem invert`."""
        return [
            "invert",
            self.video,
            f"--prompt={self.prompt}",
            f"--methods={self.method}",
            *self.shared(),
        ]

    def shared(self) -> list[str]:
        """The arguments that `stem edit` takes, too."""
        return [
            f"--model={self.model}",
            f"--frames={self.first}:{self.stop}",
            *([f"--size={self.size}"] if self.size else []),
            f"--steps={self.steps}",
            f"--chunk={self.chunk}",
            f"--out={self.out}",
        ]

    @property
    def title(self) -> str:
        """A title for people."""
        what = f"{self.frames} frames, {self.steps} steps"
        return f"invert by {self.method}: {what}" + (f", “{self.prompt}”" if self.prompt else "")

    def record(self) -> dict[str, Any]:
        """It as JSON types, for `of`."""
        return {"kind": "invert", **asdict(self)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Inversion:
        """The inversion of a record."""
        return cls(**{k: v for k, v in record.items() if k not in ("kind", "video_size")})


@dataclass(frozen=True)
class Edits:
    """Edits that are asked for.

    Args:
        source: Inversion asked for before, which names its video; or the path of one's folder.
        prompts: Descriptions of the edited video, one edit each by every method.
        methods: Some of EDIT_METHODS.
        preset: Preset of those that have some, or "".
        guidance: Guidance scale; None: each method's own.
        negative_prompt: Description of what is not wanted, or "".
        seed: Seed of the methods' draws.
        options: METHOD.FIELD=VALUE texts.
        out: Folder of everything written.
        zoom: Whether what is small is edited in a window that follows it.
        zoom_prompts: Descriptions of the edited video as the window shows it, one for each of the
            prompts; or none, where these hold for it, too.
        zoom_source: Description of the source likewise, or "".
    """

    source: Inversion | str
    prompts: Sequence[str]
    methods: Sequence[str]
    preset: str
    guidance: float | None
    negative_prompt: str
    seed: int
    options: Sequence[str]
    out: str
    zoom: bool = False
    zoom_prompts: Sequence[str] = ()
    zoom_source: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise AskedError("the prompt is empty; describe the whole edited video")
        if not self.methods:
            raise AskedError("no method is chosen; take one or more")
        for prompt in self.prompts:
            _check_text("prompt", prompt)
        _check_text("negative prompt", self.negative_prompt)
        for method in self.methods:
            _one_of("method", method, EDIT_METHODS)
        with_presets = [method for method in self.methods if method in PRESETS]
        lacking = [method for method in with_presets if self.preset not in PRESETS[method]]
        if self.preset and (lacking or not with_presets):
            known = "; ".join(f"{name} has {', '.join(names)}" for name, names in PRESETS.items())
            raise AskedError(
                f"{self.preset!r} is no preset of {', '.join(lacking or self.methods)}: {known}. "
                "For one of several methods write METHOD.preset=... among the options"
            )
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise AskedError(f"guidance is {self.guidance}; it must be between 0 and 100")
        if self.zoom and list(self.methods) != ["fusion"]:
            raise AskedError(f"a window is for fusion alone, not for {', '.join(self.methods)}")
        if not self.zoom and (self.zoom_prompts or self.zoom_source):
            raise AskedError("prompts of a window are given, and it is off; turn it on")
        if len(self.zoom_prompts) not in (0, len(self.prompts)):
            raise AskedError(
                f"the window has {len(self.zoom_prompts)} prompts, and whole frames have "
                f"{len(self.prompts)}; give one for each, in their order, or none"
            )
        for text in (*self.zoom_prompts, self.zoom_source):
            _check_text("prompt of the window", text)
        _whole("seed", self.seed, 0, 2**31)
        inverted = [self.source.method] if isinstance(self.source, Inversion) else []
        allowed = [*self.methods, *inverted]
        for option in self.options:
            _check_text("option", option)
            written = re.match(r"([\w-]+)\.\w+=", option)
            if not written or written[1] not in allowed:
                raise AskedError(
                    f"{option!r}; write METHOD.FIELD=VALUE with a method of {', '.join(allowed)}"
                )

    def arguments(self) -> list[str]:
        """Arguments of `stem edit`."""
        if isinstance(self.source, Inversion):
            begin = [
                self.source.video,
                f"--source-prompt={self.source.prompt}",
                f"--inversion={self.source.method}",
                *self.source.shared(),
            ]
        else:
            begin = [self.source, f"--out={self.out}"]
        return [
            "edit",
            *begin,
            *(f"--prompt={prompt}" for prompt in self.prompts),
            f"--method={','.join(self.methods)}",
            *([f"--preset={self.preset}"] if self.preset else []),
            *([f"--guidance={self.guidance:g}"] if self.guidance is not None else []),
            *([f"--negative-prompt={self.negative_prompt}"] if self.negative_prompt else []),
            *([f"--seed={self.seed}"] if self.seed else []),
            *(f"--option={option}" for option in self.options),
            *(["--zoom"] if self.zoom else []),
            *(f"--zoom-prompt={text}" for text in self.zoom_prompts),
            *([f"--zoom-source={self.zoom_source}"] if self.zoom_source else []),
        ]

    @property
    def title(self) -> str:
        """A title for people."""
        return f"edit by {', '.join(self.methods)}: " + ", ".join(f"“{p}”" for p in self.prompts)

    def record(self) -> dict[str, Any]:
        """It as JSON types."""
        return {"kind": "edit", **asdict(self)}


def shell_line(arguments: Sequence[str]) -> str:
    """A command line that a shell takes.

    Args:
        arguments: Arguments of `stem`.
    """
    return " ".join(["stem", *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--"):
        return f"{name}={shlex.quote(value)}"
    return shlex.quote(argument)


def printed_paths(lines: Sequence[str], out: Path) -> list[Path]:
    """The paths below a folder that a command has printed, on lines of their own or behind a name.

    Args:
        lines: Lines that it printed.
        out: Folder.
    """
    found = []
    for line in lines:
        path = Path(line.partition(": ")[2] or line)
        if path.is_absolute() and path.is_relative_to(out) and path.exists():
            found.append(path)
    return list(dict.fromkeys(found))


def _check_text(name: str, text: str) -> None:
    if len(text) > _LONGEST or not text.isprintable():
        raise AskedError(
            f"the {name} has {len(text)} letters; write at most {_LONGEST}, on one line and "
            "without control characters"
        )


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise AskedError(f"{name} is {value!r}; take one of {', '.join(allowed)}")


def _whole(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise AskedError(f"{name} is {value!r}; write a whole number between {least} and {most}")
