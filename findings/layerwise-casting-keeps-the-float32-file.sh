#!/usr/bin/env bash
# One would guess that enable_layerwise_casting(float16) halves what a float32 model takes of a CPU's
# memory. It takes half as much more: loaded weights are views of the mapped safetensors file, and
# the layers that casting passes over (norms) keep all of the file mapped, beside the new weights.
# With every parameter copied first, it is the half.
# Where: safetensors' mapping under diffusers' from_pretrained, and ModelMixin.enable_layerwise_casting.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 \
    psutil==7.2.2
cd "$work"
cat >unet.py <<'PY'
import ctypes
import importlib.metadata
import sys

import psutil
import torch
from diffusers import UNet2DConditionModel


def resident() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
    return psutil.Process().memory_info().rss / 2**20


if sys.argv[1] == "write":
    UNet2DConditionModel(
        block_out_channels=(256, 512), norm_num_groups=32, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    ).save_pretrained("model")
    raise SystemExit
before = resident()
unet = UNet2DConditionModel.from_pretrained("model")
size = sum(p.numel() * p.element_size() for p in unet.parameters()) / 2**20
if sys.argv[1] == "copied":
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
else:
    for parameter in unet.parameters():
        parameter.sum()  # read, as the first call would
loaded = resident() - before
unet.enable_layerwise_casting(torch.float16, torch.float32)
cast = resident() - before
print("diffusers", importlib.metadata.version("diffusers"), f"{sys.argv[1]}: weights {size:.0f} MiB,",
      f"loaded {loaded:.0f}, cast to float16 {cast:.0f}")
wanted = cast < 0.75 * size if sys.argv[1] == "copied" else cast > 1.25 * size
raise SystemExit(not wanted)
PY
env/bin/python unet.py write
env/bin/python unet.py mapped
env/bin/python unet.py copied
echo "as found: casting makes mapped weights larger, and copied ones smaller"
