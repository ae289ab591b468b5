"""The inversions by name, and the attention each of them puts into the UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ..attention import Handle, enabled, plain
from ..config import AttentionConfig, InflatedConfig, SparseCausalConfig, StemConfig

METHODS: dict[str, type[AttentionConfig] | None] = {
    "ddim": None,
    "st-ddim": SparseCausalConfig,
    "inflated": InflatedConfig,
    "stem": StemConfig,
}
"""ddim keeps the UNet's own per-frame attention."""


def attention_config(
    method: str, options: Mapping[str, Any], num_frames: int
) -> AttentionConfig | None:
    """The attention of an inversion of one video.

    Args:
        method: a key of METHODS.
        options: changes to its configuration's defaults, by field name.
        num_frames: of the video.

    Raises:
        ValueError: an unknown method or option, or a value that the option refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    config_class = METHODS[method]
    fields = [] if config_class is None else [f.name for f in dataclasses.fields(config_class)]
    allowed = [name for name in fields if name != "num_frames"]
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"{method} has no option {name!r}; "
                + (f"it has {', '.join(allowed)}" if allowed else "it has no options")
            )
    return None if config_class is None else config_class(**options, num_frames=num_frames)


def attention_on(
    pipeline: Any, config: AttentionConfig | None
) -> AbstractContextManager[Handle | None]:
    """The attention on in the pipeline's UNet for the length of a `with` block."""
    return plain(pipeline) if config is None else enabled(pipeline, config)
