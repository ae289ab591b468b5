"""Video models that predict a velocity, of few random weights, and a video for each."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from clips import smooth
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from stem import Video
from stem.flow import EmbeddedVideoModel, WanModel
from stem.world.training.networks import LATENT_CHANNELS, TEXT_WIDTH, make_tokenizer

PROMPT = "a red ball"
"""Words of the embedded model's grammar."""


def make_transformer(channels: int, text_width: int, patch: int) -> WanTransformer3DModel:
    """A transformer whose velocity tells prompts apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, patch, patch),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_width,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        )
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return transformer.eval()


def write_embedded(folder: Path, seed: float = 0.0) -> Path:
    """A folder of the form that the embedded video model has."""
    transformer = make_transformer(LATENT_CHANNELS, TEXT_WIDTH, 1)
    with torch.no_grad():
        transformer.scale_shift_table.add_(seed)
    transformer.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    moments = {"mean": [0.1] * LATENT_CHANNELS, "std": [0.8] * LATENT_CHANNELS}
    (folder / "latents.json").write_text(json.dumps(moments))
    return folder


def embedded(folder: Path) -> EmbeddedVideoModel:
    return EmbeddedVideoModel(write_embedded(folder))


def make_wan(**changes: Any) -> WanPipeline:
    """Four frames and 8x8 pixels a latent, patches of 2x2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        tokenizer = make_tokenizer()
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
            )
        )
    parts = {
        "vae": vae.eval(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "transformer": make_transformer(16, 16, 2),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    return WanPipeline(**{**parts, **changes})


def wan() -> WanModel:
    return WanModel(make_wan())


def clip(frames: int = 3, side: int = 16) -> Video:
    return Video(smooth(frames, side, side, detail=3), Fraction(10))
