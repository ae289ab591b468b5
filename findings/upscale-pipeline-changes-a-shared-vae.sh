#!/usr/bin/env bash
# One would guess that a pipeline's constructor takes its parts as they are: pipelines are made of
# the parts of others to save memory, and from_pipe() exists for that.
# StableDiffusionUpscalePipeline writes 0.08333 into its VAE's scaling_factor where it is not that
# already. Every other pipeline of the same VAE encodes and decodes with it from then on, without a
# word where no upscaler has been called.
# Where: diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_upscale.py, __init__.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 accelerate==1.15.0 transformers==5.23.0
cd "$work"
env/bin/python - 2>/dev/null <<'PY'
import importlib.metadata

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)

for name in ("torch", "diffusers"):
    print(name, importlib.metadata.version(name))
torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.18215).eval()
plain = StableDiffusionPipeline(
    vae=vae, text_encoder=None, tokenizer=None, unet=None, scheduler=DDIMScheduler(),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)


def latents():
    """As every pipeline of Stable Diffusion makes them of a picture."""
    with torch.no_grad():
        mean = plain.vae.encode(torch.ones(1, 3, 8, 8)).latent_dist.mean
    return float((mean * plain.vae.config.scaling_factor).norm())


before, factor = latents(), plain.vae.config.scaling_factor
StableDiffusionUpscalePipeline(
    vae=vae, text_encoder=None, tokenizer=None, unet=None,
    low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(),
)
print("scaling factor of the first pipeline's VAE:", factor, "->", plain.vae.config.scaling_factor)
print(f"latents of one picture, their norm: {before:.4f} -> {latents():.4f}")
assert factor == 0.18215
assert plain.vae.config.scaling_factor == 0.08333
assert abs(latents() / before - 0.08333 / 0.18215) < 1e-5
PY
