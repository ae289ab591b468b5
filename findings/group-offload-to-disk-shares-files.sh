#!/usr/bin/env bash
# One would guess that models which are offloaded to a disk keep their weights apart there, or that
# a folder that holds another model's files is refused.
# diffusers names a file by its group's number alone, and writes none that exists: the second of two
# models that are given one folder computes with the weights of the first, without a word.
# Where: diffusers/hooks/group_offloading.py, ModuleGroup._offload_to_disk and the file's name.
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
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading

for name in ("torch", "diffusers", "accelerate"):
    print(name, importlib.metadata.version(name))


def model(seed):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()


def call(unet):
    with torch.no_grad():
        return unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 2, 8)).sample


first, second = call(model(0)), call(model(1))
print("two models differ by", float((first - second).abs().max()))
cpu = torch.device("cpu")
offloaded = []
for seed in (0, 1):
    unet = model(seed)
    apply_group_offloading(
        unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level",
        offload_to_disk_path="weights",
    )
    offloaded.append(call(unet))
print("the second, offloaded: from its own output", float((offloaded[1] - second).abs().max()),
      "from the first model's", float((offloaded[1] - first).abs().max()))
assert torch.equal(offloaded[0], first)
assert torch.equal(offloaded[1], first) and not torch.equal(offloaded[1], second)
PY
echo "as found: the second model computes with the first one's weights"
