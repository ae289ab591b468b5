"""What attention across frames must know of a diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Outputs:
    """How the outputs of several chunks of frames become the output of one call.

    Args:
        flat: Function of what the class's forward returns without `return_dict`; its result is
            every tensor in it, all with the rows first.
        nested: Function of these tensors, the inverse of `flat`.
        named: Function that imports the class of the output with `return_dict`.
    """

    flat: Callable[[tuple[Any, ...]], Tensors]
    nested: Callable[[Tensors], tuple[Any, ...]]
    named: Callable[[], Callable[..., Any]]


@dataclass(frozen=True)
class Family:
    """A class of diffusers whose spatial self-attentions can attend across frames.

    The first two arguments of its forward are `sample` and `timestep`. In a spatial self-attention
    a row is a frame, and the tokens of a row are places.

    Args:
        name: Name of the class in diffusers.
        frame_axis: Dimension of `sample` that frames lie along; None: its rows are the frames.
        temporal: Names of the parts that attend along frames, which keep the model's own
            attention. A module below such a part has its name in its path.
        outputs: Outputs of chunks; None: frames cannot go through in chunks, because temporal
            parts see all frames of a call.
    """

    name: str
    frame_axis: int | None = None
    temporal: tuple[str, ...] = ()
    outputs: Outputs | None = None

    def attentions(self, model: torch.nn.Module, *, to_text: bool) -> dict[str, Attention]:
        """The spatial attentions of a model by name, in the order of its modules.

        Args:
            model: Model of this class.
            to_text: Whether those to the prompt are wanted, and not self-attentions.
        """
        from diffusers.models.attention_processor import Attention

        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Attention)
            and module.is_cross_attention == to_text
            and not set(self.temporal) & set(name.split("."))
        }

    def check_whole(self, asked: dict[str, Any]) -> None:
        """Raise where a call is to be cut into chunks of frames that temporal parts forbid.

        Args:
            asked: What would cut it, by name; None: it was not asked for.

        Raises:
            ValueError: something was asked for, and frames cannot go through in chunks.
        """
        given = [
            f"{name}={value!r}" if isinstance(value, int) else name
            for name, value in asked.items()
            if value is not None
        ]
        if self.outputs is None and given:
            raise ValueError(
                f"{', '.join(given)} would cut the frames of a call into chunks, and the temporal "
                f"parts of {self.name} ({', '.join(self.temporal)}) attend to all frames of a "
                f"call; leave {', '.join(asked)} away (all frames in one process, without torchrun)"
            )
