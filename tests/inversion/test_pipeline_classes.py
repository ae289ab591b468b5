"""Every pipeline class of diffusers that has a UNet: it runs, or is refused with a reason."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from typing import Any

import diffusers
import pytest
import torch
from controls import make_adapter, make_controlnet, pictures
from diffusers import (
    AutoencoderKL,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DiffusionPipeline,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from pipelines import make_pipeline
from video_models import make_model

from stem import Control
from stem.diffusion.checks import check_pipeline
from stem.diffusion.control import Shown, controlled, controlnets_of
from stem.diffusion.loop import denoise, guided
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import inverse_scheduler

RUNS = ""
NO_2D = "not a UNet2DConditionModel"
NO_VAE = "has no VAE"
NO_PROMPT = "has no encode_prompt that takes one prompt"
# By the name of a class: what a refusal says, or RUNS. The first that fits the whole name counts.
EXPECTED = {
    r"I2VGenXL|StableVideoDiffusion|TextToVideoSD|VideoToVideoSD": NO_2D,
    r"AnimateDiffSparseControlNet": r"is a SparseControlNetModel \(its controlnet",
    r"PIA": "it wants a mask and a masked picture",
    r"Kandinsky3.*|UniDiffuser|AudioLDM2|DreamLite.*|StableDiffusion(XL)?ControlNetXS": NO_2D,
    r"ConsistencyModel|DDIM|DDPM|PNDM|RePaint|ScoreSdeVe|KarrasVe|DanceDiffusion": NO_2D,
    r"LDM|LDMSuperResolution|.*Onnx.*": NO_2D,
    r"StableDiffusion3.*": NO_2D,
    r"IF.*|Kandinsky.*|LDMTextToImage|AudioDiffusion": NO_VAE,
    r"Kolors.*": "projects the embeddings of another encoder than CLIP's",
    r"StableDiffusionDepth2Img": "it wants a picture's depth",
    r"StableDiffusion(XL)?InstructPix2Pix|Marigold.*": "it wants another picture",
    r"StableDiffusionLatentUpscale": "it wants another picture",
    r"StableDiffusionUpscale": "it wants a smaller picture",
    r"StableDiffusion(XL)?(PAG)?Inpaint|PaintByExample": "it wants a mask and a masked picture",
    r"StableDiffusionImageVariation": "has no text_encoder",
    r"StableUnCLIP.*": "wants class labels",
    r"StableDiffusionLDM3D|AudioLDM|MusicLDM": "makes latents of",
    r"StableDiffusionXLControlNetUnion.*": r"is a ControlNetUnionModel \(its controlnet",
    r"LEditsPPPipelineStableDiffusion(XL)?|BlipDiffusion.*": NO_PROMPT,
    r"SemanticStableDiffusion|StableDiffusionSafe": NO_PROMPT,
    r".*": RUNS,
}
SAMPLES = {
    r"StableDiffusionDepth2Img": {"in_channels": 5},
    r"StableDiffusion(XL)?InstructPix2Pix|Marigold.*|StableDiffusionLatentUpscale": {
        "in_channels": 8
    },
    r"StableDiffusion(XL)?(PAG)?Inpaint|PaintByExample|PIA": {"in_channels": 9},
    r"StableDiffusionUpscale": {"in_channels": 7, "num_class_embeds": 1000},
    r"StableUnCLIP.*": {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 8,
    },
    r"StableDiffusion(XL)?ControlNetXS": {"layers_per_block": 2},
    r"Kolors.*": {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
    r"StableDiffusionGLIGEN.*": {"attention_type": "gated"},
}
"""By the name of a class: what its models' UNets have beside Stable Diffusion's."""


def first(table: dict[str, Any], name: str) -> Any:
    short = name if name.startswith("LEdits") else name.replace("Pipeline", "")
    return next((v for pattern, v in table.items() if re.fullmatch(pattern, short)), None)


@functools.cache
def classes() -> dict[str, type]:
    """The classes with a UNet, and those of Stable Diffusion's name."""
    found = {}
    for name in dir(diffusers):
        if "Pipeline" not in name or "Output" in name or "Modular" in name:
            continue
        kind = getattr(diffusers, name)
        if not inspect.isclass(kind) or not issubclass(kind, DiffusionPipeline):
            continue
        if "unet" in inspect.signature(kind.__init__).parameters or "StableDiffusion" in name:
            found[name] = kind
    return found


def unet_for(name: str, annotation: str, base: Any) -> Any:
    for kind in (
        *("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel"),
        "I2VGenXLUNet",
    ):
        if kind in annotation:
            wider = (first(SAMPLES, name) or {}).get("in_channels", 4)
            return make_model(kind) if kind != "UNetMotionModel" else motion_unet(base, wider)
    if "UNet2DConditionModel" not in annotation or "AudioLDM2" in annotation:
        return torch.nn.Identity()
    changes = first(SAMPLES, name)
    if changes is None:
        return base
    return UNet2DConditionModel.from_config(base.config, **changes).eval()


def motion_unet(base: Any, channels: int) -> Any:
    """AnimateDiff's UNet on another, which gives its latents so many channels."""
    own = UNetMotionModel.from_unet2d(base, load_weights=False).config
    return UNetMotionModel.from_config(own, in_channels=channels).eval()


def made(name: str, kind: type) -> Any:
    """A pipeline of a class, of small parts; what it needs beside Stable Diffusion's is None."""
    shape = "sdxl" if "XL" in name and "I2VGen" not in name else "sd1"
    parameters = inspect.signature(kind.__init__).parameters
    # Copies: some classes set their VAE's scale or their UNet's processors.
    own = copy.deepcopy(make_pipeline(shape).components)
    given: dict[str, Any] = {}
    for key, parameter in parameters.items():
        annotation = str(parameter.annotation)
        if key == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if key == "unet":
            given[key] = unet_for(name, annotation, own["unet"])
        elif key == "controlnet" and "Union" in annotation:
            given[key] = ControlNetUnionModel.from_unet(given["unet"])
        elif key == "controlnet" and "XS" in annotation:
            given[key] = ControlNetXSAdapter.from_unet(
                given["unet"], size_ratio=1.0, conditioning_embedding_out_channels=(8, 8)
            )
        elif key == "controlnet" and "Sparse" in annotation:
            given[key] = object.__new__(SparseControlNetModel)
        elif key == "controlnet" and "ControlNetModel" in annotation:
            given[key] = make_controlnet(own["unet"])
        elif key == "adapter":
            given[key] = make_adapter(own["unet"])
        elif key == "vae" and first(EXPECTED, name) == "makes latents of":
            given[key] = AutoencoderKL(in_channels=6, out_channels=6, norm_num_groups=4)
        elif key in ("movq", "vqvae"):
            given[key] = own["vae"]
        elif key in own:
            given[key] = own[key]
        elif parameter.default is parameter.empty:
            given[key] = None
    if "requires_safety_checker" in parameters:
        given["requires_safety_checker"] = False
    return kind(**given)


def run(pipeline: Any) -> torch.Tensor:
    """Two steps of an inversion of two frames."""
    scheduler = inverse_scheduler(pipeline, 2)
    conditioning = encode_prompt(pipeline, "a duck", 16, 16)
    nets = controlnets_of(pipeline)
    if nets:
        control = Control(pictures(2, 16, 16))
        conditioning = conditioning.showing(Shown((control,) * len(nets)))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with controlled(pipeline):
        return denoise(latents, scheduler, guided(pipeline, conditioning), name="x")


@pytest.mark.thinned
@pytest.mark.parametrize("name", sorted(classes()))
def test_a_class_runs_or_is_refused_with_the_part(name: str) -> None:
    expected = first(EXPECTED, name)
    if name.startswith(("StableDiffusion3", "UniDiffuser", "StableDiffusionOnnx", "Onnx")):
        pipeline = object.__new__(classes()[name])  # their parts are not of this family
    else:
        pipeline = made(name, classes()[name])
    if expected == RUNS:
        check_pipeline(pipeline)
        assert run(pipeline).isfinite().all()
        return
    with pytest.raises((TypeError, ValueError), match=expected):
        check_pipeline(pipeline)


def test_there_are_classes() -> None:
    assert len(classes()) > 100
    assert issubclass(classes()["StableDiffusionControlNetPipeline"], DiffusionPipeline)
