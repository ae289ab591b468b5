"""Wan 2.1 and 2.2, as diffusers' WanPipeline holds them."""

from __future__ import annotations

from typing import Any

import torch

from ..diffusion.pipeline import warn_of_words
from ..sources import WAN, ModelError
from .model import Conditions, VelocityModel, check_frames

TEXT_TOKENS = 512
"""Tokens of a prompt, padding included, as WanPipeline's call has it."""


class WanModel(VelocityModel):
    """The parts of a WanPipeline.

    Args:
        pipeline: WanPipeline with one transformer.

    Raises:
        ModelError: another pipeline, one with two transformers, or parts that do not fit.
    """

    def __init__(self, pipeline: Any) -> None:
        name = type(pipeline).__name__
        if name != WAN:
            raise ModelError(
                f"the pipeline is a {name}; whole videos are inverted and edited through a "
                f"{WAN} (text to video)"
            )
        if pipeline.transformer is None or pipeline.transformer_2 is not None:
            raise ModelError(
                f"this {name} has two transformers, one for each part of the steps (as Wan 2.2's "
                "A14B), which inversions do not switch between; use Wan 2.1 or Wan 2.2's TI2V-5B"
            )
        self._pipeline = pipeline
        config = pipeline.vae.config
        self.frames_per_latent = config.scale_factor_temporal
        self.pixels_per_latent = config.scale_factor_spatial
        super().__init__(
            pipeline.transformer,
            pipeline.vae,
            pipeline.text_encoder,
            pipeline.tokenizer,
            pipeline.scheduler,
        )

    @property
    def channels(self) -> int:
        return int(self.vae.config.z_dim)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        check_frames(self, frames)
        video = frames.to(self.device).permute(3, 0, 1, 2)[None]
        encoded = self.vae.encode(video.to(self.vae.dtype) / 127.5 - 1.0)
        mean, std = self._moments()
        return (encoded.latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._moments()
        taken = (latents.to(self.device) * std + mean).to(self.vae.dtype)
        (pictures,) = self.vae.decode(taken).sample.float()
        pixels = ((pictures + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0).cpu().contiguous()

    @torch.no_grad()
    def conditions(self, prompt: str) -> Conditions:
        warn_of_words(self, prompt, TEXT_TOKENS)
        embeddings, _ = self._pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings.to(self.dtype)}

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents, float32 [1, C, 1, 1, 1]."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=self.device).float().reshape(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
