"""Video models by name: a pipeline of Wan's, or the one that comes with this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..models import EMBEDDED_FOLDER, check_device, dtype_of, loaded_as
from ..names import EMBEDDED_VIDEO_MODEL
from ..sources import LATENTS, WAN, ModelError, ModelSource
from .embedded import EmbeddedVideoModel
from .model import VelocityModel
from .wan import WanModel

EMBEDDED_VIDEO_FOLDER = EMBEDDED_FOLDER.parent / "video_model"
"""The trained video transformer that comes with this package."""


def load_video_model(
    model: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> VelocityModel:
    """Load a video transformer with its VAE and text encoder.

    Args:
        model: Hub id or local folder of a WanPipeline, "embedded-video" (the small trained one that
            comes with this package, for 64x64 pixels), or a folder of the form that that one has.
        device: Device to load onto; None: "cuda" if there is a GPU, else "cpu".
        dtype: Dtype of transformer and text encoder, "float32", "float16" or "bfloat16", or
            torch's; None: bfloat16 on a GPU, else float32. The VAE is float32.
        variant: Variant of a hub id's or a folder's weights, such as "fp16".

    Raises:
        ModelError: the model cannot be loaded, or it is of another kind.
        ValueError: the device or the dtype does not exist here.
    """
    device = check_device(device)
    dtype = dtype_of(dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = _embedded_folder(model)
    found: VelocityModel
    with torch.random.fork_rng(devices=[]):  # loading fills weights with random numbers first
        if folder is not None:
            found = EmbeddedVideoModel(folder, dtype)
        else:
            found = WanModel(_wan_pipeline(model, dtype, variant))
    for part in (found.transformer, found.vae, found.text_encoder):
        part.to(device)
    return found


def known_steps(model: str) -> tuple[int, int]:
    """What a model's videos are cut into, as far as that is known without loading it.

    Args:
        model: Name of the model, as for `load_video_model`.

    Returns:
        Number of frames for each latent frame after the first, and the number of pixels that height
        and width are multiples of; 1 and 1 where the hub must be asked.
    """
    embedded = _embedded_folder(model)
    folder = Path(model) if embedded is None else embedded
    patch = _config(folder, "transformer").get("patch_size", (1, 1, 1))[1]
    if embedded is not None:
        levels = len(_config(EMBEDDED_FOLDER, "vae")["block_out_channels"])
        return 1, 2 ** (levels - 1) * patch
    vae = _config(folder, "vae")
    if not vae:
        return 1, 1
    # Older files leave out what was the same in all of them.
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8) * patch


def _config(folder: Path, part: str) -> dict[str, Any]:
    file = folder / part / "config.json"
    found: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return found


def _embedded_folder(model: str) -> Path | None:
    """The folder of a model on the embedded VAE's latents; None for any other model."""
    if model == EMBEDDED_VIDEO_MODEL:
        return EMBEDDED_VIDEO_FOLDER
    return Path(model) if (Path(model) / LATENTS).is_file() else None


def _wan_pipeline(model: str, dtype: torch.dtype, variant: str | None) -> Any:
    from diffusers import DiffusionPipeline, WanPipeline

    source = ModelSource(model, variant)
    source.check()
    if source.is_built_in or source.is_file:
        raise ModelError(
            f"{model!r} is no video transformer; --model takes a hub id or a folder of a {WAN} "
            f"here, or {EMBEDDED_VIDEO_MODEL!r}"
        )
    try:
        name = DiffusionPipeline.load_config(model)["_class_name"]
        if name == WAN:
            # In bfloat16 the VAE's rounding shows.
            return WanPipeline.from_pretrained(
                model, **loaded_as({"vae": torch.float32, "default": dtype}), variant=variant
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no video model can be loaded from {model!r}: {error}. --model takes a hub id or a "
            f"folder of a {WAN} (with model_index.json), or {EMBEDDED_VIDEO_MODEL!r}"
        ) from error
    raise ModelError(
        f"{model!r} is a {name}, no {WAN} (text to video), which --model takes here; or take "
        f"{EMBEDDED_VIDEO_MODEL!r}"
    )
