"""Processors that stand in a model's attentions, and how the model's own come back."""

from __future__ import annotations

import copy
import logging
from typing import Any, Self

import torch

from .owners import check_owner, lock

logger = logging.getLogger("stem")

_ATTRIBUTE = "_stem_handle"


def handle_in(model: torch.nn.Module) -> Installed | None:
    """The handle of the mechanism that is on in a model, or None."""
    found: Installed | None = getattr(model, _ATTRIBUTE, None)
    return found


class Installed:
    """A mechanism that is on in a model: what all handles share.

    Args:
        model: Model that the mechanism is in.
        mechanism: Name of its configuration, for warnings.
    """

    def __init__(self, model: torch.nn.Module, mechanism: str) -> None:
        self._model = model
        self._mechanism = mechanism
        self._attentions: dict[str, Any] = {}
        self._processors: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._warned = False

    def __getstate__(self) -> None:
        raise TypeError(
            f"an attention mechanism is on in this {type(self._model).__name__}, which cannot be "
            "pickled so; call stem.disable(...) first, and stem.enable(...) where it is loaded"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied

    @property
    def active(self) -> bool:
        """Whether every self-attention that this mechanism replaced still runs through it."""
        return self._installed and not self._replaced()

    @property
    def _installed(self) -> bool:
        return handle_in(self._model) is self

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
            RuntimeError: another thread has this model in a `with` block.
        """
        with lock:
            check_owner(self._model)
            self._remove()

    def _install(self) -> None:
        for name, processor in self._processors.items():
            self._saved[name] = self._attentions[name].processor
            self._attentions[name].set_processor(processor)
        self._hook = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        setattr(self._model, _ATTRIBUTE, self)

    def _remove(self) -> None:
        if not self._installed:
            return
        replaced = self._replaced()
        for name, processor in self._saved.items():
            if name not in replaced:
                self._attentions[name].set_processor(processor)
        # fuse_qkv_projections keeps what it found, and unfusing puts that back.
        kept = getattr(self._model, "original_attn_processors", None) or {}
        for name, processor in self._saved.items():
            if kept.get(f"{name}.processor") is self._processors[name]:
                kept[f"{name}.processor"] = processor
        if replaced:
            logger.warning(
                "others have put a processor into %s since this was enabled; those stay",
                ", ".join(f"{name} ({type(other).__name__})" for name, other in replaced.items()),
            )
        if self._hook is not None:
            self._hook.remove()
        self._saved = {}
        self._hook = None
        delattr(self._model, _ATTRIBUTE)

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each call of the model."""
        if not torch.compiler.is_compiling():
            check_owner(self._model)
            self._warn_once_of_replaced()

    def _warn_once_of_replaced(self) -> None:
        replaced = self._replaced()
        if replaced and not self._warned:
            others = {type(processor).__name__ for processor in replaced.values()}
            logger.warning(
                "%s is off in %d of %d self-attentions: %s took over there after it was enabled "
                "(enable_attention_slicing, fuse_qkv_projections, set_attn_processor and others do "
                "that). Undo that, or call stem.enable again",
                self._mechanism,
                len(replaced),
                len(self._processors),
                ", ".join(sorted(others)),
            )
        self._warned = bool(replaced)
