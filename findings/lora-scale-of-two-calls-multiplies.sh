#!/usr/bin/env bash
# One would guess that cross_attention_kwargs={"scale": s} is an argument of one call of a UNet, so
# that two calls under way at once, from two threads or one inside the other, do not meet.
# It is state of the modules: forward multiplies s into the scaling of every LoRA layer, and divides
# it out at the end. Each of two calls runs at s * s while the other is open, without a word. Our
# chunks of a video, of which four wait for each other in a layer, had the fourth power.
# Where: apply_lora_scale and scale_lora_layers in diffusers/utils/peft_utils.py; LoraLayer.scale_layer
# of peft/tuners/lora/layer.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 peft==0.21.2 accelerate==1.15.0 transformers==5.23.0 numpy==2.4.6
cat >"$work/two.py" <<'PY'
import importlib.metadata
import sys
import threading

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
).eval()
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)


def call(scale):
    with torch.no_grad():
        return unet(sample, 10, text, cross_attention_kwargs={"scale": scale}).sample


alone = {scale: call(scale) for scale in (0.25, 0.5)}
def meet(barrier):
    barrier.wait()


inside, done = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
hooks = [
    unet.conv_in.register_forward_hook(lambda *_: meet(inside)),
    unet.conv_out.register_forward_hook(lambda *_: meet(done)),
]
found = [None, None]


def work(place):
    found[place] = call(0.5)


threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for hook in hooks:
    hook.remove()
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft")))
for place, output in enumerate(found):
    off = {scale: float((output - one).norm() / one.norm()) for scale, one in alone.items()}
    print(f"call {place + 1} of two, scale 0.5: off a call alone with 0.5 by {off[0.5]:.1e}, "
          f"with 0.25 by {off[0.25]:.1e}")
off = float((call(0.5) - alone[0.5]).norm())
print(f"a call alone after them is off by {off:.1e}")
as_found = all(
    torch.allclose(output, alone[0.25], atol=1e-5) and not torch.allclose(output, alone[0.5], atol=1e-5)
    for output in found
)
print("as found: both ran at 0.25" if as_found else "changed: a call keeps its own scale")
sys.exit(not as_found)
PY
"$work/env/bin/python" "$work/two.py"
