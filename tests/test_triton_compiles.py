"""Every kernel compiles for GPUs that are not here, with the tiles of `configs/default.json`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from conftest import INTERPRETED

from stem_kernels.tuning import rows_for, tile_for

triton = pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from stem_kernels.triton.basis_attention import _basis_attention_kernel  # noqa: E402
from stem_kernels.triton.em_statistics import _logsumexp_kernel, _sums_kernel  # noqa: E402

# What a block may ask for.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
TILES = json.loads(resources.files("stem_kernels").joinpath("configs/default.json").read_text())


def compiled(kernel: Any, constants: dict[str, Any], launch: dict[str, int], dtype: str, arch: int):  # type: ignore[no-untyped-def]
    float32 = ("p_logsumexp", "p_sums", "p_mass", "p_bias")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in float32 else f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


@pytest.mark.parametrize(
    ("arch", "dtype", "width"),
    [(arch, dtype, 160) for arch in SHARED_KIB for dtype in ("fp16", "fp32")] + [(90, "fp16", 40)],
)
def test_compiles(arch: int, dtype: str, width: int) -> None:
    shared = {"PRECISION": "ieee", "UPCAST": False}
    em = dict(TILES["em_statistics"])
    launch = {name: em[name] for name in ("num_warps", "num_stages")}
    blocks = {
        "BLOCK_N": em["block_n"],
        "BLOCK_K": em["block_k"],
        "BLOCK_D": tile_for(width, em["block_d"]),
        **shared,
    }
    sums = {**blocks, "BLOCK_E": tile_for(width, em["block_d"]), "WITH_MASS": True}
    binaries = [
        compiled(_logsumexp_kernel, blocks, launch, dtype, arch),
        compiled(_sums_kernel, sums, launch, dtype, arch),
    ]
    attention = dict(TILES["basis_attention"])
    launch = {name: attention[name] for name in ("num_warps", "num_stages")}
    padded = tile_for(width, 512)
    row_bytes = padded * (2 if dtype == "fp16" else 4)
    constants = {
        "BLOCK_N": rows_for(row_bytes, attention["query_bytes"]),
        "BLOCK_K": rows_for(row_bytes, attention["basis_bytes"]),
        "BLOCK_D": padded,
        "BLOCK_E": padded,
        "WITH_BIAS": True,
        **shared,
    }
    binaries.append(compiled(_basis_attention_kernel, constants, launch, dtype, arch))
    for binary in binaries:
        assert binary.metadata.shared <= SHARED_KIB[arch] * 1024, binary.metadata.name
        if arch == 90 and dtype == "fp16":
            assert "wgmma" in binary.asm["ptx"], binary.metadata.name
