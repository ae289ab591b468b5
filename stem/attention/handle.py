"""Turning an attention mechanism on in a UNet, and off again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist

from ..config import AttentionConfig, PerFrameConfig, SparseCausalConfig, StemConfig, VideoConfig
from .chunks import ChunkedForward
from .families import family_of, model_of, self_attentions, text_attentions
from .installed import Installed, handle_in
from .layers.frames import InflatedProcessor, SparseCausalProcessor
from .layers.hooks import Hooks
from .layers.processor import PerFrameProcessor, TextAttentionProcessor, VideoAttentionProcessor
from .layers.rows import FrameAxisLayout, RowLayout, layout_of
from .layers.stem import StemProcessor, StemState, bases_shape
from .owners import check_owner, lock, owned
from .video import transformer_of
from .video_handle import VideoHandle

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class Handle(Installed):
    """An attention mechanism that is on in a UNet or ControlNet; made by `enable`.

    Args:
        unet: UNet or ControlNet that the mechanism is in.
        config: Configuration of the mechanism.
        pipeline: Pipeline that the UNet belongs to, which knows its guidance branches, or None.
        group: Process group whose ranks share the chunks, or None.
        hooks: Hooks that are called in the attention, or None.

    Attributes:
        unet: UNet or ControlNet that the mechanism is in.
        config: Configuration that it was enabled with.
        state: State that STEM's layers share (see `StemState`); None for other mechanisms.
        hooks: Hooks that are called in the attention. If it was enabled without hooks, only hooks
            that give or see bases can be added.

    Raises:
        ValueError: hooks would take the place of an IP-Adapter.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        config: AttentionConfig,
        pipeline: Any = None,
        group: dist.ProcessGroup | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        super().__init__(unet, type(config).__name__)
        self.unet = unet
        self.config = config
        self.hooks = Hooks(of_bases_only=True) if hooks is None else hooks
        family = family_of(unet)
        assert family is not None  # see `model_of`
        asked = {"chunk": config.chunk, "cuts": config.cuts or None}
        family.check_whole({**asked, "fit_frames": self._fit_frames, "group": group})
        self._attentions = self_attentions(unet)
        self._layout = layout = layout_of(family, config.num_frames, pipeline)
        attending, self.state = make_processors(
            self._attentions, config, layout, self.hooks, everywhere=hooks is not None
        )
        self._processors.update(attending)
        if hooks is not None:
            texts = text_attentions(unet)
            self._attentions = {**self._attentions, **texts}
            for name, attention in texts.items():
                if isinstance(attention.processor, torch.nn.Module):
                    raise ValueError(
                        f"{name} has a {type(attention.processor).__name__} with weights of its "
                        "own, whose place hooks would take; unload the IP-Adapter first, or "
                        "enable without hooks"
                    )
                self._processors[name] = TextAttentionProcessor(name, layout, hooks)
        self._chunked: ChunkedForward | None = None
        if config.chunk or config.cuts or self._fit_frames is not None or group is not None:
            assert config.num_frames is not None
            self._chunked = ChunkedForward(
                unet,
                family,
                layout,
                config.chunk or config.num_frames,
                cuts=config.cuts,
                fit_frames=self._fit_frames,
                state=self.state,
                group=group,
            )

    @property
    def chunk(self) -> int | None:
        """The number of frames that go through the UNet at once; None: all of a batch."""
        return None if self._chunked is None else self._chunked.chunk

    @property
    def _fit_frames(self) -> int | None:
        return self.config.fit_frames if isinstance(self.config, StemConfig) else None

    def _remove(self) -> None:
        if self._installed and self._chunked is not None:
            self._chunked.take_off()
        super()._remove()

    def _install(self) -> None:
        for name, processor in self._processors.items():
            if isinstance(processor, TextAttentionProcessor):
                # Now, not when this handle was made: then another's may have been there.
                processor.own = self._attentions[name].processor
        if self._chunked is not None:
            self._chunked.put_on()
        super()._install()

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(model, args, kwargs)
        if not torch.compiler.is_compiling():
            self._check_checkpointing()
            if self._chunked is not None:
                self._chunked.check_in_place()
        sample = args[0] if args else kwargs["sample"]
        self._layout.begin(sample)
        if self.state is not None:
            timestep = args[1] if len(args) > 1 else kwargs["timestep"]
            self.state.begin(sample, timestep)

    def _check_checkpointing(self) -> None:
        if not (torch.is_grad_enabled() and self.unet.is_gradient_checkpointing):
            return
        if isinstance(self.config, StemConfig) and self.config.init == "gaussian":
            raise ValueError(
                "init='gaussian' draws numbers for each call of the UNet, and gradient "
                "checkpointing runs layers again with those of the last call; take init='tokens', "
                "or call unet.disable_gradient_checkpointing()"
            )
        if isinstance(self._layout, FrameAxisLayout) and self.config.num_frames is None:
            raise ValueError(
                "num_frames is None, and gradient checkpointing runs layers again when another "
                "call may have had other numbers of frames; give num_frames, or call "
                "unet.disable_gradient_checkpointing()"
            )


def make_processors(
    attentions: Mapping[str, Attention],
    config: AttentionConfig,
    layout: RowLayout,
    hooks: Hooks,
    *,
    everywhere: bool = False,
) -> tuple[dict[str, VideoAttentionProcessor], StemState | None]:
    """The processors of a mechanism by the attention's name, and, for STEM, what they share.

    Args:
        attentions: Self-attentions by name.
        config: Configuration of the mechanism.
        layout: Layout of the rows of a batch.
        hooks: Hooks that are called in them.
        everywhere: Whether layers that keep the UNet's own attention get a processor, too, which
            hooks are called in.
    """
    if isinstance(config, StemConfig):
        shapes = [bases_shape(attention, config) for attention in attentions.values()]
        state = StemState(config, shapes, hooks)
        return {
            name: StemProcessor(name, layout, layer, state) for layer, name in enumerate(attentions)
        }, state
    own = {name: PerFrameProcessor(name, layout, hooks) for name in attentions}
    if isinstance(config, SparseCausalConfig):
        seeing = {
            name: SparseCausalProcessor(name, layout, hooks, config)
            for name, attention in attentions.items()
            if attention.query_dim >= config.min_channels
        }
        return {**(own if everywhere else {}), **seeing}, None
    if isinstance(config, PerFrameConfig):
        return (dict(own) if everywhere else {}), None
    return {name: InflatedProcessor(name, layout, hooks) for name in attentions}, None


@overload
def enable(target: Any, config: VideoConfig) -> VideoHandle: ...


@overload
def enable(
    target: Any,
    config: AttentionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> Handle: ...


def enable(
    target: Any,
    config: AttentionConfig | VideoConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> Handle | VideoHandle:
    """Put an attention mechanism into the self-attentions of a UNet, ControlNet or transformer.

    A second call replaces the mechanism that is on; one `disable` then restores the processors from
    before the first call.

    In a `UNet2DConditionModel` and a `ControlNetModel` the rows of a batch are frames of videos,
    images or guidance branches. A pipeline tells its guidance branches apart, a model alone does
    not; see `StemConfig.num_frames` for batches of several frames or images. The samples of a
    `UNetMotionModel`, `UNet3DConditionModel`, `I2VGenXLUNet`, `SparseControlNetModel` (all
    [videos, C, frames, h, w]) and `UNetSpatioTemporalConditionModel` ([videos, frames, C, h, w])
    say how many frames there are, and a guidance branch is one more video: `num_frames` may stay
    None. Their temporal attentions stay as they are, and see all frames of a call: these models
    take no `chunk`, `cuts`, `fit_frames` or `group`.

    In a `WanTransformer3DModel`, `CogVideoXTransformer3DModel`, `HunyuanVideoTransformer3DModel` or
    `LTXVideoTransformer3DModel` a `VideoConfig` replaces the attention of the video's tokens to all
    of them; a row of a batch is a video there.

    Args:
        target: Pipeline whose `unet` or `transformer` is of one of these classes, or such a model
            (also compiled, or with LoRA).
        config: Configuration of the mechanism: `StemConfig()` if None; a `SparseCausalConfig` or
            an `InflatedConfig` puts those mechanisms in, a `PerFrameConfig` leaves the UNet's own;
            a `VideoConfig` for transformers, which take no other.
        group: Process group whose ranks share the chunks of every call; all of them must make
            the same calls, and all get the whole output. None: this process runs all chunks.
        hooks: Hooks that are called in every self-attention and cross-attention.

    Returns:
        A `Handle`, or a `VideoHandle` for a transformer; its `disable()` restores the processors
        from before.

    Raises:
        TypeError: `target` has no model of these classes, or `config` is not the configuration of
            a mechanism for it.
        ValueError: a transformer is given `group` or `hooks`, its pipeline has two of them, or
            `dense_blocks` names a block that it has not; hooks would take the place of an
            IP-Adapter; the model has no self-attention, `group` is given and `num_frames` is not,
            or `chunk`, `cuts`, `fit_frames` or `group` is given and the model has temporal
            attentions. A call of the model raises it where `num_frames` does not fit the batch.
        RuntimeError: another thread has this UNet in a `with` block.
    """
    return _enabled(target, config, group, hooks)


def _enabled(
    target: Any,
    config: AttentionConfig | VideoConfig | None,
    group: dist.ProcessGroup | None,
    hooks: Hooks | None,
) -> Handle | VideoHandle:
    model = _model_of(target)
    handle = _made(target, model, StemConfig() if config is None else config, group, hooks)
    with lock:
        check_owner(model)
        _remove_from(model)
        handle._install()
    return handle


def _made(
    target: Any,
    model: torch.nn.Module,
    config: AttentionConfig | VideoConfig,
    group: dist.ProcessGroup | None,
    hooks: Hooks | None,
) -> Handle | VideoHandle:
    """The handle of a mechanism that is not yet on."""
    is_transformer = transformer_of(target) is not None
    if isinstance(config, VideoConfig) != is_transformer:
        fitting = "a VideoConfig" if is_transformer else "a StemConfig or another for UNets"
        raise TypeError(
            f"config is a {type(config).__name__} and the model a {type(model).__name__}; pass "
            f"{fitting}"
        )
    if isinstance(config, VideoConfig):
        if group is not None or hooks is not None:
            raise ValueError("a video transformer takes no group and no hooks; leave them away")
        return VideoHandle(model, config)
    if not isinstance(config, AttentionConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a StemConfig, a SparseCausalConfig, "
            "an InflatedConfig or a PerFrameConfig"
        )
    if group is not None and config.num_frames is None:
        raise ValueError("a process group needs num_frames, the frames of one video")
    return Handle(model, config, target if hasattr(target, "unet") else None, group, hooks)


def _model_of(target: Any) -> torch.nn.Module:
    """The UNet, ControlNet or video transformer that a mechanism goes into."""
    transformer = transformer_of(target)
    return model_of(target) if transformer is None else transformer


def disable(target: Any) -> None:
    """Restore the processors from before `enable`. Nothing happens if nothing is enabled.

    Args:
        target: Pipeline or model, as for `enable`.

    Raises:
        RuntimeError: another thread has this UNet in a `with` block.
    """
    model = _model_of(target)
    with lock:
        check_owner(model)
        _remove_from(model)


@overload
def enabled(target: Any, config: VideoConfig) -> contextlib.AbstractContextManager[VideoHandle]: ...


@overload
def enabled(
    target: Any,
    config: AttentionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> contextlib.AbstractContextManager[Handle]: ...


def enabled(
    target: Any,
    config: AttentionConfig | VideoConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """Put an attention mechanism into a model for the length of a `with` block.

    At the end of the block, the mechanism that was on before is on again.

    Args:
        target: Pipeline or model, as for `enable`.
        config: Configuration of the mechanism; `StemConfig()` if None.
        group: Process group whose ranks share the chunks, or None.
        hooks: Hooks that are called in the attention, or None.

    Raises:
        TypeError, ValueError: as `enable`.
        RuntimeError: another thread has this model in such a block. Blocks of one thread may nest.
    """
    return _enabled_for_a_block(target, config, group, hooks)


@contextlib.contextmanager
def _enabled_for_a_block(
    target: Any,
    config: AttentionConfig | VideoConfig | None,
    group: dist.ProcessGroup | None,
    hooks: Hooks | None,
) -> Iterator[Handle | VideoHandle]:
    with plain(target):
        yield _enabled(target, config, group, hooks)


@contextlib.contextmanager
def plain(target: Any) -> Iterator[None]:
    """The UNet's own attention for the length of a `with` block.

    At the end of the block, a mechanism that was enabled inside it is disabled, and the mechanism
    that was on before is on again.

    Args:
        target: Pipeline or model, as for `enable`.

    Raises:
        TypeError: `target` has no model that `enable` serves.
        RuntimeError: another thread has this UNet in such a block.
    """
    model = _model_of(target)
    with owned(model):
        outer = _remove_from(model)
        try:
            yield
        finally:
            with lock:
                _remove_from(model)
                if outer is not None:
                    outer._install()


def _remove_from(model: torch.nn.Module) -> Installed | None:
    """Undo what is enabled, whoever owns the model. Returns its handle, to install it again."""
    with lock:
        handle = handle_in(model)
        if handle is not None:
            handle._remove()
        return handle
