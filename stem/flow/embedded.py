"""The embedded video model: a transformer on the latents of the embedded model's VAE."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..diffusion.pipeline import decode_latents, encode_frames, vae_factor, warn_of_words
from ..models import EMBEDDED_FOLDER, loaded_as
from ..sources import LATENTS, ModelError
from .model import Conditions, VelocityModel, check_frames


class EmbeddedVideoModel(VelocityModel):
    """A small transformer on frames that the embedded model's VAE encodes one by one.

    Args:
        folder: Folder of it: `transformer/` (a WanTransformer3DModel), `scheduler/` (a
            FlowMatchEulerDiscreteScheduler) and `latents.json` ({"mean": [C], "std": [C]} of the
            VAE's latents before its scaling factor). VAE, tokenizer and text encoder are those of
            the embedded model.
        dtype: Dtype of transformer and text encoder; the VAE stays float32.

    Raises:
        ModelError: the folder lacks a part, or the parts do not fit.
    """

    frames_per_latent = 1

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            WanTransformer3DModel,
        )
        from transformers import AutoTokenizer, CLIPTextModel

        folder = Path(folder)
        try:
            moments = json.loads((folder / LATENTS).read_bytes())
            mean, std = moments["mean"], moments["std"]
            transformer = WanTransformer3DModel.from_pretrained(
                folder / "transformer", **loaded_as(dtype)
            )
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{folder} holds no video model on the embedded VAE's latents: {error}. It needs "
                f"transformer/, scheduler/ and {LATENTS}, as the embedded one has them"
            ) from error
        vae = AutoencoderKL.from_pretrained(EMBEDDED_FOLDER / "vae")
        text_encoder = CLIPTextModel.from_pretrained(EMBEDDED_FOLDER / "text_encoder")
        # The VAE's latents are scaled by these alone, and they count in its fingerprint.
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
        if len(mean) != len(std) or len(mean) != vae.config.latent_channels:
            raise ModelError(
                f"{folder / LATENTS} has {len(mean)} means and {len(std)} deviations; the embedded "
                f"VAE's latents have {vae.config.latent_channels} channels"
            )
        self.pixels_per_latent = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(
            transformer.eval(),
            vae.eval(),
            text_encoder.to(dtype).eval(),
            AutoTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer"),
            scheduler,
        )
        assert vae_factor(self) == self.pixels_per_latent

    @property
    def channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        check_frames(self, frames)
        return encode_frames(self, frames).transpose(0, 1)[None].contiguous()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self, latents[0].transpose(0, 1))

    @torch.no_grad()
    def conditions(self, prompt: str) -> Conditions:
        warn_of_words(self, prompt)
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # The whole of it, padding included, as StableDiffusionPipeline gives it to the UNet.
        embeddings = self.text_encoder(tokens.input_ids.to(self.device))[0]
        return {"encoder_hidden_states": embeddings.to(self.dtype)}
