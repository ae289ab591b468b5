"""What is added to a loaded pipeline: another VAE, LoRAs, and words of textual inversion."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..sources import TWO_ENCODERS, WEIGHTS, ModelError, embedding_of, lora_of
from .reasons import reason_of

_ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
_UNNAMED = ("emb_params",)
"""Names of tensors that stand for no word: the file's name does."""


def load_vae(name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A VAE of Stable Diffusion's kind.

    Args:
        name: Hub id, folder of a VAE or of a pipeline, or .safetensors file.
        config: Configuration of the model's own VAE, which a file's has, too.
        dtype: Dtype of the weights.

    Raises:
        ModelError: it cannot be loaded, or it is of another kind or factor.
    """
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        if name.endswith(WEIGHTS):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "config.json"
                path.write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
                vae = AutoencoderKL.from_single_file(
                    name, config=folder, local_files_only=True, torch_dtype=dtype
                )
        else:
            subfolder = _vae_subfolder(name)
            kind = AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name")
            if kind != "AutoencoderKL":
                raise ValueError(f"it is a {kind}, and latents need an AutoencoderKL")
            vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder).to(dtype)
    except (OSError, ValueError, KeyError, NotImplementedError, SingleFileComponentError) as error:
        raise ModelError(
            f"no VAE for this model can be loaded from {name!r}: {reason_of(error)}. --vae (vae) "
            f"takes a hub id, a folder in diffusers' format or a {WEIGHTS} file"
        ) from error
    for key in ("latent_channels", "block_out_channels"):
        own, found = config[key], vae.config[key]
        same = len(own) == len(found) if isinstance(own, (list, tuple)) else own == found
        if not same:
            raise ModelError(
                f"the VAE {name!r} has {key} {found}, and the model's own has {own}: its latents "
                "are of another kind; use a VAE that was made for this model"
            )
    return vae


def _vae_subfolder(name: str) -> str | None:
    """Where a VAE lies in a folder or in a repository; None: at its top."""
    from diffusers import AutoencoderKL

    if Path(name).is_dir():
        return None if (Path(name) / "config.json").is_file() else "vae"
    try:
        AutoencoderKL.load_config(name)
    except OSError:
        return "vae"
    return None


def add_loras(pipeline: Any, texts: Sequence[str]) -> None:
    """Add LoRAs to a pipeline, each with its scale, as layers of their own.

    They are not fused into the weights: fused ones would differ in the last bits from one kind of
    CPU to another, and with them the hash by which an inversion knows its model.

    Args:
        pipeline: Pipeline of Stable Diffusion 1.x, 2.x or XL.
        texts: Texts FILE or FILE:SCALE.

    Raises:
        ModelError: a LoRA was made for another model.
    """
    scales = {}
    for index, text in enumerate(texts):
        path, scale = lora_of(text)
        name = f"lora_{index}"
        try:
            given, _ = pipeline.lora_state_dict(str(path), unet_config=pipeline.unet.config)
            with warnings.catch_warnings():  # peft warns of a second LoRA
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                pipeline.load_lora_weights(str(path), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{str(path)!r} is no LoRA for this model: {reason_of(error)}"
            ) from error
        used = sum(
            f".{name}." in f"{key}."
            for part in (pipeline.unet, *(getattr(pipeline, each[1], None) for each in _ENCODERS))
            if part is not None
            for key in part.state_dict()
        )
        if used != len(given):
            raise ModelError(
                f"{str(path)!r} is no LoRA for this model: {used} of its {len(given)} tensors have "
                f"a place in it (the first is {min(given)})"
            )
        scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


def add_textual_inversions(pipeline: Any, texts: Sequence[str]) -> None:
    """Add words to a pipeline's tokenizers and text encoders.

    A file has embeddings of one word: a tensor [vectors, channels] for one text encoder, found by
    its channels, or `clip_l` and `clip_g` for Stable Diffusion XL's two.

    Args:
        pipeline: Pipeline of Stable Diffusion 1.x, 2.x or XL.
        texts: Texts FILE or FILE:TOKEN. Without a token the word is the name of the tensor, or
            the file's where the tensor's says nothing.

    Raises:
        ModelError: embeddings that were made for another model, or a word that is there already.
    """
    from safetensors.torch import load_file

    for text in texts:
        path, given = embedding_of(text)
        for name, vectors in load_file(path).items():
            unnamed = name in (*TWO_ENCODERS, *_UNNAMED)
            token = given or (path.stem if unnamed else name)
            tokenizer, encoder = _encoder_for(pipeline, path, name, vectors.shape[-1])
            try:
                pipeline.load_textual_inversion(
                    vectors, token=token, tokenizer=tokenizer, text_encoder=encoder
                )
            except ValueError as error:
                raise ModelError(
                    f"the textual inversion {str(path)!r} cannot be added as {token!r}: "
                    f"{reason_of(error)}"
                ) from error


def _encoder_for(pipeline: Any, path: Path, name: str, channels: int) -> tuple[Any, Any]:
    """The tokenizer and the text encoder that a tensor of a textual inversion is for."""
    encoders = [
        (getattr(pipeline, tokenizer), getattr(pipeline, encoder))
        for tokenizer, encoder in _ENCODERS
        if getattr(pipeline, encoder, None) is not None
    ]
    widths = [encoder.get_input_embeddings().weight.shape[-1] for _, encoder in encoders]
    fitting = [index for index, width in enumerate(widths) if width == channels]
    if name in TWO_ENCODERS:
        one = TWO_ENCODERS.index(name)
        fitting = [one] if one in fitting and len(encoders) == len(TWO_ENCODERS) else []
    if not fitting:
        raise ModelError(
            f"the textual inversion {str(path)!r} was made for another model: its tensor {name!r} "
            f"has {channels} channels, and this model's text encoder has "
            f"{' and the other '.join(map(str, widths))}"
        )
    return encoders[fitting[0]]
