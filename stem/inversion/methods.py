"""The inversions by name, and the attention each of them puts into the UNet."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ..attention import Handle, Hooks, enabled, plain
from ..attention.families import unet_of
from ..attention.installed import handle_in
from ..config import (
    AttentionConfig,
    InflatedConfig,
    PerFrameConfig,
    SparseCausalConfig,
    StemConfig,
    scenes_of,
)
from ..diffusion.control import controlled
from ..names import INVERSION_METHODS
from .folder import InversionError, InversionFolder

_CONFIGS = (PerFrameConfig, SparseCausalConfig, InflatedConfig, StemConfig)
METHODS: dict[str, type[AttentionConfig]] = dict(zip(INVERSION_METHODS, _CONFIGS, strict=True))
"""The class of each inversion's attention configuration, by the name of the inversion."""
_OF_THE_RUN = ("num_frames", "chunk", "cuts")


def attention_config(
    method: str,
    options: Mapping[str, Any],
    num_frames: int,
    chunk: int | None = None,
    cuts: Sequence[int] = (),
) -> AttentionConfig:
    """The attention of an inversion of one video.

    Args:
        method: Name of the inversion, a key of METHODS.
        options: Changes to its configuration's defaults, by field name.
        num_frames: Number of frames of the video.
        chunk: Number of frames that go through the UNet at once; None: all.
        cuts: Numbers of the frames that begin another scene.

    Raises:
        ValueError: an unknown method or option, or a value that the option refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    fields = [field.name for field in dataclasses.fields(METHODS[method])]
    allowed = [name for name in fields if name not in _OF_THE_RUN]
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"{method} has no option {name!r}; "
                + (f"it has {', '.join(allowed)}" if allowed else "it has no options")
            )
    return METHODS[method](**options, num_frames=num_frames, chunk=chunk, cuts=tuple(cuts))


def check_methods(
    methods: Sequence[str], options: Mapping[str, Mapping[str, Any]], num_frames: int
) -> None:
    """Raise where a video could not be inverted by these methods.

    Args:
        methods: Names of the methods.
        options: Changes to their configurations' defaults, by method.
        num_frames: Number of frames of the video.

    Raises:
        TypeError: one name in place of a list of names.
        ValueError: no method, an unknown one, or options that do not fit.
    """
    if isinstance(methods, str):
        raise TypeError(f"methods is {methods!r}; pass a list of names, such as [{methods!r}]")
    if not methods:
        raise ValueError("methods is empty; give at least one name")
    for method in methods:
        attention_config(method, options.get(method, {}), num_frames)
    check_options_used(methods, options)


def check_options_used(methods: Sequence[str], options: Mapping[str, object]) -> None:
    """Raise ValueError where options are for a method that is not among the methods."""
    for method in options:
        if method not in methods:
            raise ValueError(f"there are options for {method}, which is not among the methods")


def inversion_attention(inversion: InversionFolder, chunk: int | None = None) -> AttentionConfig:
    """The configuration of the attention that an inversion was made with.

    Args:
        inversion: Inversion.
        chunk: Number of frames that go through the UNet at once; None: as in the inversion.
    """
    options = dict(inversion.settings["attention"])
    method = inversion.settings["method"]
    expected = {field.name for field in dataclasses.fields(METHODS[method])}
    if set(options) != expected:
        raise InversionError(
            f"{inversion.path} is another version's: its attention's options differ from this "
            f"version's in {', '.join(sorted(expected ^ set(options)))}",
            "invert the video again",
        )
    frames, begun, cuts = (options.pop(name) for name in _OF_THE_RUN)
    return attention_config(method, options, frames, chunk or begun, cuts)


def arguments_of(inversion: InversionFolder) -> dict[str, Any]:
    """The arguments of `invert` that say how an inversion was made, beside the prompt."""
    options = dict(inversion.settings["attention"])
    _, chunk, cuts = (options.pop(name) for name in _OF_THE_RUN)
    return {
        "method": inversion.settings["method"],
        "options": options,
        "num_steps": inversion.settings["num_steps"],
        "chunk": chunk,
        "cuts": cuts,
        "model": inversion.model_source.record(),
    }


def inversion_scenes(inversion: InversionFolder) -> list[range]:
    """The frames of each scene of an inverted video."""
    frames: int = inversion.settings["video"]["num_frames"]
    return scenes_of(frames, inversion_attention(inversion).cuts)


def running_conditions(
    pipeline: Any, environment: dict[str, str], num_frames: int
) -> dict[str, str]:
    """A run's environment with the number of frames that go through the UNet at once now.

    It is less than what was asked for where memory ran out.

    Args:
        pipeline: Pipeline with the attention on.
        environment: Environment of the run, by name.
        num_frames: Number of frames of the video.
    """
    handle = handle_in(unet_of(pipeline))
    chunk = handle.chunk if isinstance(handle, Handle) else None
    return {**environment, "chunk": str(chunk or num_frames)}


@contextlib.contextmanager
def attention_on(
    pipeline: Any,
    config: AttentionConfig | None,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> Iterator[Handle | None]:
    """The attention on in the pipeline's UNet for the length of a `with` block.

    The pipeline's ControlNets stand beside the UNet, with their own attention.

    Args:
        pipeline: Pipeline with the UNet.
        config: Configuration of the attention; None: the UNet's own.
        group: Process group whose ranks share the chunks, or None.
        hooks: Hooks that are called in the attention, with a configuration only.
    """
    # On the UNet: the pipeline would speak of the guidance of its own last call.
    unet = unet_of(pipeline)
    with controlled(pipeline):
        if config is None:
            with plain(unet):
                yield None
        else:
            with enabled(unet, config, group=group, hooks=hooks) as handle:
                yield handle
