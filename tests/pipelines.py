"""Pipelines of Stable Diffusion's shapes, 1.x, 2.x and XL, of few random weights; tokens."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from stem import StemConfig, random_pipeline
from stem.editing.maps.prompts import PromptTokens

SHAPES: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 2, "cross_attention_dim": 16},
    "sd2": {
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    },
    "sdxl": {
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SMALL = StemConfig(num_bases=8, num_iters=2, num_frames=4)  # a video of the rows of `unet_inputs`


ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""Changes to `make_unet` of shape "sd1", where two levels would show nothing more."""


def make_unet(shape: str = "sd1", seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Two levels of 32 and 64 channels, attention in both and in the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 8,
            **SHAPES[shape],
        }
        return UNet2DConditionModel(**settings | changes).eval()


def unet_inputs(shape: str = "sd1", rows: int = 4, timestep: int = 501, size: int = 8) -> Any:
    """Arguments and keyword arguments of one call of `make_unet(shape)`."""
    generator = torch.Generator().manual_seed(1)
    channels = SHAPES[shape]["cross_attention_dim"]
    arguments = (
        torch.randn(rows, 4, size, size, generator=generator),
        torch.tensor(timestep),
        torch.randn(rows, 5, channels, generator=generator),
    )
    keywords: dict[str, Any] = {"return_dict": False}
    if shape == "sdxl":
        keywords["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 16, generator=generator),
            "time_ids": torch.full((rows, 6), 64.0),
        }
    return arguments, keywords


def call(unet: Any, shape: str = "sd1", **inputs: Any) -> torch.Tensor:
    """The output of one call."""
    arguments, keywords = unet_inputs(shape, **inputs)
    with torch.no_grad():
        return unet(*arguments, **keywords)[0]


def text_config(hidden: int, projection: int) -> CLIPTextConfig:
    """A text encoder of one layer, whose words are those of `random_pipeline`."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


@functools.cache
def make_pipeline(shape: str = "sd1", prediction_type: str = "epsilon") -> Any:
    """A pipeline on `make_unet(shape)`, with a VAE of factor 2. Shared: leave it as it is.

    The UNet of "sd1", which most tests take, has one level; the others have two.
    """
    tokenizer = random_pipeline(0).tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=5.0,
        ).eval()
        scheduler = DDIMScheduler(prediction_type=prediction_type, **SCHEDULE)
        unet = make_unet(shape, **(ONE_LEVEL if shape == "sd1" else {}))
        common = {"vae": vae, "unet": unet, "scheduler": scheduler}
        if shape == "sdxl":
            pipeline = StableDiffusionXLPipeline(
                text_encoder=CLIPTextModel(text_config(16, 16)).eval(),
                text_encoder_2=CLIPTextModelWithProjection(text_config(16, 16)).eval(),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                **common,
            )
        else:
            pipeline = StableDiffusionPipeline(
                text_encoder=CLIPTextModel(text_config(16, 16)).eval(),
                tokenizer=tokenizer,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **common,
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_textual_inversion(shape: str = "sd1", encoders: int = 2, vectors: int = 3) -> Any:
    """A pipeline of its own that knows <cat>, a word of several vectors."""
    pipeline = make_pipeline.__wrapped__(shape)
    names = [""]
    if shape == "sdxl":
        pipeline.tokenizer_2 = copy.deepcopy(pipeline.tokenizer)
        names.append("_2")
    for name in names[:encoders]:
        pipeline.load_textual_inversion(
            torch.randn(vectors, 16, generator=torch.Generator().manual_seed(0)),
            token="<cat>",
            tokenizer=getattr(pipeline, f"tokenizer{name}"),
            text_encoder=getattr(pipeline, f"text_encoder{name}"),
        )
    return pipeline


def tokens_of(text: str, length: int = 12) -> PromptTokens:
    """Tokens as if each letter were one: begin mark 0, end mark 1."""
    tokens, places = [0], []
    for word in text.split():
        places.append(tuple(range(len(tokens), len(tokens) + len(word))))
        tokens += map(ord, word)
    return PromptTokens(text, (*tokens, 1), tuple(places), length)
