"""A pipeline's parts as an inversion uses them: VAE, text, UNet and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

VAE_FRAMES = 8
"""Frames that the VAE takes at once; each is independent of the others."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is given beside latents and timestep, for one frame.

    Args:
        embeddings: of the prompt, [1, tokens, channels].
        added: SDXL's `text_embeds` [1, channels] and `time_ids` [1, 6]; else empty.
    """

    embeddings: torch.Tensor
    added: dict[str, torch.Tensor] = field(default_factory=dict)

    def for_frames(self, frames: int) -> dict[str, Any]:
        """The UNet's keyword arguments for a batch of `frames` rows."""
        arguments: dict[str, Any] = {
            "encoder_hidden_states": self.embeddings.expand(frames, -1, -1)
        }
        if self.added:
            arguments["added_cond_kwargs"] = {
                name: value.expand(frames, -1) for name, value in self.added.items()
            }
        return arguments


@torch.no_grad()
def encode_prompt(pipeline: Any, prompt: str, height: int, width: int) -> Conditioning:
    """The conditioning of `prompt`, without guidance. `height` and `width` are in pixels."""
    unet = pipeline.unet
    device, dtype = pipeline.device, unet.dtype
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # SDXL was trained with (original size, crop corner, target size) of each picture.
        size = [height, width, 0, 0, height, width]
        time_ids = torch.tensor([size], device=device, dtype=dtype)
        added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        return Conditioning(embeddings.to(dtype), added)
    embeddings, _ = pipeline.encode_prompt(
        prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning(embeddings.to(dtype))


def vae_factor(pipeline: Any) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_frames(pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
    """Latents of a video: the VAE's posterior mean, scaled as the UNet expects it.

    Args:
        frames: uint8 [N, H, W, 3], H and W multiples of the VAE's factor.

    Returns:
        float32 [N, channels, H / factor, W / factor] on the pipeline's device.
    """
    factor = vae_factor(pipeline)
    if frames.shape[1] % factor or frames.shape[2] % factor:
        raise ValueError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; the VAE needs multiples of {factor} "
            "(read_video crops to them)"
        )
    vae, dtype = pipeline.vae, _vae_dtype(pipeline)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    for part in frames.split(VAE_FRAMES):
        images = part.to(pipeline.device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
        mean = vae.encode(images).latent_dist.mean.float()
        parts.append((mean - shift) * vae.config.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def decode_latents(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Frames of float32 latents [N, channels, h, w]: uint8 [N, H, W, 3] on the CPU."""
    vae, dtype = pipeline.vae, _vae_dtype(pipeline)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    for part in latents.split(VAE_FRAMES):
        images = vae.decode((part / vae.config.scaling_factor + shift).to(dtype)).sample
        pixels = ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        parts.append(pixels.permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)


def _vae_dtype(pipeline: Any) -> torch.dtype:
    vae = pipeline.vae
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # SDXL's VAE overflows float16; its configuration says so.
        vae.to(torch.float32)
    return vae.dtype


def inverse_scheduler(pipeline: Any, num_steps: int) -> DDIMInverseScheduler:
    """DDIM inversion on the pipeline's noise schedule, timesteps ascending."""
    return _prepared(DDIMInverseScheduler, pipeline, num_steps)


def sampling_scheduler(pipeline: Any, num_steps: int) -> DDIMScheduler:
    """DDIM sampling on the pipeline's noise schedule, timesteps descending."""
    return _prepared(DDIMScheduler, pipeline, num_steps)


def _prepared(scheduler_class: Any, pipeline: Any, num_steps: int) -> Any:
    train_steps = pipeline.scheduler.config.num_train_timesteps
    if num_steps < 1 or train_steps % num_steps:
        allowed = [n for n in range(1, train_steps + 1) if train_steps % n == 0]
        nearest = sorted(allowed, key=lambda n: abs(n - num_steps))[:3]
        raise ValueError(
            f"{num_steps} steps do not divide the {train_steps} training steps, so the inversion "
            f"would not mirror the sampling; take {', '.join(map(str, sorted(nearest)))}"
        )
    scheduler = scheduler_class.from_config(
        pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@torch.no_grad()
def predict(
    pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The UNet's prediction for float32 latents [N, c, h, w] at one timestep, in float32."""
    unet = pipeline.unet
    arguments = conditioning.for_frames(latents.shape[0])
    return unet(latents.to(unet.dtype), timestep, return_dict=False, **arguments)[0].float()
