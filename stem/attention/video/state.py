"""What the layers of a transformer know of the call that runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stem_kernels.shared.grid import num_places

from ...config import VideoConfig
from .family import Grid, VideoFamily

TIMESTEPS = 1000
"""Timestep of pure noise, in all classes that are served."""


class VideoState:
    """What the layers share: the configuration, the size of the video, the noise level.

    Args:
        config: Configuration of the mechanism.
        family: Family of the model.
        num_blocks: Number of its blocks.

    Attributes:
        grid: Frames, height and width of the last call's video in tokens; None before the first.
        level: Noise level of the last call; None where no option asks for it.

    Raises:
        ValueError: `dense_blocks` names a block that is not there.
    """

    def __init__(self, config: VideoConfig, family: VideoFamily, num_blocks: int) -> None:
        self.config = config
        self.family = family
        self.grid: Grid | None = None
        self.level: float | None = None
        beyond = [block for block in config.dense_blocks if not -num_blocks <= block < num_blocks]
        if beyond:
            raise ValueError(
                f"dense_blocks holds {beyond}; the {num_blocks} blocks of this {family.name} are "
                f"0 ... {num_blocks - 1}, or {-num_blocks} ... -1 from the last one"
            )
        self._dense_blocks = {block % num_blocks for block in config.dense_blocks}
        self._heads: dict[int, torch.Tensor] = {}

    def begin(self, settings: Any, call: Mapping[str, Any]) -> None:
        """Before each call of the model: note the size of the video, and the noise level if asked.

        Args:
            settings: Configuration of the model.
            call: Arguments of the call by name.
        """
        self.grid = self.family.grid(settings, call)
        if not self.config.always:
            timestep = call["timestep"]
            if isinstance(timestep, torch.Tensor):  # one of each token, where some are known
                timestep = float(timestep.max())
            self.level = timestep / TIMESTEPS

    @property
    def num_tokens(self) -> int:
        """The number of the video's tokens, 0 before the first call."""
        return 0 if self.grid is None else math.prod(self.grid)

    @property
    def num_bases(self) -> int:
        """The number of bases that all tokens have."""
        return math.ceil(self.num_tokens / self.config.tokens_per_base)

    def dense(self, block: int) -> str | None:
        """Why a block runs the model's own attention; None: it does not."""
        config, level = self.config, self.level
        if block in self._dense_blocks:
            return f"block {block} is one of dense_blocks"
        if self.num_tokens <= config.dense_below:
            return f"{self.num_tokens} tokens are no more than dense_below={config.dense_below}"
        if level is not None and level > config.start:
            return f"noise level {level:.3f} is above start={config.start}"
        if level is not None and level < config.end:
            return f"noise level {level:.3f} is below end={config.end}"
        return None

    def note_heads(self, block: int, heads: torch.Tensor) -> None:
        """Note for `described` which heads of each video took exact attention; not in a graph."""
        if not torch.compiler.is_compiling():
            self._heads[block] = heads.detach()

    def described(self, block: int) -> str:
        """What a block did in the last call, and why."""
        if self.grid is None:
            return "no call yet"
        reason = self.dense(block)
        if reason is not None:
            return f"dense: {reason}"
        frames, height, width = self.grid
        said = (
            f"window of {num_places(self.config.window)} places in {frames} frames of "
            f"{height}x{width}, "
            f"{self.num_bases} bases for {self.num_tokens} tokens, "
            f"correction {self.config.correction}"
        )
        if block in self._heads:  # of the last video of the batch, the prompted one under guidance
            said += f", heads {', '.join(map(str, self._heads[block][-1].tolist()))} dense"
        return said
