"""The embedded video transformer with the autoencoder and the text encoder that it goes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ...diffusion.pipeline import decode_latents, encode_frames
from ...models import EMBEDDED_FOLDER, load_pipeline
from .card import LATENTS

VIDEO_FOLDER = EMBEDDED_FOLDER.parent / "video_model"
"""Folder of the embedded video transformer."""


class VideoParts:
    """What takes frames and captions to what the transformer is given, and latents to frames.

    Args:
        folder: Folder of the video transformer, as `stem.world.training.video` writes it.

    Attributes:
        transformer: The transformer, float32, without gradients.
    """

    def __init__(self, folder: str | Path = VIDEO_FOLDER) -> None:
        moments = json.loads((Path(folder) / LATENTS).read_text())
        self._pipeline: Any = load_pipeline(str(EMBEDDED_FOLDER), device="cpu")
        self._pipeline.vae.register_to_config(
            latents_mean=moments["mean"], latents_std=moments["std"], scaling_factor=1.0
        )
        transformer = WanTransformer3DModel.from_pretrained(Path(folder) / "transformer")
        self.transformer = transformer.eval().requires_grad_(False)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Whitened latents, float32 [1, channels, F, h, w], of frames, uint8 [F, H, W, 3]."""
        return encode_frames(self._pipeline, frames).transpose(0, 1)[None].contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames, uint8 [F, H, W, 3], of latents [1, channels, F, h, w]."""
        return decode_latents(self._pipeline, latents[0].transpose(0, 1))

    @torch.no_grad()
    def conditions(self, caption: str) -> dict[str, torch.Tensor]:
        """The arguments of the transformer's call that say what is to be seen."""
        ids = self._pipeline.tokenizer(
            caption, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return {"encoder_hidden_states": self._pipeline.text_encoder(ids)[0]}
