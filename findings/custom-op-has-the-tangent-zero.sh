#!/usr/bin/env bash
# One would guess that forward-mode AD of a custom operator that has only a backward formula is
# refused, as PyTorch refuses it for its own operators without a forward formula.
# torch.library.custom_op with register_autograd returns no tangent, and torch.func.jvp makes a zero
# of it, without a word; reverse mode of the same operator is right.
# Where: torch/_library/autograd.py (an autograd.Function without jvp) and torch.func's jvp.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
cd "$work"
env/bin/python - <<'PY'
import importlib.metadata

import torch

print("torch", importlib.metadata.version("torch"))


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
x = torch.full((3,), 5.0, requires_grad=True)
square(x).sum().backward()
plain = torch.func.jvp(lambda y: y * y, (x.detach(),), (torch.ones(3),))[1]
custom = torch.func.jvp(square, (x.detach(),), (torch.ones(3),))[1]
print("backward of the operator", x.grad.tolist())
print("jvp of x * x", plain.tolist(), "of the operator", custom.tolist())
assert x.grad.tolist() == plain.tolist() == [10.0] * 3
assert custom.tolist() == [0.0] * 3
PY
echo "as found: the operator's tangent is zero"
