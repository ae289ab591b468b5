"""What looks into a UNet's attention, or changes it, while a mechanism is on: named hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from stem_kernels.ops.calibration import Calibration
from stem_kernels.ops.soft_em import SoftEM

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from .exchange import Lockstep


class Site(NamedTuple):
    """One attention within one call of the UNet.

    Args:
        name: Name of the attention in the UNet.
        attention: Attention module, for its projections.
        frames: Numbers of the frames in hand, those of the running chunk.
        exchange: Exchange in which the chunks meet; None while whole videos are in hand.
    """

    name: str
    attention: Attention
    frames: Sequence[int]
    exchange: Lockstep | None


class Operands(NamedTuple):
    """What an attention is computed from.

    Args:
        query: Queries [videos, groups, h, n, d]; a group is a frame where each frame attends by
            itself, else the frames in hand.
        key: Keys [videos, groups, h, m, d].
        value: Values [videos, groups, h, m, d].
        bias: Bias of the logits, [videos, groups, 1 or h, m], or None.
        correction: Correction [videos, groups, h, d + 1, d] of calibrated bases (see
            `stem_kernels.basis_attention`), or None. It belongs to the queries, keys and values
            together: a hook that mixes those of several videos must refuse it.
        query_mean: Mean query [videos, groups, h, d] of the correction, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    query_mean: torch.Tensor | None = None

    def of(self, videos: slice) -> Operands:
        """The operands of some videos of the batch."""
        optional = (
            None if part is None else part[videos]
            for part in (self.bias, self.correction, self.query_mean)
        )
        return Operands(self.query[videos], self.key[videos], self.value[videos], *optional)

    def refuse_calibrated(self, hook: Hook) -> None:
        """Raise where these are calibrated bases, which `hook` would take apart.

        Raises:
            ValueError: there is a correction.
        """
        if self.correction is not None:
            raise ValueError(
                f"{type(hook).__name__} mixes queries, keys and values of several videos, which "
                "calibrated bases do not allow yet; take an inversion or a configuration with "
                "calibration='none'"
            )


class Seen(NamedTuple):
    """What all queries of a video attend to: `Operands` but for the queries.

    Args:
        key: Keys [videos, 1, h, m, d].
        value: Values [videos, 1, h, m, d].
        bias: Bias [videos, 1, 1 or h, m], or None.
        correction: Correction [videos, 1, h, d + 1, d], or None.
        query_mean: Mean query [videos, 1, h, d] of the correction, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    correction: torch.Tensor | None
    query_mean: torch.Tensor | None

    def by(self, query: torch.Tensor) -> Operands:
        """What queries [videos, 1, h, n, d] are attended with."""
        return Operands(query, *self)


class LayerBases(NamedTuple):
    """What a layer's attention to bases is made of, as it is recorded and replayed.

    Args:
        bases: Bases [videos, (h,) K, D].
        payload: Payload bases [videos, h, K, d], or None.
        mass: Mass [videos, (h,) K].
        calibration: Calibration by these videos' own tokens, or None where there was none.
    """

    bases: torch.Tensor
    payload: torch.Tensor | None
    mass: torch.Tensor
    calibration: Calibration | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that there are, by name: what `of_tensors` takes."""
        found = self._asdict()
        calibration = found.pop("calibration")
        if calibration is not None:
            found |= calibration._asdict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> LayerBases:
        """The bases that these are the tensors of."""
        calibration = None
        if "correction" in tensors:
            calibration = Calibration(
                tensors.get("value"), tensors["correction"], tensors["query_mean"]
            )
        return cls(
            tensors["bases"],
            tensors.get("payload"),
            tensors["mass"],
            calibration,
        )


Attend = Callable[[Operands], torch.Tensor]
"""Operands -> attended values [videos, groups, h, n, d]."""


class Hook:
    """The methods that a hook may have; each method here does nothing.

    Attributes:
        joint_bases: Whether all videos of a batch take the responsibilities of the first one, so
            that base k means the same in each of them. Only STEM's attention reads it.
    """

    joint_bases: bool = False

    def bases(self, layer: int) -> LayerBases | None:
        """Bases that replace a layer's EM and calibration, or None."""
        return None

    def converged(self, layer: int, found: SoftEM) -> None:
        """Called with the bases that EM found in a layer."""

    def calibrated(self, layer: int, found: Calibration) -> None:
        """Called with the calibration of a layer's bases, after `converged`."""

    def before(self, site: Site, tokens: torch.Tensor) -> torch.Tensor | None:
        """The output of a self-attention, which is then not computed, or None.

        Args:
            site: Self-attention.
            tokens: Normalised input [videos, frames, S, C].

        Returns:
            [videos, frames, S, C] as after the output projection, or None.
        """
        return None

    def operands(self, site: Site, operands: Operands) -> Operands:
        """The operands of a self-attention, changed or not."""
        return operands

    def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
        """The output of a self-attention; `attend` is the next hook, or the mechanism itself."""
        return attend(operands)

    def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Called with a self-attention's input and projected output, [videos, frames, S, C]."""

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        """The maps of a cross-attention, changed or not: [videos, frames, h, S, tokens]."""
        return maps


class Hooks:
    """Hooks by name, called in the order in which they were added.

    Args:
        hooks: Hooks to begin with, by name.
        of_bases_only: Whether hooks are called for bases only, as in a UNet that was enabled
            without hooks.
    """

    def __init__(self, *, of_bases_only: bool = False, **hooks: Hook) -> None:
        self._of_bases_only = of_bases_only
        self._hooks: dict[str, Hook] = {}
        for name, hook in hooks.items():
            self.add(name, hook)

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(tuple(self._hooks.values()))

    def add(self, name: str, hook: Hook) -> None:
        """Add a hook, which is called after the others.

        Raises:
            ValueError: the name is taken, or nothing would call this hook.
        """
        if name in self._hooks:
            raise ValueError(f"there is a hook named {name!r} already; remove it first")
        if self._of_bases_only:
            more = [method for method in _OF_ATTENTION if _overrides(hook, method)]
            if more:
                raise ValueError(
                    f"the hook {name!r} has {', '.join(more)}, which nothing here would call; "
                    "enable with hooks=Hooks(...)"
                )
        self._hooks[name] = hook

    def remove(self, name: str) -> None:
        """Remove the hook of this name."""
        del self._hooks[name]

    @contextlib.contextmanager
    def added(self, name: str, hook: Hook) -> Iterator[Hook]:
        """A hook that is called for the length of a `with` block."""
        self.add(name, hook)
        try:
            yield hook
        finally:
            self.remove(name)

    def having(self, method: str) -> list[Hook]:
        """The hooks that define this method themselves."""
        if not self._hooks:  # Layers ask seven times each.
            return []
        return [hook for hook in self if _overrides(hook, method)]

    @property
    def joint_bases(self) -> bool:
        """Whether a hook asks for joint bases."""
        return any(hook.joint_bases for hook in self)

    def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
        """Attention through all hooks: the first hook calls the second, and so on."""
        for hook in self.having("operands"):
            changed = hook.operands(site, operands)
            if changed.correction is None:
                operands.refuse_calibrated(hook)
            operands = changed
        for hook in reversed(self.having("attend")):
            attend = _around(hook, site, attend)
        return attend(operands)


_OF_ATTENTION = ("before", "operands", "attend", "after", "text_maps")


def _overrides(hook: Hook, method: str) -> bool:
    return getattr(type(hook), method) is not getattr(Hook, method)


def _around(hook: Hook, site: Site, attend: Attend) -> Attend:
    return lambda operands: hook.attend(site, operands, attend)


class Recording(Hook):
    """Keeps the bases that layers converge to, and their calibrations.

    Attributes:
        found: Bases of the last forward pass, by layer.
    """

    def __init__(self) -> None:
        self.found: dict[int, LayerBases] = {}

    def converged(self, layer: int, found: SoftEM) -> None:
        payload = None if found.payload is None else found.payload.detach()
        self.found[layer] = LayerBases(found.bases.detach(), payload, found.mass.detach())

    def calibrated(self, layer: int, found: Calibration) -> None:
        detached = found.each(torch.Tensor.detach)
        self.found[layer] = self.found[layer]._replace(calibration=detached)


class Replay(Hook):
    """Gives layers the bases of a recording.

    Args:
        found: Bases by layer.
    """

    def __init__(self, found: dict[int, LayerBases]) -> None:
        self.found = found

    def bases(self, layer: int) -> LayerBases:
        if layer not in self.found:
            raise ValueError(
                f"the replayed bases hold layers {sorted(self.found)}, not layer {layer}; "
                "they belong to another UNet"
            )
        return self.found[layer]
