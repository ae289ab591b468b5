"""The embedded model's parts, all in the classes of diffusers and transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ...models import sd_scheduler
from ..grammar import MAX_CAPTION_WORDS, VOCABULARY

RESOLUTION = 64
VAE_FACTOR = 4
# Not Stable Diffusion's four: a latent stands for the 48 numbers of 4x4 pixels, and with four
# channels edges blur.
LATENT_CHANNELS = 12
TEXT_WIDTH = 128
POSTERIOR_STD = 0.05
_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar, between a start and an end; other words are unknown."""
    start, end, unknown = _SPECIAL
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *VOCABULARY))}
    words = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        model_max_length=MAX_CAPTION_WORDS // 2 + 2,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """A two-layer CLIP text model over the grammar's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_autoencoder(scaling_factor: float = 1.0) -> AutoencoderKL:
    """64x64 pixels to 16x16 latents; no attention, and one narrow posterior for all pictures."""
    autoencoder = AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
    )
    _start_as_identity(autoencoder)
    # A posterior that is free to be wide stays so for thousands of steps, at the latents' expense.
    moments = autoencoder.quant_conv
    with torch.no_grad():
        moments.weight[LATENT_CHANNELS:] = 0
        moments.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)
    return autoencoder


def make_unet() -> UNet2DConditionModel:
    """Attention at 16x16 and 8x8, heads of 40 channels as in Stable Diffusion 1.x."""
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(80, 80, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,  # in this class the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    _start_as_identity(unet)
    return unet


def _start_as_identity(network: nn.Module) -> None:
    """Residual blocks add nothing at first, which lets the network learn what is simple first."""
    for block in network.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        elif isinstance(block, Transformer2DModel):
            nn.init.zeros_(block.proj_out.weight)
            nn.init.zeros_(block.proj_out.bias)


def make_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: Any,
) -> StableDiffusionPipeline:
    """The parts as one pipeline, which loads with diffusers alone once saved."""
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_frames(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    num_steps: int,
    guidance: float,
    seed: int,
    per_caption: int = 1,
    edges: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pictures sampled from captions.

    Args:
        pipeline: Pipeline of the world, at RESOLUTION; with a ControlNet where `edges` are given.
        captions: n of them.
        num_steps, guidance: of the sampling.
        seed: Seed of the first noise.
        per_caption: pictures of each caption, next to each other.
        edges: Edges that the ControlNet is shown, uint8 [n, RESOLUTION, RESOLUTION, 3].

    Returns:
        uint8 [n * per_caption, RESOLUTION, RESOLUTION, 3].
    """
    shown = {} if edges is None else {"image": edges.permute(0, 3, 1, 2).float() / 255}
    images = pipeline(
        list(captions),
        **shown,
        height=RESOLUTION,
        width=RESOLUTION,
        num_images_per_prompt=per_caption,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return (torch.from_numpy(images) * 255).round().to(torch.uint8)
