#!/usr/bin/env bash
# One would guess that under torch.no_grad() a view holds its storage and nothing else, so that
# giving it another storage (`view.data = ...`, as offloading does) frees the old one.
# The view holds the tensor that it was made of, `view._base`, and that one the old storage; nothing
# in Python has a name for it. Under torch.inference_mode() views have no base, and it is freed.
# Where: as_view in torch/csrc/autograd/VariableTypeUtils.h does not ask for the grad mode.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
cat >"$work/views.py" <<'PY'
import gc
import importlib.metadata
import pathlib
import sys

import torch

MIB = 2**20


def resident():
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def left_behind(mode, as_view):
    with mode:
        begin = resident()
        whole = torch.ones(128 * MIB // 4)
        held = whole.view(128, -1) if as_view else whole
        del whole
        based = None if not as_view else held._base is not None
        held.data = torch.empty(0)  # the only tensor that has a name lets go of its storage
        return based, resident() - begin


for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
    for as_view in (False, True):
        based, left = left_behind(mode(), as_view)
        what = f"a view (has a base: {based})" if as_view else "no view"
        print(f"{name}, {what}: {left:.0f} MiB of 128 stay")
        expected = 128 if name == "no_grad" and as_view else 0
        if abs(left - expected) > 8:
            sys.exit(f"this has changed: {expected} MiB were left")
print("torch", importlib.metadata.version("torch"), "as found: the view's base keeps 128 MiB")
PY
"$work/env/bin/python" "$work/views.py"
