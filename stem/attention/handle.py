"""Turning an attention mechanism on in a UNet, and off again without a trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from ..config import AttentionConfig, InflatedConfig, SparseCausalConfig, StemConfig
from .frames import InflatedProcessor, SparseCausalProcessor
from .processor import VideoAttentionProcessor
from .stem import StemProcessor, StemState, bases_shape

logger = logging.getLogger("stem")

_ATTRIBUTE = "_stem_handle"


class Handle:
    """An attention mechanism that is on in a UNet; made by `enable`.

    Attributes:
        unet: the UNet.
        config: what it was enabled with.
        state: for STEM, what its layers share (see `StemState`); None for the others.
    """

    def __init__(self, unet: UNet2DConditionModel, config: AttentionConfig) -> None:
        self.unet = unet
        self.config = config
        self._saved: dict[str, Any] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._attentions = self_attentions(unet)
        self._processors, self.state = make_processors(self._attentions, config)

    @property
    def active(self) -> bool:
        """Whether this is the mechanism that is on in its UNet."""
        return getattr(self.unet, _ATTRIBUTE, None) is self

    def disable(self) -> None:
        """Put back the very processors that were there before. Does nothing if not active."""
        if not self.active:
            return
        for name, processor in self._saved.items():
            attention = self._attentions[name]
            if attention.processor is self._processors[name]:
                attention.set_processor(processor)
            else:
                logger.warning(
                    "%s has got another processor since it was enabled; that one stays", name
                )
        if self._hook is not None:
            self._hook.remove()
        self._saved = {}
        self._hook = None
        delattr(self.unet, _ATTRIBUTE)

    def _install(self) -> None:
        for name, processor in self._processors.items():
            self._saved[name] = self._attentions[name].processor
            self._attentions[name].set_processor(processor)
        if self.state is not None:
            self._hook = self.unet.register_forward_pre_hook(self._begin, with_kwargs=True)
        setattr(self.unet, _ATTRIBUTE, self)

    def _begin(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.state is not None
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.state.begin(sample, timestep)


def make_processors(
    attentions: Mapping[str, Attention], config: AttentionConfig
) -> tuple[dict[str, VideoAttentionProcessor], StemState | None]:
    """The processors of a mechanism by the attention's name, and, for STEM, what they share.

    Raises:
        TypeError: `config` is no mechanism's.
    """
    if isinstance(config, StemConfig):
        shapes = [bases_shape(attention, config) for attention in attentions.values()]
        state = StemState(config, shapes)
        return {
            name: StemProcessor(name, layer, state) for layer, name in enumerate(attentions)
        }, state
    if isinstance(config, SparseCausalConfig):
        return {
            name: SparseCausalProcessor(name, config)
            for name, attention in attentions.items()
            if attention.query_dim >= config.min_channels
        }, None
    if isinstance(config, InflatedConfig):
        return {name: InflatedProcessor(name, config.num_frames) for name in attentions}, None
    raise TypeError(
        f"config is a {type(config).__name__}; it must be a StemConfig, a SparseCausalConfig "
        "or an InflatedConfig"
    )


def enable(target: Any, config: AttentionConfig | None = None) -> Handle:
    """Put an attention mechanism into every self-attention of a UNet.

    Enabling again replaces the mechanism that is on; one `disable` still restores what was there
    before the first.

    Args:
        target: a `UNet2DConditionModel` (also compiled, or with LoRA), or a pipeline with one.
        config: `StemConfig()` if None; a `SparseCausalConfig` or an `InflatedConfig` puts those
            mechanisms in.

    Returns:
        A `Handle`, whose `disable()` undoes it.

    Raises:
        TypeError: `target` has no UNet2DConditionModel.
        ValueError: the UNet has no self-attention.
    """
    unet = unet_of(target)
    handle = Handle(unet, StemConfig() if config is None else config)
    disable(unet)
    handle._install()
    return handle


def disable(target: Any) -> None:
    """Restore the processors from before `enable`; nothing happens where nothing is enabled.

    Args:
        target: as for `enable`.
    """
    handle = getattr(unet_of(target), _ATTRIBUTE, None)
    if handle is not None:
        handle.disable()


@contextlib.contextmanager
def enabled(target: Any, config: AttentionConfig | None = None) -> Iterator[Handle]:
    """`enable` for the length of a `with` block; afterwards what was on before is on again."""
    with plain(target):
        yield enable(target, config)


@contextlib.contextmanager
def plain(target: Any) -> Iterator[None]:
    """The UNet's own attention for the length of a `with` block.

    Whatever is enabled inside is disabled at the end; what was on before is on again.
    """
    outer = getattr(unet_of(target), _ATTRIBUTE, None)
    disable(target)
    try:
        yield
    finally:
        disable(target)
        if outer is not None:
            outer._install()


def unet_of(target: Any) -> UNet2DConditionModel:
    """The UNet2DConditionModel of a pipeline, a compiled module or a PEFT model."""
    module = getattr(target, "unet", target)
    module = getattr(module, "_orig_mod", module)
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    if not isinstance(module, UNet2DConditionModel):
        raise TypeError(
            f"{type(target).__name__} has no UNet2DConditionModel; pass a Stable Diffusion 1.x, "
            "2.x or XL pipeline, or its unet"
        )
    return module


def self_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Every self-attention of a UNet by name, in the order of its modules."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    }
    if not found:
        raise ValueError("this UNet has no self-attention to replace")
    return found
