"""`python examples/drop_in.py`: attention over EM bases where exact attention was, and how near."""

import time

import torch
from torch.nn.functional import interpolate, scaled_dot_product_attention

from stem_kernels import attention_error, stem_attention

SIDE, CHANNELS, HEADS = 64, 320, 8

torch.manual_seed(0)
# Features that change smoothly from place to place, as a layer's do, and their projections.
features = interpolate(torch.randn(1, CHANNELS, SIDE // 16, SIDE // 16), size=SIDE, mode="bicubic")
projected = features.flatten(2).mT @ torch.randn(3, CHANNELS, CHANNELS) / CHANNELS**0.5
query, key, value = projected.unflatten(-1, (HEADS, -1)).transpose(1, 2).unsqueeze(1)

for attention in (scaled_dot_product_attention, stem_attention):
    begin = time.perf_counter()
    out = attention(query, key, value)
    print(f"{attention.__name__}: {time.perf_counter() - begin:.3f} s, {list(out.shape)}")
print(attention_error(query, key, value))
