#!/usr/bin/env bash
# One would guess that code which torch.compile keeps on a disk is keyed by the instructions that it
# was made for, as ATEN_CPU_CAPABILITY is there to choose them: what AVX2 made is not for "default".
# The key leaves the variable out. The vectorised C++ of an earlier process is taken from the cache,
# compiled without its header, and the call fails; the other way round, scalar code stays in use.
# Where: torch/_inductor/codecache.py (FxGraphHashDetails has no CPU capability).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cd "$work"
cat >softmax.py <<'PY'
import glob
import importlib.metadata

import torch

if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512", "DEFAULT"):
    raise SystemExit("this CPU has no AVX2 to begin with; nothing can be shown here")
compiled = torch.compile(lambda x: torch.softmax(x * 2.0, -1))
try:
    compiled(torch.randn(64, 64))
    outcome = "compiled"
except Exception as error:
    outcome = "not declared" if "at::vec" in str(error) else repr(error)
print("torch", importlib.metadata.version("torch"), torch.backends.cpu.get_cpu_capability(), outcome)
PY
run() { TORCHINDUCTOR_CACHE_DIR="$work/$1" OMP_NUM_THREADS=1 env/bin/python softmax.py; }
run shared | tee first
ATEN_CPU_CAPABILITY=default run shared | tee second
ATEN_CPU_CAPABILITY=default run own | tee third
grep -q "compiled" first && grep -q "DEFAULT compiled" third
grep -q "DEFAULT not declared" second
echo "as found: with a cache of its own it compiles, with AVX2's it does not"
