"""Turning an attention mechanism on in a UNet, and off again without a trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..config import AttentionConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from .chunks import ChunkedForward
from .families import family_of, model_of, self_attentions, text_attentions
from .frames import InflatedProcessor, SparseCausalProcessor
from .hooks import Hooks
from .owners import check_owner, lock, owned
from .processor import PerFrameProcessor, TextAttentionProcessor, VideoAttentionProcessor
from .rows import FrameAxisLayout, RowLayout, layout_of
from .stem import StemProcessor, StemState, bases_shape

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

logger = logging.getLogger("stem")

_ATTRIBUTE = "_stem_handle"


class Handle:
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
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        config: AttentionConfig,
        pipeline: Any = None,
        group: dist.ProcessGroup | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.unet = unet
        self.config = config
        self.hooks = Hooks(of_bases_only=True) if hooks is None else hooks
        self._saved: dict[str, Any] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._forward_before: Any = None
        # What stands in the UNet's forward, and stays where another has wrapped it.
        self._in_chunks: Any = None
        self._warned = False
        family = family_of(unet)
        assert family is not None  # see `model_of`
        family.check_whole({"chunk": config.chunk, "fit_frames": self._fit_frames, "group": group})
        self._attentions = self_attentions(unet)
        self._layout = layout = layout_of(family, config.num_frames, pipeline)
        self._processors: dict[str, Any] = {}
        attending, self.state = make_processors(
            self._attentions, config, layout, self.hooks, everywhere=hooks is not None
        )
        self._processors.update(attending)
        if hooks is not None:
            texts = text_attentions(unet)
            self._attentions = {**self._attentions, **texts}
            for name, attention in texts.items():
                own = attention.processor
                self._processors[name] = TextAttentionProcessor(name, layout, hooks, own)
        self._chunked: ChunkedForward | None = None
        if config.chunk is not None or self._fit_frames is not None or group is not None:
            assert config.num_frames is not None
            self._chunked = ChunkedForward(
                unet,
                family,
                layout,
                config.chunk or config.num_frames,
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

    @property
    def active(self) -> bool:
        """Whether every self-attention that this mechanism replaced still runs through it."""
        return self._installed and not self._replaced()

    @property
    def _installed(self) -> bool:
        return getattr(self.unet, _ATTRIBUTE, None) is self

    def _replaced(self) -> dict[str, Any]:
        """The processors of others that have taken the place of this mechanism's, by layer."""
        return {
            name: self._attentions[name].processor
            for name, processor in self._processors.items()
            if self._attentions[name].processor is not processor
        }

    def disable(self) -> None:
        """Restore the processors from before. Nothing happens if this mechanism is not on.

        Raises:
            RuntimeError: another thread has this UNet in a `with` block.
        """
        with lock:
            check_owner(self.unet)
            self._remove()

    def _remove(self) -> None:
        if not self._installed:
            return
        replaced = self._replaced()
        for name, processor in self._saved.items():
            if name not in replaced:
                self._attentions[name].set_processor(processor)
        # fuse_qkv_projections keeps what it found, and unfusing puts that back.
        kept = getattr(self.unet, "original_attn_processors", None) or {}
        for name, processor in self._saved.items():
            if kept.get(f"{name}.processor") is self._processors[name]:
                kept[f"{name}.processor"] = processor
        if replaced:
            logger.warning(
                "others have put a processor into %s since this was enabled; those stay",
                ", ".join(f"{name} ({type(other).__name__})" for name, other in replaced.items()),
            )
        if self._chunked is not None:
            self._chunked.on = False
            if self.unet.__dict__.get("forward") is self._in_chunks:
                del self.unet.forward
                if self._forward_before is not None:
                    self.unet.forward = self._forward_before
                self._in_chunks = None
        if self._hook is not None:
            self._hook.remove()
        self._saved = {}
        self._hook = None
        delattr(self.unet, _ATTRIBUTE)

    def _install(self) -> None:
        for name, processor in self._processors.items():
            self._saved[name] = self._attentions[name].processor
            self._attentions[name].set_processor(processor)
        if self._chunked is not None:
            if self._in_chunks is None:
                self._forward_before = self.unet.__dict__.get("forward")
                # Now, not when this handle was made: then another's chunks may have been on.
                self._chunked.forward = self.unet.forward
                # A method: export and others look for a function's code.
                self._in_chunks = self.unet.forward = self._chunked.__call__
            self._chunked.on = True
        self._hook = self.unet.register_forward_pre_hook(self._begin, with_kwargs=True)
        setattr(self.unet, _ATTRIBUTE, self)

    def _begin(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            check_owner(self.unet)
            self._warn_once_of_replaced()
            self._check_checkpointing()
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

    def _warn_once_of_replaced(self) -> None:
        replaced = self._replaced()
        if replaced and not self._warned:
            others = {type(processor).__name__ for processor in replaced.values()}
            logger.warning(
                "%s is off in %d of %d self-attentions: %s took over there after it was enabled "
                "(enable_attention_slicing, fuse_qkv_projections, set_attn_processor and others do "
                "that). Undo that, or call stem.enable again",
                type(self.config).__name__,
                len(replaced),
                len(self._processors),
                ", ".join(sorted(others)),
            )
        self._warned = bool(replaced)


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


def enable(
    target: Any,
    config: AttentionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> Handle:
    """Put an attention mechanism into every spatial self-attention of a UNet or ControlNet.

    A second call replaces the mechanism that is on; one `disable` then restores the processors from
    before the first call.

    In a `UNet2DConditionModel` and a `ControlNetModel` the rows of a batch are frames of videos,
    images or guidance branches. A pipeline tells its guidance branches apart, a model alone does
    not; see `StemConfig.num_frames` for batches of several frames or images. The samples of a
    `UNetMotionModel`, `UNet3DConditionModel`, `I2VGenXLUNet`, `SparseControlNetModel` (all
    [videos, C, frames, h, w]) and `UNetSpatioTemporalConditionModel` ([videos, frames, C, h, w])
    say how many frames there are, and a guidance branch is one more video: `num_frames` may stay
    None. Their temporal attentions stay as they are, and see all frames of a call: these models
    take no `chunk`, `fit_frames` or `group`.

    Args:
        target: Pipeline whose `unet` is of one of these classes, or such a model (also compiled,
            or with LoRA).
        config: Configuration of the mechanism: `StemConfig()` if None; a `SparseCausalConfig` or
            an `InflatedConfig` puts those mechanisms in, a `PerFrameConfig` leaves the UNet's own.
        group: Process group whose ranks share the chunks of every call; all of them must make
            the same calls, and all get the whole output. None: this process runs all chunks.
        hooks: Hooks that are called in every self-attention and cross-attention.

    Returns:
        A `Handle`; its `disable()` restores the processors from before.

    Raises:
        TypeError: `target` has no model of these classes, or `config` is not the configuration of
            a mechanism.
        ValueError: the model has no self-attention, `group` is given and `num_frames` is not, or
            `chunk`, `fit_frames` or `group` is given and the model has temporal attentions. A call
            of the model raises it where `num_frames` does not fit the batch.
        RuntimeError: another thread has this UNet in a `with` block.
    """
    unet = model_of(target)
    config = StemConfig() if config is None else config
    if not isinstance(config, AttentionConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a StemConfig, a SparseCausalConfig, "
            "an InflatedConfig or a PerFrameConfig"
        )
    if group is not None and config.num_frames is None:
        raise ValueError("a process group needs num_frames, the frames of one video")
    handle = Handle(unet, config, target if hasattr(target, "unet") else None, group, hooks)
    with lock:
        check_owner(unet)
        _remove_from(unet)
        handle._install()
    return handle


def disable(target: Any) -> None:
    """Restore the processors from before `enable`. Nothing happens if nothing is enabled.

    Args:
        target: Pipeline or model, as for `enable`.

    Raises:
        RuntimeError: another thread has this UNet in a `with` block.
    """
    unet = model_of(target)
    with lock:
        check_owner(unet)
        _remove_from(unet)


@contextlib.contextmanager
def enabled(
    target: Any,
    config: AttentionConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    hooks: Hooks | None = None,
) -> Iterator[Handle]:
    """Put an attention mechanism into a UNet for the length of a `with` block.

    At the end of the block, the mechanism that was on before is on again.

    Args:
        target: Pipeline or model, as for `enable`.
        config: Configuration of the mechanism; `StemConfig()` if None.
        group: Process group whose ranks share the chunks, or None.
        hooks: Hooks that are called in the attention, or None.

    Raises:
        TypeError, ValueError: as `enable`.
        RuntimeError: another thread has this UNet in such a block. Blocks of one thread may nest.
    """
    with plain(target):
        yield enable(target, config, group=group, hooks=hooks)


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
    unet = model_of(target)
    with owned(unet):
        outer = _remove_from(unet)
        try:
            yield
        finally:
            with lock:
                _remove_from(unet)
                if outer is not None:
                    outer._install()


def _remove_from(unet: torch.nn.Module) -> Handle | None:
    """Undo what is enabled, whoever owns the UNet. Returns its handle, to install it again."""
    with lock:
        handle: Handle | None = getattr(unet, _ATTRIBUTE, None)
        if handle is not None:
            handle._remove()
        return handle
