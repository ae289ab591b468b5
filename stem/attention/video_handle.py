"""A mechanism that is on in a video transformer."""

from __future__ import annotations

from typing import Any

import torch

from ..config import VideoConfig
from .installed import Installed
from .video import VideoProcessor, VideoState, video_family_of


class VideoHandle(Installed):
    """Attention by a window and bases that is on in a video transformer; made by `enable`.

    Args:
        transformer: Transformer that it is in.
        config: Configuration of the mechanism.

    Attributes:
        transformer: Transformer that it is in.
        config: Configuration that it was enabled with.
        state: State that the layers share.

    Raises:
        ValueError: `config` does not fit the transformer.
    """

    def __init__(self, transformer: torch.nn.Module, config: VideoConfig) -> None:
        super().__init__(transformer, type(config).__name__)
        self.transformer = transformer
        self.config = config
        family = video_family_of(transformer)
        assert family is not None  # see `transformer_of`
        self._attentions = family.attentions(transformer)
        self.state = VideoState(config, family, len(self._attentions))

    def report(self) -> list[str]:
        """A line for each layer: what it did in the last call, and why."""
        replaced = self._replaced() if self._installed else self._attentions
        lines = []
        for block, name in enumerate(self._attentions):
            said = self.state.described(block)
            if name in replaced:
                said = f"off: {type(self._attentions[name].processor).__name__} is in its place"
            lines.append(f"{name}: {said}")
        return lines

    def _install(self) -> None:
        self._processors = {
            name: VideoProcessor(name, block, attention.processor, self.state)
            for block, (name, attention) in enumerate(self._attentions.items())
        }
        super()._install()

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(model, args, kwargs)
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise ValueError(
                "this transformer runs in parallel (enable_parallelism), and VideoConfig's bases "
                "are those of all tokens; disable this attention, or run it in one process"
            )
        checkpointing = torch.is_grad_enabled() and self.transformer.is_gradient_checkpointing
        if checkpointing and not self.config.always:
            raise ValueError(
                "gradient checkpointing runs layers again with the noise level of the last call; "
                "leave start and end away, or call transformer.disable_gradient_checkpointing()"
            )
        self.state.begin(self.transformer.config, self.state.family.call(args, kwargs))
