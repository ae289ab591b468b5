#!/usr/bin/env bash
# One would guess that torch.linalg.lstsq of the same tensors, in one process on one thread, gives
# the same bits: matmul, qr and solve do, and the matrix here is small, tall and of full rank.
# Its default driver on a CPU, gelsy, pivots by an array that LAPACK also reads, and that nothing
# has written: last bits follow from what was freed before. A test of ours that compares two edits
# failed in one run of dozens. driver="gels" has the same bits each time.
# Where: apply_lstsq in aten/src/ATen/native/BatchLinearAlgebraKernel.cpp (pytorch issue 187411).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
cat >"$work/twice.py" <<'PY'
import sys

import torch

torch.set_num_threads(1)
time = torch.linspace(-1, 1, 4, dtype=torch.float64)
powers = torch.stack([time**power for power in range(3)], 1)
values = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def answers(driver):
    found = set()
    for count in range(3000):
        small = [torch.randint(2, (3,), dtype=torch.int32) for _ in range(count % 5)]
        del small
        solution = torch.linalg.lstsq(powers, values, driver=driver).solution
        found.add(tuple(solution.flatten().tolist()))
    return found


print("torch", torch.__version__, "condition", round(float(torch.linalg.cond(powers)), 2))
counts = {}
for driver in ("gelsy", "gelsd", "gels"):
    found = sorted(answers(driver))
    counts[driver] = len(found)
    apart = max(abs(a - b) for other in found for a, b in zip(other, found[0], strict=True))
    print(f"{driver}: {len(found)} answers to the same input, up to {apart:.1e} apart")
as_found = counts["gelsy"] > 1 == counts["gels"]
print("as found: gelsy answers differ, gels has one" if as_found else "changed: gelsy has one answer")
sys.exit(not as_found)
PY
"$work/env/bin/python" "$work/twice.py"
