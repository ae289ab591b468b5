"""Which rows of a batch are one video."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..families import Family
from .exchange import Lockstep
from .hooks import Site

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def layout_of(family: Family, num_frames: int | None, pipeline: Any) -> RowLayout:
    """The layout of the rows in a model's spatial attentions.

    Args:
        family: Family of the model.
        num_frames: Number of frames of a video; None where nobody said.
        pipeline: Pipeline of the model, or None.
    """
    if family.frame_axis is None:
        return RowLayout(num_frames, pipeline)
    return FrameAxisLayout(num_frames, family.name, family.frame_axis)


class RowLayout:
    """The layout where the rows of the sample are frames, of which nothing tells what they are.

    Args:
        num_frames: Number of consecutive rows that are one video; None where nobody said.
        pipeline: Pipeline of the UNet, which knows whether a batch holds guidance branches; None
            where only the UNet is known.

    Attributes:
        exchange: Exchange in which the running chunk meets the others of its video; None while
            whole videos go through the UNet.
    """

    def __init__(self, num_frames: int | None, pipeline: Any = None) -> None:
        self.num_frames = num_frames
        self.exchange: Lockstep | None = None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        # A distilled UNet is told the scale and sees one branch.
        unet = getattr(pipeline, "unet", None)
        self._scale_embedded = unet is not None and unet.config.time_cond_proj_dim is not None

    def begin(self, sample: torch.Tensor) -> None:
        """Before each call of the model: look at its sample."""

    def frames(self, rows: int) -> int:
        """The number of frames of each video in a batch of so many rows.

        Raises:
            ValueError: the rows do not divide into videos, or nothing tells what they are.
        """
        if self.exchange is not None:
            return len(self.exchange.running)
        branches = self._guidance_branches()
        if self.num_frames is not None:
            if rows % (branches * self.num_frames):
                raise ValueError(
                    f"a batch of {rows} rows ({branches} guidance branch{'es' * (branches > 1)} "
                    f"known) does not divide into videos of num_frames={self.num_frames} frames; "
                    "num_frames must be the frames of one video, and every video and guidance "
                    "branch of the batch must have as many. For direct calls of a UNet enable it "
                    "on pipeline.unet, which knows nothing of guidance"
                )
            return self.num_frames
        if rows in (1, branches):
            return 1
        raise ValueError(
            f"a batch of {rows} rows ({branches} guidance branch{'es' * (branches > 1)} known) "
            "may be frames of one video or separate images, and nothing says which: enable with "
            "num_frames, the number of rows that are one video (num_frames=1 for images)"
        )

    def site(self, name: str, attn: Attention, frames: int) -> Site:
        """What hooks are told of an attention that has so many frames of a video in hand."""
        exchange = self.exchange
        return Site(name, attn, range(frames) if exchange is None else exchange.running, exchange)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowLayout:
        """The copied pipeline's layout; of a UNet copied alone, the layout of no pipeline."""
        copied = RowLayout(self.num_frames)
        pipeline = None if self._pipeline is None else memo.get(id(self._pipeline()))
        copied._pipeline = None if pipeline is None else weakref.ref(pipeline)
        copied._scale_embedded = self._scale_embedded
        return copied

    @contextlib.contextmanager
    def exchanging(self, exchange: Lockstep) -> Iterator[None]:
        """Rows are those of the exchange's running chunk for the length of a `with` block."""
        before, self.exchange = self.exchange, exchange
        try:
            yield
        finally:
            self.exchange = before

    def _guidance_branches(self) -> int:
        # As the pipelines' own `do_classifier_free_guidance`, which torch.compile cannot trace from
        # inside their UNet.
        pipeline: Any = None if self._pipeline is None else self._pipeline()
        scale = getattr(pipeline, "guidance_scale", None)
        of_image = getattr(pipeline, "image_guidance_scale", None)
        branches = 1
        if scale is not None and scale > 1 and not self._scale_embedded:
            if of_image is None:
                branches = 2
            elif of_image >= 1:  # InstructPix2Pix: with text and picture, with the picture, neither
                branches = 3
        if getattr(pipeline, "pag_scale", 0) > 0 and pipeline.pag_applied_layers:
            branches += 1  # perturbed attention guidance: the prompt's once more
        return branches


class FrameAxisLayout(RowLayout):
    """The layout where the sample has an axis of frames: rows [guidance branch and video, frame].

    Args:
        num_frames: Number of frames that the sample must have; None: as many as it has.
        model: Name of the model's class, for messages.
        axis: Dimension of the sample that frames lie along.
    """

    def __init__(self, num_frames: int | None, model: str, axis: int) -> None:
        super().__init__(num_frames)
        self.model = model
        self.axis = axis
        self._rows = self._held = 0  # of the call that runs

    def begin(self, sample: torch.Tensor) -> None:
        """Before each call of the model: see how many frames its sample holds.

        Raises:
            ValueError: it has no axis of frames, or `num_frames` differs from it.
        """
        if sample.ndim != 5:
            raise ValueError(
                f"a {self.model} takes samples of 5 dimensions, of which dimension {self.axis} is "
                f"the frames; this one is {list(sample.shape)}"
            )
        held = sample.shape[self.axis]
        if self.num_frames is not None and held != self.num_frames:
            raise ValueError(
                f"num_frames is {self.num_frames}, and the sample {list(sample.shape)} of this "
                f"{self.model} holds {held} frames (dimension {self.axis}); leave num_frames away, "
                "the sample says it"
            )
        self._rows, self._held = sample.shape[0] * held, held

    def frames(self, rows: int) -> int:
        """The number of frames of each video.

        Raises:
            ValueError: the rows are not those of the call's sample.
        """
        if rows == self._rows:
            return self._held
        # Gradient checkpointing runs the layers of an earlier call again.
        given = self.num_frames if torch.is_grad_enabled() else None
        if given is None or rows % given:
            raise ValueError(
                f"a self-attention got {rows} rows in a call of {self._rows}, so it does not see "
                "whole videos: something cuts the batch on the way, as "
                "enable_free_noise_split_inference does. Load the pipeline without it, or disable "
                "this attention"
            )
        return given

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameAxisLayout:
        """A layout of its own."""
        return FrameAxisLayout(self.num_frames, self.model, self.axis)
