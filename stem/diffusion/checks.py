"""Which pipelines an inversion can go through, and why it cannot go through others."""

from __future__ import annotations

import inspect
from typing import Any

from ..attention.families import family_of_unet, unet_of
from ..attention.families.unet2d import UNET_2D
from .control import check_controlnets
from .schedule import check_schedule

_BASE_MODELS = "use a Stable Diffusion 1.x, 2.x or XL model"
# By the number of channels beside the latents'.
_WANTED = {
    1: "a picture's depth (as Stable Diffusion 2's depth model does)",
    3: "a smaller picture (it enlarges pictures)",
    4: "another picture (for instructions, variations or enlarging)",
    5: "a mask and a masked picture (it is made for inpainting)",
}


def check_pipeline(pipeline: Any) -> None:
    """Raise where an inversion through this pipeline's UNet would leave something out.

    Args:
        pipeline: Pipeline of diffusers.

    Raises:
        TypeError: it has no UNet2DConditionModel and no UNetMotionModel.
        ValueError: it has no VAE or text encoder, its control would be ignored or its ControlNet
            was made for another model, its UNet takes more than latents, it is a refiner, or its
            scheduler is of another kind. The message gives the reason.
    """
    unet, name = unet_of(pipeline), type(pipeline).__name__
    if getattr(pipeline, "vae", None) is None:
        raise ValueError(
            f"the pipeline, a {name}, has no VAE: it denoises pixels (as DeepFloyd IF does) or has "
            f"latents of another kind; {_BASE_MODELS}"
        )
    check_controlnets(pipeline)
    motion = getattr(pipeline, "motion_adapter", None) is not None
    if motion and family_of_unet(pipeline) is UNET_2D:
        raise ValueError(
            f"the pipeline, a {name}, has a motion_adapter, which the inversion would ignore, "
            "because its unet is a UNet2DConditionModel; pass an AnimateDiffPipeline, whose unet "
            "has the adapter's layers, or a plain pipeline of the same model"
        )
    projected = getattr(unet.config, "encoder_hid_dim_type", None)
    if projected == "ip_image_proj":
        raise ValueError(
            f"the UNet of the pipeline, a {name}, wants image embeddings (an IP-Adapter), which an "
            "inversion does not have; call pipeline.unload_ip_adapter() first"
        )
    if projected is not None:
        raise ValueError(
            f"the UNet of the pipeline, a {name}, projects the embeddings of another encoder than "
            f"CLIP's (encoder_hid_dim_type={projected!r}, as Kolors, DeepFloyd IF and Kandinsky "
            f"do), which an inversion does not make; {_BASE_MODELS}"
        )
    if getattr(getattr(pipeline, "config", {}), "requires_aesthetics_score", False):
        raise ValueError(
            f"the pipeline, a {name}, is a refiner (requires_aesthetics_score): it is told an "
            "aesthetics score in place of the target's size, and was trained on the last, least "
            "noisy timesteps only, so no inversion can go through it; use the base model"
        )
    _check_channels(pipeline, unet, name)
    if any(unet.config.get(key) is not None for key in ("class_embed_type", "num_class_embeds")):
        raise ValueError(
            f"the UNet of the pipeline, a {name}, wants class labels, which an inversion does not "
            "have; use a model that is told by text alone"
        )
    try:
        check_schedule(pipeline.scheduler)
    except ValueError as error:
        raise ValueError(f"the pipeline, a {name}, cannot be inverted: {error}") from error
    for part in ("text_encoder", "tokenizer"):
        if getattr(pipeline, part, None) is None:
            raise ValueError(
                f"the pipeline, a {name}, has no {part}, and an inversion encodes its prompt; load "
                f"it with its {part}"
            )
    encoding = getattr(pipeline, "encode_prompt", None)
    taken = {} if encoding is None else inspect.signature(encoding).parameters
    given = {"prompt", "device", "do_classifier_free_guidance"}
    if unet.config.addition_embed_type != "text_time":
        given.add("num_images_per_prompt")
    if not given <= taken.keys():
        raise ValueError(
            f"the pipeline, a {name}, has no encode_prompt that takes one prompt as "
            "StableDiffusionPipeline's does; pass that class with the same components"
        )


def _check_channels(pipeline: Any, unet: Any, name: str) -> None:
    """Raise where the VAE's pictures, its latents and what the UNet takes and gives differ."""
    vae = pipeline.vae.config
    if {vae.in_channels, vae.out_channels} != {3}:
        raise ValueError(
            f"the VAE of the pipeline, a {name}, makes latents of {vae.in_channels} channels and "
            f"pictures of {vae.out_channels} (with depth, for example), and a video has 3; "
            f"{_BASE_MODELS}"
        )
    latents, taken = vae.latent_channels, unet.config.in_channels
    if taken != latents:
        more = _WANTED.get(taken - latents, "more than latents")
        raise ValueError(
            f"the UNet of the pipeline, a {name}, takes {taken} channels, and the VAE's latents "
            f"have {latents}: it wants {more}, which an inversion does not have; use the base model"
        )
    if unet.config.out_channels != taken:
        raise ValueError(
            f"the UNet of the pipeline, a {name}, gives {unet.config.out_channels} channels for "
            f"{taken}: it predicts its variance, too, which DDIM does not use; use another model"
        )
