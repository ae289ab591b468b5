"""Pipelines: loaded from a hub or a folder, or made on the spot with random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler

from .attention.handle import unet_of

if TYPE_CHECKING:
    # Importing diffusers' pipelines takes seconds; `import stem` does without.
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

EMBEDDED_MODEL = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "toy" / "model"
"""The trained pipeline that comes with this package; see README.md in it."""
RANDOM_MODEL = "random"
# Gives natural frames latents of about unit variance, as Stable Diffusion's own factor does.
RANDOM_SCALING_FACTOR = 5.25


class ModelError(ValueError):
    """A model that cannot be loaded, or that this package cannot use."""


def load_pipeline(
    model: str, *, device: str | torch.device | None = None, half: bool | None = None
) -> DiffusionPipeline:
    """A Stable Diffusion 1.x, 2.x or XL pipeline, ready to invert with.

    Args:
        model: a hub id, a local folder in diffusers' format, "embedded" (the small trained
            pipeline that comes with this package, for 64x64 pixels), or "random:SEED", for which
            "random" stands with seed 0 (`random_pipeline`).
        device: "cuda" if None and there is a GPU, else "cpu".
        half: float16 weights; None: on a GPU only.

    Raises:
        ModelError: nothing can be loaded from there, or it is another kind of model.
    """
    from diffusers import DiffusionPipeline

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = device.type == "cuda" if half is None else half
    dtype = torch.float16 if half else torch.float32
    random = re.fullmatch(rf"{RANDOM_MODEL}(?::(\d+))?", model)
    if random:
        pipeline = random_pipeline(int(random[1] or 0)).to(dtype=dtype)
    else:
        source = EMBEDDED_FOLDER if model == EMBEDDED_MODEL else model
        try:
            pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            where = "the folder" if Path(model).exists() else "the hub id"
            raise ModelError(
                f"no pipeline can be loaded from {where} {model!r}: {error}. --model takes a hub "
                f"id, a local folder in diffusers' format (one with model_index.json), "
                f"{EMBEDDED_MODEL!r} or {RANDOM_MODEL!r}"
            ) from error
    if getattr(pipeline, "vae", None) is None:
        raise ModelError(f"{model!r} is a {type(pipeline).__name__}, which has no VAE")
    try:
        unet_of(pipeline)
    except TypeError as error:
        raise ModelError(f"{model!r}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def random_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A small pipeline of Stable Diffusion 1.x's shape whose weights are random numbers.

    It has SD's blocks, its VAE factor of 8 and its schedule, in about 8 million parameters, and
    knows nothing: for plumbing, speed and memory. Equal seeds give equal weights; the global
    random state is left as it was.
    """
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(_byte_vocabulary()),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=_byte_vocabulary()["<|startoftext|>"],
                eos_token_id=_byte_vocabulary()["<|endoftext|>"],
                pad_token_id=_byte_vocabulary()["<|endoftext|>"],
            )
        )
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64, 128, 128),
            attention_head_dim=8,
            cross_attention_dim=64,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            sample_size=256,
            scaling_factor=RANDOM_SCALING_FACTOR,
        )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer(vocab=_byte_vocabulary(), merges=[], model_max_length=77),
        unet=unet.eval(),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, without clipping."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _byte_vocabulary() -> dict[str, int]:
    # CLIP's byte-level alphabet: printable bytes stand for themselves, the others for the code
    # points from 256 on; each also occurs at the end of a word.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + index for index in range(256 - len(printable))]
    letters = [chr(code) for code in [*printable, *shifted]]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    return {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
