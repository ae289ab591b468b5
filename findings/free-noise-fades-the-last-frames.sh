#!/usr/bin/env bash
# One would guess that FreeNoise's overlapping windows, whose outputs are averaged by weights, leave
# every frame as it is where the layers change nothing.
# A last window that is there for two frames or more of what is left divides all of them by the
# first one's weight: the last frames fade. For one frame, or with flat weights, they do not.
# Where: diffusers/models/attention.py, FreeNoiseTransformerBlock.forward, where it adds up
# weights[:, -n] in the place of weights[:, -n:]; reached by pipeline.enable_free_noise().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0
cd "$work"
env/bin/python - <<'PY'
import importlib.metadata

import torch
from diffusers.models.attention import FreeNoiseTransformerBlock

print("diffusers", importlib.metadata.version("diffusers"))


def through(frames: int, scheme: str) -> list[float]:
    block = FreeNoiseTransformerBlock(
        4, 1, 4, double_self_attention=True,
        context_length=8, context_stride=4, weighting_scheme=scheme,
    )
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        return [round(value, 2) for value in block(torch.ones(1, frames, 4))[0, :, 0].tolist()]


for frames, scheme in ((12, "pyramid"), (9, "pyramid"), (11, "flat"), (11, "pyramid")):
    print(frames, "frames", scheme, through(frames, scheme))
assert through(12, "pyramid") == [1.0] * 12
assert through(9, "pyramid") == [1.0] * 9
assert through(11, "flat") == [1.0] * 11
assert through(11, "pyramid") == [1.0] * 9 + [0.67, 0.33]
PY
echo "as found: the last two of eleven frames fade"
