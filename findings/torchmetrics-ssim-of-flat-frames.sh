#!/usr/bin/env bash
# One would guess that SSIM is 1 for equal frames and never more, to the rounding of float32.
# On flat frames torchmetrics' float32 is 0.3 % off: 0.9967 for equal ones, 1.0001 for frames that
# differ by one level of 255. Variances are differences of large means, and float32 cancels there.
# In float64 it is 1 to ten digits. Frames of plain colour (titles, skies) are what meets it.
# Where: torchmetrics/functional/image/ssim.py, E[x^2] - E[x]^2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$work"
env/bin/python - <<'PY'
import importlib.metadata

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

for name in ("torch", "torchmetrics"):
    print(name, importlib.metadata.version(name))


def ssim(ours, theirs, dtype):
    pictures = [torch.full((1, 3, 24, 24), level, dtype=dtype) / 255 for level in (ours, theirs)]
    return float(structural_similarity_index_measure(
        *pictures, sigma=1.5, kernel_size=11, data_range=1.0
    ))


equal = {level: ssim(level, level, torch.float32) for level in range(256)}
worst = min(equal, key=equal.__getitem__)
print(f"equal frames, worst of 256 levels ({worst}): float32 {equal[worst]:.6f}, "
      f"float64 {ssim(worst, worst, torch.float64):.12f}")
above = ssim(100, 101, torch.float32)
print(f"levels 100 and 101: float32 {above:.6f}, float64 {ssim(100, 101, torch.float64):.6f}")
assert equal[worst] < 0.9999 and above > 1 + 1e-5
assert abs(ssim(worst, worst, torch.float64) - 1) < 1e-9
PY
echo "as found: float32 leaves SSIM's range on flat frames"
