"""A video model that predicts a velocity, as inversions and edits use it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from ..attention.video import VIDEO_FAMILIES, video_family_of
from ..diffusion.pipeline import check_pixels
from ..sources import ModelError
from .solvers import velocity_at

Conditions = dict[str, torch.Tensor]


class VelocityModel(ABC):
    """A video transformer with its VAE and text encoder: frames to latents, prompts to conditions.

    Latents are [1, C, F, h, w], float32 and of about unit variance, as the transformer was trained
    on them.

    Args:
        transformer: Transformer of a class that predicts the velocity of flow matching, and takes
            latents [1, C, F, h, w].
        vae: VAE. It should be float32, in which its rounding is below a level of 255.
        text_encoder: Text encoder.
        tokenizer: Tokenizer.
        scheduler: Scheduler that the transformer was trained with, of flow matching.

    Attributes:
        frames_per_latent: Number of frames for each latent frame after the first, which stands for
            one.
        pixels_per_latent: Number of pixels for each latent, along each side.

    Raises:
        ModelError: a part is of a kind that does not fit; the message says which.
    """

    frames_per_latent: int
    pixels_per_latent: int

    def __init__(
        self, transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any
    ) -> None:
        family = video_family_of(transformer)
        if family is not VIDEO_FAMILIES["WanTransformer3DModel"]:
            raise ModelError(
                f"the transformer is a {type(transformer).__name__}; whole videos are inverted and "
                "edited through a WanTransformer3DModel; stem.flow.invert_flow takes "
                "HunyuanVideo's and LTX's, on latents in memory"
            )
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.shift = _shift_of(scheduler)
        taken, given = transformer.config.in_channels, transformer.config.out_channels
        if (taken, given) != (self.channels, self.channels):
            raise ModelError(
                f"the transformer takes {taken} channels and gives {given}, and the VAE's latents "
                f"have {self.channels}: it wants more than latents (a picture, as image-to-video "
                "models do), which an inversion does not have; use a text-to-video model"
            )

    @property
    @abstractmethod
    def channels(self) -> int:
        """The number C of the latents' channels."""

    @abstractmethod
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents of a video, the means of the VAE's posterior.

        Args:
            frames: Frames, uint8 [N, H, W, 3], on any device.

        Returns:
            float32 [1, C, F, h, w] on the model's device.

        Raises:
            ValueError: another dtype or shape, or a size that `check_size` refuses.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames of latents.

        Args:
            latents: Latents [1, C, F, h, w], float32.

        Returns:
            uint8 [N, H, W, 3] on the CPU.
        """

    @abstractmethod
    def conditions(self, prompt: str) -> Conditions:
        """What the transformer is given of a prompt, as arguments of its call by name.

        Words that the tokenizer has no room for, and words that it does not know, are named in a
        warning.

        Args:
            prompt: Prompt that describes the video.
        """

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as a pipeline of diffusers has them."""
        names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        found: torch.device = self.transformer.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer."""
        found: torch.dtype = self.transformer.dtype
        return found

    @property
    def multiple(self) -> int:
        """The number of pixels that height and width are multiples of."""
        return self.pixels_per_latent * int(self.transformer.config.patch_size[1])

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """The shape [1, C, F, h, w] of a video's latents.

        Args:
            num_frames: Number N of frames.
            height: Height H in pixels.
            width: Width W in pixels.
        """
        frames = 1 + (num_frames - 1) // self.frames_per_latent
        side = self.pixels_per_latent
        return 1, self.channels, frames, height // side, width // side

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """The number of tokens that the transformer makes of a video of this size."""
        shape = self.latent_shape(num_frames, height, width)[2:]
        return math.prod(shape) // math.prod(self.transformer.config.patch_size)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raise where a video cannot go through the model.

        Args:
            num_frames: Number of its frames.
            height: Height in pixels.
            width: Width in pixels.

        Raises:
            ValueError: with the nearest size that can.
        """
        every, side = self.frames_per_latent, self.multiple
        check_num_frames(num_frames, every)
        if height % side or width % side or 0 in (height, width):
            raise ValueError(
                f"frames are {width}x{height}; this model takes multiples of {side} "
                "(read_video crops to them)"
            )
        longest = int(self.transformer.config.rope_max_seq_len)
        patch = self.transformer.config.patch_size
        sizes = self.latent_shape(num_frames, height, width)[2:]
        if any(size // of > longest for size, of in zip(sizes, patch, strict=True)):
            most = longest * every - every + 1, longest * side
            raise ValueError(
                f"the video has {num_frames} frames of {width}x{height}; this transformer has "
                f"places for {most[0]} frames and {most[1]} pixels a side; take fewer frames "
                "(--frames) or smaller ones (--size)"
            )

    def velocity(self, latents: torch.Tensor, level: float, conditions: Conditions) -> torch.Tensor:
        """The velocity, noise minus data, at a noise level from 0 to 1.

        Args:
            latents: Latents [1, C, F, h, w], float32.
            level: Noise level, 1 for pure noise.
            conditions: What `conditions` gave for a prompt.

        Returns:
            float32 [1, C, F, h, w].
        """
        return velocity_at(self.transformer, latents, level, conditions, self.dtype)


def check_num_frames(num_frames: int, every: int) -> None:
    """Raise where a VAE cannot encode so many frames.

    Args:
        num_frames: Number of frames.
        every: Number of frames for each latent frame after the first.

    Raises:
        ValueError: with the nearest number that it can.
    """
    if num_frames < 1 or (num_frames - 1) % every:
        fewer = max(0, num_frames - 1) // every * every + 1
        raise ValueError(
            f"the video has {num_frames} frames; this model takes {every} k + 1, such as {fewer} "
            f"or {fewer + every} (--frames {fewer})"
        )


def check_frames(model: VelocityModel, frames: torch.Tensor) -> None:
    """Raise ValueError where frames are no uint8 [N, H, W, 3], or of a size that does not fit."""
    check_pixels(frames)
    model.check_size(*frames.shape[:3])


def _shift_of(scheduler: Any) -> float:
    """The factor by which a scheduler's high noise has more steps."""
    config, name = scheduler.config, type(scheduler).__name__
    if "flow_shift" in config and config.get("prediction_type") == "flow_prediction":
        return float(config["flow_shift"])
    if "shift" in config and not config.get("use_dynamic_shifting", False):
        return float(config["shift"])
    raise ModelError(
        f"the scheduler is a {name} without one shift of flow matching; use a "
        "FlowMatchEulerDiscreteScheduler without use_dynamic_shifting, or a scheduler with "
        'prediction_type="flow_prediction" and flow_shift, as Wan has it'
    )
