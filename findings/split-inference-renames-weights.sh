#!/usr/bin/env bash
# One would guess that an option that saves memory leaves a model's weights as they are named, and
# that asking for it twice is asking once.
# FreeNoise's split inference puts modules between a block and its parts: nearly all weights have
# other names then, there is no way back, a second call wraps again, and what save_pretrained
# writes loads into the same class with nearly all of its weights missing.
# Where: diffusers/pipelines/free_noise_utils.py, enable_free_noise_split_inference.
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
from diffusers import AnimateDiffPipeline, UNetMotionModel

for name in ("torch", "diffusers"):
    print(name, importlib.metadata.version(name))


def model(seed):
    torch.manual_seed(seed)
    return UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), cross_attention_dim=8, num_attention_heads=2,
        motion_num_attention_heads=2, motion_max_seq_length=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ).eval()


def call(unet):
    with torch.no_grad():
        return unet(torch.ones(1, 4, 4, 8, 8), 1, torch.ones(4, 2, 8)).sample


unet = model(0)
plain, before = set(unet.state_dict()), call(unet)
pipeline = AnimateDiffPipeline(
    vae=None, text_encoder=None, tokenizer=None, unet=unet, motion_adapter=None, scheduler=None
)
pipeline.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=2)
once = set(pipeline.unet.state_dict())
print("outputs differ by", float((call(pipeline.unet) - before).abs().max()))
print("names of weights that changed:", len(plain - once), "of", len(plain))
print("such as", min(plain - once), "->", min(once - plain))
pipeline.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=2)
twice = set(pipeline.unet.state_dict())
print("wrapped again by a second call:", sum(".module.module." in name for name in twice))
pipeline.unet.save_pretrained("saved")
_, info = UNetMotionModel.from_pretrained("saved", output_loading_info=True)
print("saved and loaded, weights that are missing:", len(info["missing_keys"]))
assert len(plain - once) == 371 and len(plain) == 395
assert sum(".module.module." in name for name in twice) == 371
assert len(info["missing_keys"]) == 371
PY
echo "as found: split inference renames 371 of 395 weights, and what is saved lacks them"
